"""The table of items -> `arriving_items`: what is new or changed since a snapshot, between two nights; the logs are not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import functions as F

from jobs.extract import judge, window
from jobs.extract.config import Config
from jobs.lake import arrivals, partitions
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.tables import ATTRIBUTES, ITEMS
from jobs.run import Refused

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True, kw_only=True)
class Result:
    """What arrived."""

    new_items: int
    changed_items: int
    quarantined: int
    """Records of the table that were refused; the night keeps them with their reasons."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def take(spark: SparkSession, config: Config) -> Result:
    """Replaces the partition of ds of `arriving_items` by all items that differ from the snapshot of ds.

    Items that left the table stay until the night. Raises InputError without that snapshot, Refused where so many arrived that it
    takes a night.
    """
    lake, partition = config.run.lake, f"ds={config.run.ds}"
    snapshot = partitions.read_commit(lake, ITEMS.name, partition)
    judged = judge.without_forgotten(spark, lake, judge.judge_items(judge.read_items(spark, config), config)).persist(judge.DISK)
    before = window.read_snapshot(spark, lake, ITEMS, partition, ("item_id", "content_hash", "first_seen_ds"))
    known = before.select("item_id", F.col("content_hash").alias("old"), "first_seen_ds")
    fresh = judged.where("reason is null").join(known, "item_id", "left").where("old is null or old != content_hash")
    rows = fresh.select("item_id", "attributes", "content_hash", "first_seen_ds", "old").limit(config.most_arriving + 1).collect()
    refused = judged.where("reason is not null").count()
    if len(rows) > config.most_arriving:
        raise Refused(
            f"more than extract.most_arriving = {config.most_arriving:,} items are new or changed since {config.run.ds}: leave "
            "them to the night"
        )
    rows.sort(key=lambda row: row.item_id)
    table = pa.table(
        {
            "item_id": [row.item_id for row in rows],
            "attributes": pa.array([[pair.asDict() for pair in row.attributes] for row in rows], ATTRIBUTES),
            "content_hash": [row.content_hash for row in rows],
            "first_seen_ds": [row.first_seen_ds or config.run.ds for row in rows],
        },
        schema=ITEMS.schema,
    )
    commit = partitions.write(lake, ARRIVING_ITEMS, partition, [table])
    arrivals.drop_before(lake, config.run.ds)
    new = sum(row.old is None for row in rows)
    return Result(
        new_items=new,
        changed_items=len(rows) - new,
        quarantined=refused,
        inputs={"items": snapshot.digest},
        outputs={f"{ARRIVING_ITEMS.name}/{partition}": commit.digest},
        rows={ARRIVING_ITEMS.name: commit.rows},
    )
