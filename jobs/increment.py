"""Which partitions of the logs a night reads, and what it takes from the last snapshot instead.

A table partitioned by day is read from a few days before the last snapshot on; all earlier events come from that snapshot, which
judged them then. Histories are made again for users with a new event, or one of an item that is gone; the others' are taken over,
and so are the files of the events. What no window can make up for (events that arrive later than `late_days`, or vanish from the
source) a read of the whole table does, at the latest every `whole_days` days.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark import StorageLevel
from pyspark.sql import functions as F

from jobs import contracts
from jobs.contracts import INTERACTIONS, ITEMS, SEQUENCES, InputError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from jobs.extract import InteractionSource


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What of the logs a night reads."""

    since: str = ""
    """The first partition read; empty is the whole table."""
    why: str = ""
    """Why the whole table is read."""
    carried_from: str = ""
    """The snapshot (a date) that earlier events come from."""
    whole_ds: str
    """The newest date whose snapshot read the whole table."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a night takes over."""

    events: DataFrame
    """Without those that are gone."""
    gone: DataFrame
    """Events of items that left the catalogue (with the `reason`) or were forgotten (without)."""
    gone_count: int
    sequences: DataFrame
    rows: int
    """Events of the snapshot, those included that are gone."""
    digest: str


def decide(lake: Path, ds: str, source: InteractionSource, max_history: int) -> Reading:
    """The window that suits the last snapshot before ds; the whole table where there is none that it could go on from."""

    def whole(why: str) -> Reading:
        return Reading(why=why, whole_ds=ds)

    if not source.partition:
        return whole("extract.interactions.partition is not set")
    complete = set.intersection(*(set(contracts.partitions(lake, table.name)) for table in (INTERACTIONS, ITEMS, SEQUENCES)))
    older = sorted(name.removeprefix("ds=") for name in complete if name < f"ds={ds}")
    if not older:
        return whole("no earlier snapshot")
    before, result = older[-1], manifest_of(lake, older[-1])
    read = result.get("reading") or {}
    if result.get("source") != as_known(source, max_history) or not read.get("whole_ds"):
        return whole(f"the snapshot of {before} was made by other settings of extract.interactions")
    if days(read["whole_ds"], ds) >= source.whole_days:
        return whole(f"the last read of the whole table was for {read['whole_ds']} (extract.interactions.whole_days)")
    first = dt.date.fromisoformat(before) - dt.timedelta(days=source.late_days - 1)
    # an event may bear a later time than its partition's: it waited there for its own snapshot
    since = min(f"{first}", result.get("later_since") or f"{first}")
    return Reading(since=since, carried_from=before, whole_ds=read["whole_ds"])


def as_known(source: InteractionSource, max_history: int) -> dict[str, str]:
    """What two snapshots must share for one to go on from the other."""
    shown = {**dataclasses.asdict(source), "max_history": max_history}
    names = ("table", "user_id", "item_id", "timestamp", "unit", "partition", "max_history")
    return {name: str(shown[name]) for name in names}


def manifest_of(lake: Path, ds: str) -> dict[str, Any]:
    """Result of the `extract` that made a snapshot; empty where it did not end well or is unknown."""
    try:
        manifest = contracts.read_manifest(lake, ds, "extract")
    except InputError:
        return {}
    result: dict[str, Any] = manifest["result"]
    return result if f"interactions/ds={ds}" in result.get("outputs", {}) else {}


def days(earlier: str, later: str) -> int:
    """Days from one date to another."""
    return (dt.date.fromisoformat(later) - dt.date.fromisoformat(earlier)).days


def partition_day(rows: DataFrame, source: InteractionSource) -> Column:
    """The day of each record's partition: dates, times, or 2026-03-01 and 20260301 as text or number; null for anything else."""
    value = F.col(f"`{source.partition}`")
    if rows.schema[source.partition].dataType.typeName() in ("date", "timestamp", "timestamp_ntz"):
        return value.cast("date")
    written = value.cast("string")
    return F.coalesce(*(F.try_to_timestamp(written, F.lit(form)) for form in ("yyyy-MM-dd", "yyyyMMdd"))).cast("date")


def in_window(day: Column, since: str) -> Column:
    """Partitions from `since` on; what has no readable day is read every night, so that nothing is lost."""
    return F.coalesce(day >= F.lit(since).cast("date"), F.lit(True))


def carry(spark: SparkSession, lake: Path, reading: Reading, known: DataFrame, broadcast: int) -> Carried:
    """The snapshot that the night goes on from, held against the catalogue of today.

    Its events were judged then. A join with the whole catalogue would cost more than reading the source: items that left are few,
    and up to `broadcast` of them go to every executor.
    """
    partition, forgotten = f"ds={reading.carried_from}", sorted(contracts.tombstones(lake))
    every = read_snapshot(spark, lake, INTERACTIONS.name, partition)
    buried = spark.createDataFrame([(item, None) for item in forgotten], "item_id string, reason string")
    left = read_snapshot(spark, lake, ITEMS.name, partition).join(known, "item_id", "left_anti")
    left = left.join(F.broadcast(buried), "item_id", "left_anti").select("item_id", F.lit(contracts.LEFT).alias("reason"))
    items = left.unionByName(buried).persist(StorageLevel.DISK_ONLY)
    items = F.broadcast(items) if items.count() <= broadcast else items
    gone = every.join(items, "item_id").persist(StorageLevel.DISK_ONLY)
    count, commit = gone.count(), contracts.read_commit(lake, INTERACTIONS.name, partition)
    return Carried(
        events=every.join(items, "item_id", "left_anti").select(INTERACTIONS.schema.names) if count else every,
        gone=gone,
        gone_count=count,
        sequences=read_snapshot(spark, lake, SEQUENCES.name, partition),
        rows=commit.rows,
        digest=commit.digest,
    )


def links(lake: Path, reading: Reading, staging: Path) -> list[Path]:
    """Second names for the files of the snapshot's events: an unchanged file is neither read nor written again."""
    partition = f"ds={reading.carried_from}"
    here, there = contracts.folder(lake, INTERACTIONS.name, partition), staging / "before"
    there.mkdir(parents=True)
    names = contracts.read_commit(lake, INTERACTIONS.name, partition).files
    for name in names:
        os.link(here / name, there / name)
    return [there / name for name in names]


def read_snapshot(spark: SparkSession, lake: Path, table: str, partition: str) -> DataFrame:
    """A partition of the lake, of the files that its commit names."""
    here = contracts.folder(lake, table, partition)
    return spark.read.parquet(*(str(here / name) for name in contracts.read_commit(lake, table, partition).files))
