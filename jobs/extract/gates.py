"""Gates of `extract`: too much refused, logs that are too old, days that lack events, row counts that jumped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from jobs.extract import volume, window
from jobs.extract.config import Config
from jobs.extract.counts import DAY
from jobs.extract.judge import Judged, snapshot_end
from jobs.extract.volume import Short
from jobs.extract.window import Reading
from jobs.lake import partitions
from jobs.lake.tables import INTERACTIONS, LEFT
from jobs.run import InputError, Refused, Unavailable

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

log = logging.getLogger(__name__)


def check_arrived(config: Config, reading: Reading, logs: DataFrame) -> None:
    """Raises Unavailable where no partition of the logs is new enough for `max_age_days`.

    Asked before anything is judged or written: a night that waits asks again and again. Logs read whole have no such sign.
    """
    if not reading.since or config.max_age_days is None:
        return
    oldest = volume.date(volume.day_number(config.run.ds) - config.max_age_days)
    if logs.where(window.in_window(F.col("day"), oldest)).isEmpty():
        raise Unavailable(
            f"{config.tables[1]} has no partition from {oldest} on (extract.max_age_days = {config.max_age_days}): has the "
            "upstream load run?"
        )


def check_quarantine(config: Config, judged: Judged) -> None:
    """Raises InputError when a source is empty or has more refused records, of those of ds, than `max_quarantine_share`;
    Unavailable where the logs' newest partitions are empty.

    Records without a time may be of any date: of these only the share counts that the others have up to ds. Else a year's broken
    records would count against each single date of a backfill.
    """
    since, ours = judged.reading.since, share_of_date(judged)
    for name, table in zip(("items", "interactions"), config.tables, strict=True):
        without = judged.of_events.undated * (1 - ours) if name == "interactions" else 0
        count = judged.seen[name] - without
        if not count:
            where = f"{table} has no record up to {config.run.ds}"
            if since and name == "interactions":
                raise Unavailable(f"{where} from {since} on: has the upstream load run?")
            raise InputError(f"{where}: check the table and --ds")
        bad = {why: n for why, n in judged.quarantined.items() if why.startswith(f"{name}:") and not why.endswith(LEFT)}
        refused = sum(bad.values()) - without
        if refused / count > config.max_quarantine_share:
            worst = ", ".join(f"{n:,} × {reason.split(': ', 1)[1]}" for reason, n in sorted(bad.items(), key=lambda kv: -kv[1]))
            raise InputError(
                f"{refused:,.0f} of {count:,.0f} {name} records ({refused / count:.1%}) were refused, more than "
                f"extract.max_quarantine_share = {config.max_quarantine_share}: {worst}; "
                f"they lie in {config.run.lake}/quarantine/ds={config.run.ds}"
            )


def share_of_date(judged: Judged) -> float:
    """Of the events that have a time, the share up to ds."""
    dated = judged.seen["interactions"] - judged.of_events.undated
    return dated / (dated + judged.of_events.later) if dated + judged.of_events.later else 1.0


def check_dates(config: Config, days: Sequence[tuple[int, int]]) -> None:
    """Raises InputError when no event is left, Unavailable when the newest is too old."""
    if not days:
        raise InputError(f"{config.tables[1]} has no usable event up to {config.run.ds}: check the table and --ds")
    age = snapshot_end(config.run.ds) // DAY - 1 - days[-1][0]
    if config.max_age_days is not None and age > config.max_age_days:
        raise Unavailable(
            f"the newest event of {config.tables[1]} is {age} days older than {config.run.ds} "
            f"(extract.max_age_days = {config.max_age_days}): has the upstream load run?"
        )


def check_days(config: Config, days: Sequence[tuple[int, int]]) -> None:
    """Raises Refused when a day since the last snapshot lacks events, or an earlier one has lost them since; Unavailable where ds
    alone lacks some, which may still be filling."""
    ds, lake, share = config.run.ds, config.run.lake, config.min_day_share
    if not share:
        return
    older = partitions.before(lake, INTERACTIONS.name, ds)
    if not older:
        # nobody can say that it was ever otherwise: a first snapshot is told of, no more
        if short := volume.short_days(days, volume.day_number(ds) - 1, volume.day_number(ds), share):
            log.warning("%s", "; ".join(map(worded, short)))
        return
    last = older.removeprefix("ds=")
    short = volume.short_days(days, volume.day_number(last), volume.day_number(ds), share)
    short += volume.shrunk_days(days, window.manifest_of(lake, last).get("days") or {}, volume.day_number(last), share)
    if short:
        filling = all(one.day == volume.day_number(ds) for one in short)
        raise (Unavailable if filling else Refused)(
            f"{config.tables[1]} lacks events: {'; '.join(map(worded, short[:5]))}{', …' if len(short) > 5 else ''} "
            f"(extract.min_day_share = {share}). Has the upstream load run whole? If that is right, run once with "
            f"--set extract.min_day_share=0"
        )


def worded(short: Short) -> str:
    """A day that lacks events, for a person."""
    return f"{volume.date(short.day)} has {short.events:,}, usual {short.why}: {short.usual:,}"


def check_change(config: Config, counts: dict[str, int]) -> None:
    """Raises Refused when a row count jumped against the last snapshot before ds."""
    for name, count in counts.items():
        older = partitions.before(config.run.lake, name, config.run.ds) if config.max_row_change else None
        if not older:
            continue
        before = partitions.read_commit(config.run.lake, name, older).rows
        change = abs(count - before) / max(before, 1)
        if change > config.max_row_change:
            raise Refused(
                f"{name} went from {before:,} ({older}) to {count:,} rows, a change of {change:.0%}, more than "
                f"extract.max_row_change = {config.max_row_change}; if that is right, run once with "
                f"--set extract.max_row_change=0"
            )
