"""Which partitions of the logs a night reads, and what it takes from the last snapshot instead.

A table partitioned by day is read from a few days before the last snapshot on; all earlier events come from that snapshot, which
judged them then. What no window can make up for (events that arrive later than `late_days`, or vanish from the source) a read of
the whole table does, at the latest every `whole_days` days.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.engines import spark_parts
from jobs.engines.spark import on_disk
from jobs.extract.config import InteractionSource
from jobs.lake import manifests, partitions
from jobs.lake import store as stores
from jobs.lake.tables import INTERACTIONS, ITEMS, Table
from jobs.run import InputError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


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


def decide(lake: Path, ds: str, source: InteractionSource) -> Reading:
    """The window that suits the last snapshot before ds; the whole table where there is none that it could go on from."""

    def whole(why: str) -> Reading:
        return Reading(why=why, whole_ds=ds)

    if not source.partition:
        return whole("extract.interactions.partition is not set")
    older = partitions.before(lake, INTERACTIONS.name, ds)
    while older and not partitions.is_committed(lake, ITEMS.name, older):
        older = partitions.before(lake, INTERACTIONS.name, older.removeprefix("ds="))
    if not older:
        return whole("no earlier snapshot")
    before = older.removeprefix("ds=")
    result = manifest_of(lake, before)
    read = result.get("reading") or {}
    if result.get("source") != as_known(source) or not read.get("whole_ds"):
        return whole(f"the snapshot of {before} was made by other settings of extract.interactions")
    if days(read["whole_ds"], ds) >= source.whole_days:
        return whole(f"the last read of the whole table was for {read['whole_ds']} (extract.interactions.whole_days)")
    first = dt.date.fromisoformat(before) - dt.timedelta(days=source.late_days - 1)
    # an event may bear a later time than its partition's: it waited there for its own snapshot
    since = min(f"{first}", result.get("later_since") or f"{first}")
    return Reading(since=since, carried_from=before, whole_ds=read["whole_ds"])


def as_known(source: InteractionSource) -> dict[str, Any]:
    """What two snapshots must share for one to go on from the other."""
    shown = dataclasses.asdict(source)
    return {name: shown[name] for name in ("table", "user_id", "item_id", "timestamp", "unit", "partition")}


def manifest_of(lake: Path, ds: str) -> dict[str, Any]:
    """Result of the `extract` that made a snapshot; empty where it did not end well or is unknown."""
    try:
        manifest = manifests.read(lake, ds, "extract")
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


def read_snapshot(
    spark: SparkSession, lake: Path, table: Table, partition: str, columns: Sequence[str] | None = None
) -> DataFrame:
    """A partition of the lake, of the files that its commit names; of a wide table only some columns."""
    files, names = partitions.read_commit(lake, table.name, partition).files, list(columns or table.schema.names)
    schema = pa.schema([table.schema.field(name) for name in names])
    if store := stores.of(lake):
        return spark_parts.read(spark, store.address, [f"{table.name}/{partition}/{name}" for name in files], schema)
    here = partitions.folder(lake, table.name, partition)
    # whatever the cluster's settings say: a file that a machine does not see is an error, not a file less
    reader = spark.read.option("ignoreMissingFiles", "false").option("ignoreCorruptFiles", "false")
    # the contract's schema: to ask the files for theirs, Spark would run a job
    return reader.schema(from_arrow_schema(schema)).parquet(*(on_disk(here / name) for name in files))
