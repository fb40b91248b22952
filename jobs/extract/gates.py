"""Gates of `extract`: too much refused, logs that are too old, row counts that jumped."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.extract.config import Config
from jobs.extract.judge import DAY, snapshot_end
from jobs.lake import partitions
from jobs.lake.tables import LEFT
from jobs.run import InputError, Refused


def check_quarantine(config: Config, seen: dict[str, int], quarantined: dict[str, int], since: str) -> None:
    """Raises InputError when a source is empty or has more refused records, of those read, than `max_quarantine_share`."""
    for name, count in seen.items():
        if not count:
            where = f"has no record up to {config.run.ds}" + (f" from {since} on" if since and name == "interactions" else "")
            raise InputError(f"{getattr(config, name).table} {where}: check the table and --ds")
        bad = {why: n for why, n in quarantined.items() if why.startswith(f"{name}:") and not why.endswith(LEFT)}
        share = sum(bad.values()) / count
        if share > config.max_quarantine_share:
            worst = ", ".join(f"{n:,} × {reason.split(': ', 1)[1]}" for reason, n in sorted(bad.items(), key=lambda kv: -kv[1]))
            raise InputError(
                f"{sum(bad.values()):,} of {count:,} {name} records ({share:.1%}) were refused, more than "
                f"extract.max_quarantine_share = {config.max_quarantine_share}: {worst}; "
                f"they lie in {config.run.lake}/quarantine/ds={config.run.ds}"
            )


def check_dates(config: Config, days: Sequence[tuple[int, int]]) -> None:
    """Raises InputError when no event is left, or the newest is too old."""
    if not days:
        raise InputError(f"{config.interactions.table} has no usable event up to {config.run.ds}: check the table and --ds")
    age = snapshot_end(config.run.ds) // DAY - 1 - days[-1][0]
    if config.max_age_days and age > config.max_age_days:
        raise InputError(
            f"the newest event of {config.interactions.table} is {age} days older than {config.run.ds} "
            f"(extract.max_age_days = {config.max_age_days}): has the upstream load run?"
        )


def check_change(config: Config, counts: dict[str, int]) -> None:
    """Raises Refused when a row count jumped against the last snapshot before ds."""
    for name, count in counts.items():
        older = [part for part in partitions.committed(config.run.lake, name) if part < f"ds={config.run.ds}"]
        if not older or not config.max_row_change:
            continue
        before = partitions.read_commit(config.run.lake, name, older[-1]).rows
        change = abs(count - before) / max(before, 1)
        if change > config.max_row_change:
            raise Refused(
                f"{name} went from {before:,} ({older[-1]}) to {count:,} rows, a change of {change:.0%}, more than "
                f"extract.max_row_change = {config.max_row_change}; if that is right, run once with "
                f"--set extract.max_row_change=0"
            )
