"""Spark tables (item attributes, SRS logs) -> `items`, `interactions`, `sequences`, `quarantine`."""

from __future__ import annotations

import datetime as dt
import logging
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from jobs.engines import spark_parts
from jobs.engines.spark import ending, session
from jobs.extract import arrivals, counts, judge, shape, volume, window
from jobs.extract.config import Config as Config
from jobs.extract.gates import check_arrived, check_change, check_dates, check_days, check_quarantine
from jobs.extract.judge import BROADCAST_ITEMS, BY_TIME, DISK, Judged
from jobs.extract.window import Reading
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.lake.locks import alone
from jobs.lake.partitions import Commit
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The snapshot in figures."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
    seen: dict[str, int]
    """Records of each source up to the end of ds, of those that were read."""
    reading: Reading
    """Which partitions of the logs were read."""
    carried: int
    """Events taken from the last snapshot."""
    source: dict[str, str]
    """Where the logs came from, and how they were read."""
    catalogue: str
    """Which catalogue was read: that of ds, or the one of the time of reading."""
    later: int
    """Events after ds: left for a later snapshot, and not judged."""
    undated: int
    """Records without a usable time: of which date they are, nobody knows."""
    later_since: str | None
    """The first partition that has such events."""
    quarantined: dict[str, int]
    """Records refused, by `source: reason`."""
    forgotten: int
    """Items left out because they were forgotten."""
    new_items: int
    changed_items: int
    fill: dict[str, float]
    """Share of the items that have each attribute."""
    lists: dict[str, str]
    """Attributes that hold several values in one text, and what parts them."""
    days: dict[str, int]
    """Events kept of each of the last days."""
    cuts: dict[str, str]
    """The split's cut times, UTC (temporal split)."""


def run(config: Config) -> Result | arrivals.Result:
    """Takes the snapshot of `run.ds` and replaces its four partitions.

    Two runs of one date wait for each other. Raises InputError for a missing table or column, a date with no data, or too much
    quarantine; Refused for a jump in row counts or a day that lacks events; Unavailable for logs that are not there yet.
    """
    with alone(config.run.lake, f"{config.manifest} {config.run.ds}"):
        return in_session(config)


def in_session(config: Config) -> Result | arrivals.Result:
    """The snapshot, by a Spark session of its own."""
    spark = session("extract", config.spark, keep_classes=not config.arriving)
    staging = config.run.lake / ".staging" / f"extract-{uuid.uuid4().hex[:8]}"
    try:
        with ending(spark), spark_parts.failures():
            return arrivals.take(spark, config) if config.arriving else snapshot(spark, config, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def snapshot(spark: SparkSession, config: Config, staging: Path) -> Result:
    """The work of `run` inside one session."""
    judged = judge_sources(spark, config)
    written, cuts = write_snapshot(config, judged, staging)
    result = Result(
        inputs=judged.inputs,
        outputs={f"{name}/ds={config.run.ds}": commit.digest for name, commit in written.items()},
        rows={name: commit.rows for name, commit in written.items()},
        seen=judged.seen,
        reading=judged.reading,
        carried=judged.carried,
        source=window.as_known(config.interactions),
        catalogue=catalogue(config),
        later=judged.of_events.later,
        undated=judged.of_events.undated,
        later_since=judged.of_events.later_since,
        quarantined=judged.quarantined,
        forgotten=len(tombstones(config.run.lake)),
        new_items=judged.of_items.new,
        changed_items=judged.of_items.changed,
        fill=judged.of_items.fill,
        lists=judged.lists,
        days={
            volume.date(day): count for day, count in judged.days if day > volume.day_number(config.run.ds) - volume.HISTORY_DAYS
        },
        cuts={name: shape.date(cut) for name, cut in zip(("valid", "test"), cuts, strict=True)} if cuts else {},
    )
    log_result(config, result)
    return result


def judge_sources(spark: SparkSession, config: Config) -> Judged:
    """Reads both sources once, judges each record, and counts."""
    lake, reading = config.run.lake, window.decide(config.run.lake, config.run.ds, config.interactions)
    table, logs = judge.read_items(spark, config), judge.read_events(spark, config, reading)
    check_arrived(config, reading, logs)
    items = judge.without_forgotten(spark, lake, judge.judge_items(table, config))
    items = shape.with_first_seen(spark, config, items).persist(DISK)
    of_items = counts.of_items(items, config.items.attributes)
    known = items.where("reason is null").select("item_id", F.lit(True).alias("known"))
    known = F.broadcast(known) if of_items.seen <= BROADCAST_ITEMS else known
    # judged once: the source is scanned a single time, so that all counts are of the same rows while it is written to
    source = judge.without_forgotten(spark, lake, logs)
    events = judge.judge_events(config, source, known).persist(DISK)
    seen = events.where("not later").count()
    inputs = {config.tables[0]: f"{of_items.seen}:{of_items.digest}"}
    kept_before, before = None, 0
    if reading.carried_from:
        commit = partitions.read_commit(lake, INTERACTIONS.name, f"ds={reading.carried_from}")
        inputs[f"{INTERACTIONS.name}/ds={reading.carried_from}"] = commit.digest
        kept_before, before = judge.judge_carried(spark, config, reading, known), commit.rows
    files = files_of(config, seen + before)
    copies = judge.number_copies(events.where("reason is null and not later"), kept_before, files).persist(DISK)
    # side by side: few events are sorted by a single task
    with ThreadPoolExecutor(1) as aside:
        counted = aside.submit(counts.of_events, events)
        days, refused = counts.of_copies(copies)
        of_events = counted.result()
    inputs[config.tables[1]] = f"{of_events.seen}:{of_events.digest}"
    quarantine = judge.refused(items, "items", "item_id").unionByName(judge.refused(events, "interactions", "user_id"))
    quarantined = {f"items: {reason}": count for reason, count in of_items.refused.items()}
    quarantined |= {f"interactions: {reason}": count for reason, count in (of_events.refused | refused).items()}
    return Judged(reading=reading, items=items, copies=copies, quarantine=quarantine.unionByName(judge.refused_copies(copies)),
                  seen={"items": of_items.seen, "interactions": of_events.seen}, inputs=inputs, carried=before, files=files,
                  of_items=of_items, of_events=of_events, quarantined=quarantined, days=days,
                  lists=judge.lists(table, config))  # fmt: skip


def files_of(config: Config, rows: int) -> int:
    """Files of a table with so many rows."""
    return max(1, -(-rows // config.part_rows))


def write_snapshot(config: Config, judged: Judged, staging: Path) -> tuple[dict[str, Commit], tuple[int, int] | None]:
    """Commits `quarantine`, and once the gates are passed `items`, `interactions`, `sequences`; and the split's cut times.

    The four are written side by side: a small one, and the last tasks of a large one, leave processors idle.
    """
    kept, refused = judged.of_items.kept, sum(judged.quarantined.values())
    by_reason = ["source", "reason", "record"]
    with ThreadPoolExecutor(4) as aside:
        # whatever the gates say, what was refused can be looked at: leaving this block waits for its commit
        quarantine = aside.submit(
            shape.save, judged.quarantine, by_reason, QUARANTINE, staging, config, files_of(config, refused)
        )
        cuts = check(config, judged)
        events = judged.copies.where("copy = 1 and reason is null").select(INTERACTIONS.schema.names)
        users = shape.histories(events, cuts, config.max_history)
        staged = [
            aside.submit(
                shape.stage, judged.items.where("reason is null"), ["item_id"], ITEMS, staging, config, files_of(config, kept)
            ),
            aside.submit(shape.stage, events, BY_TIME, INTERACTIONS, staging, config, judged.files),
            aside.submit(shape.stage, users, ["user_id"], SEQUENCES, staging, config, judged.files),
        ]
        commits = [quarantine.result(), *(shape.commit(config, each.result()) for each in staged)]
    return {commit.table: commit for commit in commits}, cuts


def check(config: Config, judged: Judged) -> tuple[int, int] | None:
    """All gates; gives the split's cut times."""
    check_quarantine(config, judged)
    check_dates(config, judged.days)
    check_days(config, judged.days)
    cuts = shape.cut_times(judged.days, config) if config.split == "temporal" else None
    check_change(config, {"items": judged.of_items.kept, "interactions": sum(count for _, count in judged.days)})
    return cuts


def catalogue(config: Config) -> str:
    """Which catalogue is read, as a manifest tells it."""
    return f"of {config.run.ds}" if "{ds}" in config.items.table else "of the time of reading"


def log_result(config: Config, result: Result) -> None:
    """The funnel, for a person."""
    yesterday = dt.datetime.now(dt.UTC).date() - dt.timedelta(days=1)
    if config.run.ds < f"{yesterday}" and "{ds}" not in config.items.table:
        log.info("items: %s is of today, whatever --ds says: {ds} in extract.items.table reads it as of then", config.tables[0])
    if result.reading.since:
        where = f"partitions from {result.reading.since} on, {result.carried:,} events from the snapshot of"
        log.info("interactions: %s %s", where, result.reading.carried_from)
    elif result.source["partition"]:
        log.info("interactions: the whole table, as %s", result.reading.why)
    for name, count in result.seen.items():
        log.info("%s: %s seen, %s kept", name, f"{count:,}", f"{result.rows[name]:,}")
    for reason, count in sorted(result.quarantined.items()):
        log.info("quarantined %s × %s", f"{count:,}", reason)
    log.info("sequences: %s users, cut at %s", f"{result.rows['sequences']:,}", result.cuts or "the last two events")
