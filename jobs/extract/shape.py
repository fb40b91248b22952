"""Judged records -> rows of `items`, `interactions`, `sequences`, written and committed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import Observation
from pyspark.sql import functions as F

from jobs.engines import spark_parts
from jobs.engines.spark import on_disk
from jobs.extract import window
from jobs.extract.config import Config
from jobs.extract.judge import DAY
from jobs.lake import partitions
from jobs.lake import store as stores
from jobs.lake.partitions import Commit
from jobs.lake.tables import ITEMS, Table
from jobs.run import InputError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


def with_first_seen(spark: SparkSession, config: Config, items: DataFrame) -> DataFrame:
    """Rows of `items`: an item keeps the date it first had in an earlier snapshot."""
    items = items.select("item_id", "attributes", "content_hash")
    before = previous(spark, config)
    if before is None:
        return items.withColumn("first_seen_ds", F.lit(config.run.ds))
    return items.join(before.select("item_id", F.col("first_seen_ds")), "item_id", "left").withColumn(
        "first_seen_ds", F.coalesce("first_seen_ds", F.lit(config.run.ds))
    )


def previous(spark: SparkSession, config: Config) -> DataFrame | None:
    """The `items` of the last snapshot before ds, if there is one."""
    older = partitions.before(config.run.lake, ITEMS.name, config.run.ds)
    columns = ("item_id", "content_hash", "first_seen_ds")
    return window.read_snapshot(spark, config.run.lake, ITEMS, older, columns) if older else None


def compare(spark: SparkSession, config: Config, items: DataFrame) -> tuple[int, int]:
    """How many items are new, and how many changed their text, since the last snapshot before ds."""
    before = previous(spark, config)
    if before is None:
        return items.count(), 0
    both = items.join(before.select("item_id", F.col("content_hash").alias("old")), "item_id", "left")
    row = both.agg(
        F.count_if(F.col("old").isNull()).alias("new"), F.count_if(F.col("old") != F.col("content_hash")).alias("changed")
    ).first()
    return (int(row.new), int(row.changed)) if row else (0, 0)


def cut_times(days: Sequence[tuple[int, int]], config: Config) -> tuple[int, int]:
    """The midnights that part train from validation and validation from test, nearest to the shares asked for."""
    total = sum(count for _, count in days)
    cuts, before, edges = [], 0, []
    for day, count in days:
        edges.append((before / total, day * DAY))
        before += count
    for share in (1 - config.test_share - config.valid_share, 1 - config.test_share):
        cuts.append(min(edges, key=lambda edge: abs(edge[0] - share))[1])
    if not edges[0][1] < cuts[0] < cuts[1]:
        raise InputError(
            f"{len(days)} days of events cannot be cut into train, validation and test "
            f'(valid_share {config.valid_share}, test_share {config.test_share}): set extract.split = "leave_one_out"'
        )
    return cuts[0], cuts[1]


def date(seconds: int) -> str:
    """Unix seconds as YYYY-MM-DD, UTC."""
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d}"


def histories(events: DataFrame, cuts: tuple[int, int] | None, max_history: int) -> DataFrame:
    """Rows of `sequences`: each user's newest events, oldest first, with the split's boundaries."""
    newest = F.sort_array(F.collect_list(F.struct("timestamp", "item_id")))
    users = events.groupBy("user_id").agg(newest.alias("events"))
    users = users.withColumn("events", F.slice("events", F.greatest(F.size("events") - max_history, F.lit(0)) + 1, max_history))
    size = F.size("events")
    if cuts is None:
        # a user needs three events to give each part one; with fewer, all train
        train_end, valid_end = (F.when(size >= 3, size - left).otherwise(size) for left in (2, 1))
    else:
        train_end, valid_end = (events_before(cut) for cut in cuts)
    return users.select(
        "user_id",
        F.col("events.item_id").alias("item_ids"),
        F.col("events.timestamp").alias("timestamps"),
        train_end.alias("train_end"),
        valid_end.alias("valid_end"),
    )


def events_before(cut: int) -> Column:
    """How many of a user's events lie before a cut time."""
    return F.size(F.filter("events", lambda event: event["timestamp"] < cut))


def save(rows: DataFrame, order: list[str], table: Table, staging: Path, config: Config, files: int = 0) -> Commit:
    """Replaces the partition of ds: rows spread by the first column's hash and sorted, so that a rerun's bytes are equal.

    Raises InputError where the driver does not find every row that Spark's tasks wrote.
    """
    rows = rows.select(table.schema.names)
    files = files or max(1, -(-rows.count() // config.part_rows))
    where, counted, lake = staging / table.name, Observation(), config.run.lake
    # counted by the tasks that write, after the last shuffle: a task that runs twice counts once
    rows = rows.repartition(files, order[0]).sortWithinPartitions(*order).observe(counted, F.count(F.lit(1)).alias("rows"))
    if store := stores.of(lake):
        return partitions.commit_put(
            lake, table, f"ds={config.run.ds}", lambda prefix: spark_parts.put(rows, store.address, prefix, table.schema),
            lambda: int(counted.get.get("rows", 0)),
        )  # fmt: skip
    rows.write.option("compression", "zstd").parquet(on_disk(where))
    written = sorted(where.glob("part-*.parquet"))
    return partitions.commit_files(lake, table.name, f"ds={config.run.ds}", written, rows=int(counted.get.get("rows", 0)))


def fill(items: DataFrame, attributes: Sequence[str]) -> dict[str, float]:
    """Share of the items that have each attribute."""
    has = [F.array_contains("attributes.name", name) for name in attributes]
    row = items.agg(*(F.avg(found.cast("double")) for found in has)).first()
    return {name: round(float(value or 0), 4) for name, value in zip(attributes, row or (), strict=True)}
