"""Source records -> the same records, each with the reason to refuse it, if there is one."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark import StorageLevel
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from jobs.engines.spark import source, spread
from jobs.extract import window
from jobs.extract.config import Config
from jobs.extract.counts import DAY, OfEvents, OfItems
from jobs.extract.settled import check_settled
from jobs.extract.window import Reading
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.lake.tables import INTERACTIONS, ITEMS, LEFT

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

LATEST_SECONDS = 100_000_000_000
"""Unix seconds past this are the year 5138: such a number counts milliseconds."""

PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}

DISK = StorageLevel.DISK_ONLY

BETWEEN = ", "
"""Stands between the values of a list in the text of its attribute."""

BROADCAST_ITEMS = 1_000_000
"""Catalogues up to this size go to every executor, about 100 MB; larger ones are joined by a shuffle."""

DUPLICATE = "duplicate event"

BY_TIME = ["user_id", "timestamp", "item_id"]
"""The one order of events: it deduplicates, is the order of the files, and makes histories, all with a single sort."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Both sources, judged, and what was counted while they were read."""

    reading: Reading
    items: DataFrame
    copies: DataFrame
    """Events that their sources leave, numbered by `copy`: those without a `reason` are kept where it is 1."""
    quarantine: DataFrame
    seen: dict[str, int]
    inputs: dict[str, str]
    carried: int
    files: int
    """Files of `interactions` and of `sequences`."""
    of_items: OfItems
    of_events: OfEvents
    quarantined: dict[str, int]
    """Records refused, by `source: reason`."""
    days: list[tuple[int, int]]
    """Events kept by day since 1970, in order; days without any left out."""
    lists: dict[str, str]
    """Attributes that hold several values in one text, and what parts them."""


def read_items(spark: SparkSession, config: Config) -> DataFrame:
    """The source's items, as they stand there."""
    columns = [config.items.item_id, *config.items.attributes]
    dated = "{ds}" in config.items.table and not config.arriving
    if dated:
        check_settled(spark, config.tables[0], "extract.items.table", config.settle_minutes)
    return source(spark, config.tables[0], "extract.items.table", columns, dated=dated)


def judge_items(rows: DataFrame, config: Config) -> DataFrame:
    """Every source item with its attributes, content hash and the `reason` to refuse it, if any; then its `record` as well.

    `mark` is a hash of the id and the record, whether it is refused or not.
    """
    names = config.items
    pairs = [
        F.struct(F.lit(name).alias("name"), text(F.col(f"`{name}`"), rows.schema[name].dataType.typeName()).alias("value"))
        for name in names.attributes
    ]
    rows = rows.select(
        F.trim(F.col(f"`{names.item_id}`").cast("string")).alias("item_id"),
        F.filter(F.array(*pairs), lambda pair: F.coalesce(F.length(pair["value"]), F.lit(0)) > 0).alias("attributes"),
        F.to_json(F.struct("*")).alias("record"),
    )
    copies = Window.partitionBy("item_id").orderBy(F.size("attributes").desc(), "record")
    reason = (
        F.when(F.coalesce(F.length("item_id"), F.lit(0)) == 0, "item_id is null or empty")
        .when(F.row_number().over(copies) > 1, "duplicate item_id: the fullest record was kept")
        .when(F.size("attributes") == 0, "no attributes")
    )
    return rows.withColumn("reason", reason).select(
        "item_id",
        "attributes",
        content_hash_column(F.col("attributes")).alias("content_hash"),
        "reason",
        # most of a row is its record, and most rows are kept
        F.when(F.col("reason").isNotNull(), F.col("record")).alias("record"),
        F.xxhash64("item_id", "record").alias("mark"),
    )


def lists(rows: DataFrame, config: Config) -> dict[str, str]:
    """Attributes that hold several values, and what parts them in their text: arrays, and what the recipe says."""
    names = config.items
    arrays = (name for name in names.attributes if rows.schema[name].dataType.typeName() == "array")
    return dict.fromkeys(arrays, BETWEEN) | names.lists


def text(value: Column, kind: str) -> Column:
    """A column's value as prompt text: lists joined by commas, structures as JSON, blank as null."""
    if kind == "array":
        value = F.array_join(F.filter(value.cast("array<string>"), lambda part: F.length(F.trim(part)) > 0), BETWEEN)
    elif kind in ("struct", "map"):
        value = F.to_json(value)
    return F.nullif(F.trim(value.cast("string")), F.lit(""))


def content_hash_column(attributes: Column) -> Column:
    """`content_hash`, computed by Spark."""
    written = F.transform(
        attributes,
        lambda pair: F.concat(
            F.length(pair["name"]).cast("string"),
            F.lit(":"),
            pair["name"],
            F.length(pair["value"]).cast("string"),
            F.lit(":"),
            pair["value"],
        ),
    )
    return F.substring(F.sha2(F.concat_ws("", written), 256), 1, 32)


def without_forgotten(spark: SparkSession, lake: Path, rows: DataFrame) -> DataFrame:
    """Rows of no item that was forgotten."""
    forgotten = tombstones(lake)
    if not forgotten:
        return rows
    gone = spark.createDataFrame([(item,) for item in sorted(forgotten)], "item_id string")
    return rows.join(F.broadcast(gone), "item_id", "left_anti")


def read_events(spark: SparkSession, config: Config, reading: Reading) -> DataFrame:
    """The source's events: user, item, unix seconds, the `record` as it stands in the source, and its partition's day."""
    names = config.interactions
    columns = [names.user_id, names.item_id, names.timestamp, *filter(None, [names.partition])]
    if "{ds}" in names.table:
        check_settled(spark, config.tables[1], "extract.interactions.table", config.settle_minutes)
    rows = source(spark, config.tables[1], "extract.interactions.table", columns, dated="{ds}" in names.table)
    day = window.partition_day(rows, names) if names.partition else F.lit(None).cast("date")
    if reading.since:
        rows = rows.where(window.in_window(day, reading.since))
    moment = F.col(f"`{names.timestamp}`")
    if rows.schema[names.timestamp].dataType.typeName() in ("timestamp", "timestamp_ntz", "date"):
        seconds = F.unix_timestamp(moment.cast("timestamp"))
    else:
        seconds = F.floor(F.try_divide(moment.try_cast("double"), F.lit(PER_SECOND[names.unit])))
    user, item = (F.trim(F.col(f"`{name}`").cast("string")) for name in (names.user_id, names.item_id))
    return rows.select(
        user.alias("user_id"), item.alias("item_id"), seconds.alias("timestamp"), F.struct("*").alias("record"), day.alias("day")
    )


def judge_events(config: Config, rows: DataFrame, known: DataFrame) -> DataFrame:
    """Events with the `reason` to refuse them; whether they lie after ds (`later`), which nobody judges yet; and whether they
    have no time at all (`undated`)."""
    rows = rows.join(known, "item_id", "left")
    now = int(dt.datetime.now(dt.UTC).timestamp())
    reason = (
        F.when(F.coalesce(F.length("user_id"), F.lit(0)) == 0, "user_id is null or empty")
        .when(F.coalesce(F.length("item_id"), F.lit(0)) == 0, "item_id is null or empty")
        .when(F.col("timestamp").isNull(), "timestamp is null or not a number")
        .when(F.col("timestamp") < 0, "timestamp is before 1970")
        .when(
            F.col("timestamp") > LATEST_SECONDS, f"timestamp is not in {config.interactions.unit}: set extract.interactions.unit"
        )
        .when(F.col("timestamp") > now + DAY, "timestamp is in the future")
        .when(F.col("known").isNull(), "item is unknown")
    )
    dated = F.coalesce(F.col("timestamp").between(0, now + DAY), F.lit(False))
    # what has no time of its own is of its partition's day
    later = F.when(dated, F.col("timestamp") >= snapshot_end(config.run.ds)).otherwise(F.col("day") > F.lit(config.run.ds))
    later = F.coalesce(later, F.lit(False))
    reason = F.when(~later, reason)
    return rows.select(
        "user_id",
        "item_id",
        "timestamp",
        reason.alias("reason"),
        later.alias("later"),
        (~dated & ~later).alias("undated"),
        F.when(reason.isNotNull(), F.to_json("record")).alias("record"),
        "day",
    )


def judge_carried(spark: SparkSession, config: Config, reading: Reading, known: DataFrame) -> DataFrame:
    """Events of the snapshot that the night goes on from, with the one `reason` that can have come up since.

    They were judged then. A join with the whole catalogue would cost more than reading the source: items that left it are few.
    """
    lake, old = config.run.lake, f"ds={reading.carried_from}"
    rows = without_forgotten(spark, lake, window.read_snapshot(spark, lake, INTERACTIONS, old))
    items = without_forgotten(spark, lake, window.read_snapshot(spark, lake, ITEMS, old, ("item_id",)))
    left = items.join(known, "item_id", "left_anti").select("item_id", F.lit(LEFT).alias("reason"))
    few = partitions.read_commit(lake, ITEMS.name, old).rows <= BROADCAST_ITEMS
    if not few:
        left = left.persist(DISK)
        few = left.count() <= BROADCAST_ITEMS
    rows = rows.join(F.broadcast(left) if few else left, "item_id", "left")
    return rows.select(*INTERACTIONS.schema.names, "reason")


def snapshot_end(ds: str) -> int:
    """The first unix second after ds."""
    return int(dt.datetime.combine(dt.date.fromisoformat(ds), dt.time(), dt.UTC).timestamp()) + DAY


def refused(rows: DataFrame, name: str, key: str) -> DataFrame:
    """The refused records of a source, as rows of `quarantine`."""
    return rows.where("reason is not null").select(F.lit(name).alias("source"), F.col(key).alias("key"), "reason", "record")


def number_copies(events: DataFrame, before: DataFrame | None, files: int) -> DataFrame:
    """Events by user and time with the number of the `copy`, 1 for the one that is kept, and the `reason` to refuse one now.

    An event read again is no copy: it is left out, and nobody refuses it.
    """
    names = INTERACTIONS.schema.names
    events = events.select(*names, F.lit(None).cast("string").alias("reason"), F.lit(False).alias("carried"))
    if before is not None:
        events = events.unionByName(before.select(*names, "reason", F.lit(True).alias("carried")))
    events = spread(events, files, "user_id")
    copy = F.row_number().over(Window.partitionBy(*BY_TIME).orderBy("carried"))
    reason = F.coalesce("reason", F.when((F.col("copy") > 1) & ~F.col("carried"), DUPLICATE))
    # the rows are in this order already; saying so lets Spark leave out the sorts of what is made from them
    return events.withColumn("copy", copy).select(*names, "copy", reason.alias("reason")).sortWithinPartitions(*BY_TIME)


def refused_copies(copies: DataFrame) -> DataFrame:
    """One row of `quarantine` for each further copy of an event, and for each carried event whose item left."""
    names = INTERACTIONS.schema.names
    record = F.when(F.col("reason") == DUPLICATE, F.to_json(F.struct(*names, "copy"))).otherwise(F.to_json(F.struct(*names)))
    return refused(copies.withColumn("record", record), "interactions", "user_id")
