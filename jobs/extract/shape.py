"""Judged records -> rows of `items`, `interactions`, `sequences`, written and committed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import Observation
from pyspark.sql import functions as F

from jobs.engines import spark_parts
from jobs.engines.spark import on_disk, spread
from jobs.extract import window
from jobs.extract.config import Config
from jobs.extract.counts import DAY
from jobs.lake import partitions, parts, remote
from jobs.lake import store as stores
from jobs.lake.partitions import Commit
from jobs.lake.store import Found
from jobs.lake.tables import ITEMS, Table
from jobs.run import InputError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


def with_first_seen(spark: SparkSession, config: Config, items: DataFrame) -> DataFrame:
    """Judged items with the date they first had, and their content hash (`old`), in the last snapshot before ds."""
    lake = config.run.lake
    older = partitions.before(lake, ITEMS.name, config.run.ds)
    if not older:
        return items.withColumns({"first_seen_ds": F.lit(config.run.ds), "old": F.lit(None).cast("string")})
    before = window.read_snapshot(spark, lake, ITEMS, older, ("item_id", "content_hash", "first_seen_ds"))
    before = before.withColumnRenamed("content_hash", "old")
    joined = items.join(before, "item_id", "left")
    return joined.withColumn("first_seen_ds", F.coalesce("first_seen_ds", F.lit(config.run.ds)))


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


@dataclass(frozen=True, kw_only=True)
class Staged:
    """Files of a partition, not committed yet."""

    table: Table
    rows: int
    """Counted by the tasks that wrote them."""
    files: list[Path] = field(default_factory=list)
    """On a lake in a folder."""
    entries: list[remote.Entry] = field(default_factory=list)
    """On a lake in an object store: parts that were put."""
    before: Found | None = None
    """The commit that stood there before."""


def stage(rows: DataFrame, order: list[str], table: Table, staging: Path, config: Config, files: int) -> Staged:
    """Writes the rows of a partition: spread by the first column's hash and sorted, so that a rerun leaves the same files.

    On an object store to the byte. In a folder, where Java writes, a file's footer lists encodings in an order that each Java
    process chooses by chance.
    """
    where, counted, partition = staging / table.name, Observation(), f"ds={config.run.ds}"
    # counted by the tasks that write, after the last shuffle: a task that runs twice counts once
    rows = spread(rows.select(table.schema.names), files, order[0]).sortWithinPartitions(*order)
    rows = rows.observe(counted, F.count(F.lit(1)).alias("rows"))
    if store := stores.of(config.run.lake):
        before = remote.committed_now(store, table.name, partition)
        entries = spark_parts.put(rows, store.address, f"{table.name}/{partition}", table.schema)
        return Staged(table=table, rows=int(counted.get.get("rows", 0)), entries=entries, before=before)
    rows.write.option("compression", "zstd").parquet(on_disk(where))
    return Staged(table=table, rows=int(counted.get.get("rows", 0)), files=sorted(where.glob("part-*.parquet")))


def commit(config: Config, staged: Staged) -> Commit:
    """Replaces the partition of ds. Raises InputError where the driver does not find every row that Spark's tasks wrote."""
    lake, partition = config.run.lake, f"ds={config.run.ds}"
    if stores.of(lake):
        return parts.commit_put(lake, staged.table, partition, staged.entries, staged.before, staged.rows)
    return partitions.commit_files(lake, staged.table.name, partition, staged.files, rows=staged.rows)


def save(rows: DataFrame, order: list[str], table: Table, staging: Path, config: Config, files: int) -> Commit:
    """Writes the rows of a partition and commits them."""
    return commit(config, stage(rows, order, table, staging, config, files))
