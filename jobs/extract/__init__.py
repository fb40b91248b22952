"""Spark tables (item attributes, SRS logs) -> `items`, `interactions`, `sequences`, `quarantine`."""

from __future__ import annotations

import datetime as dt
import logging
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F

from jobs.engines import spark_parts
from jobs.engines.spark import session
from jobs.extract import arrivals, judge, shape, volume, window
from jobs.extract.config import Config as Config
from jobs.extract.gates import check_change, check_dates, check_days, check_quarantine
from jobs.extract.judge import BROADCAST_ITEMS, BY_TIME, DAY, DISK, Judged
from jobs.extract.window import Reading
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.lake.locks import alone
from jobs.lake.partitions import Commit
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

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
    spark = session("extract", config.spark)
    staging = config.run.lake / ".staging" / f"extract-{uuid.uuid4().hex[:8]}"
    try:
        with spark_parts.failures():
            return arrivals.take(spark, config) if config.arriving else snapshot(spark, config, staging)
    finally:
        spark.stop()
        shutil.rmtree(staging, ignore_errors=True)


def snapshot(spark: SparkSession, config: Config, staging: Path) -> Result:
    """The work of `run` inside one session."""
    judged = judge_sources(spark, config)
    quarantine, quarantined = judged.quarantine.persist(DISK), reasons(judged.quarantine)
    written = {QUARANTINE.name: shape.save(quarantine, ["source", "reason", "record"], QUARANTINE, staging, config)}
    check_quarantine(config, judged, quarantined)
    items = shape.with_first_seen(spark, config, judged.items.where("reason is null")).persist(DISK)
    commits, cuts, days = write_snapshot(config, judged, items, staging)
    written |= commits
    new, changed = shape.compare(spark, config, items)
    result = Result(
        inputs=judged.inputs,
        outputs={f"{name}/ds={config.run.ds}": commit.digest for name, commit in written.items()},
        rows={name: commit.rows for name, commit in written.items()},
        seen=judged.seen,
        reading=judged.reading,
        carried=judged.carried,
        source=window.as_known(config.interactions),
        catalogue=catalogue(config),
        later=judged.later,
        undated=judged.undated,
        later_since=judged.later_since,
        quarantined=quarantined,
        forgotten=len(tombstones(config.run.lake)),
        new_items=new,
        changed_items=changed,
        fill=shape.fill(items, config.items.attributes),
        lists=judge.lists(spark, config),
        days={volume.date(day): count for day, count in days if day > volume.day_number(config.run.ds) - volume.HISTORY_DAYS},
        cuts={name: shape.date(cut) for name, cut in zip(("valid", "test"), cuts, strict=True)} if cuts else {},
    )
    tell(config, result)
    return result


def judge_sources(spark: SparkSession, config: Config) -> Judged:
    """Reads both sources once and judges each record."""
    lake, reading = config.run.lake, window.decide(config.run.lake, config.run.ds, config.interactions)
    items = judge.without_forgotten(spark, lake, judge.judge_items(spark, config)).persist(DISK)
    seen = {"items": items.count()}
    known = items.where("reason is null").select("item_id", F.lit(True).alias("known"))
    known = F.broadcast(known) if seen["items"] <= BROADCAST_ITEMS else known
    # judged once: the source is scanned a single time, so that all counts are of the same rows while it is written to
    source = judge.without_forgotten(spark, lake, judge.read_events(spark, config, reading))
    events = judge.judge_events(config, source, known).persist(DISK)
    read, later, undated, digest, later_since = sums(events)
    seen["interactions"] = read
    inputs = {config.tables[0]: f"{seen['items']}:{identity(items, 'item_id', 'record')}"}
    inputs[config.tables[1]] = f"{read}:{digest}"
    kept_before, before = None, 0
    if reading.carried_from:
        commit = partitions.read_commit(lake, INTERACTIONS.name, f"ds={reading.carried_from}")
        inputs[f"{INTERACTIONS.name}/ds={reading.carried_from}"] = commit.digest
        kept_before, before = judge.judge_carried(spark, config, reading, known), commit.rows
    files = -(-max(read + before, 1) // config.part_rows)
    copies = judge.number_copies(events.where("reason is null and not later"), kept_before, files).persist(DISK)
    quarantine = judge.refused(items, "items", "item_id").unionByName(judge.refused(events, "interactions", "user_id"))
    quarantine = quarantine.unionByName(judge.duplicates(copies))
    if kept_before is not None:
        quarantine = quarantine.unionByName(judge.refused(kept_before, "interactions", "user_id"))
    return Judged(reading=reading, items=items, copies=copies, quarantine=quarantine, seen=seen, inputs=inputs, carried=before,
                  later=later, undated=undated, later_since=later_since, files=files)  # fmt: skip


def sums(events: DataFrame) -> tuple[int, int, int, Any, str | None]:
    """(events up to ds, later ones, those without a time, identity of what was read, first partition that has later ones)."""
    row = events.agg(
        F.count_if(~F.col("later")), F.count_if("later"), F.count_if("undated"),
        order_free_hash("user_id", "item_id", "timestamp"), F.min(F.when(F.col("later"), F.col("day"))),
    ).first()  # fmt: skip
    read, later, undated, digest, since = tuple(row) if row else (0, 0, 0, 0, None)
    return int(read), int(later), int(undated), digest, str(since) if since else None


def identity(rows: DataFrame, *columns: str) -> Any:
    """Identity of rows, whatever their order."""
    row = rows.agg(order_free_hash(*columns)).first()
    return row[0] if row else 0


def order_free_hash(*columns: str) -> Column:
    """Identity of what was read, whatever the order of its rows: the sum of the rows' hashes."""
    return F.sum(F.xxhash64(*columns).cast("decimal(38,0)"))


def reasons(quarantine: DataFrame) -> dict[str, int]:
    """Records refused, by `source: reason`."""
    counted = quarantine.groupBy("source", "reason").count().collect()
    return {f"{row.source}: {row.reason}": int(row["count"]) for row in counted}


def write_snapshot(
    config: Config, judged: Judged, items: DataFrame, staging: Path
) -> tuple[dict[str, Commit], tuple[int, int] | None, list[tuple[int, int]]]:
    """Commits `items`, `interactions`, `sequences`, once their gates are passed; the split's cut times; and events by day."""
    events = judged.copies.where("copy = 1").select(INTERACTIONS.schema.names)
    days = [
        (int(row.day), int(row["count"]))
        for row in events.groupBy(F.floor(F.col("timestamp") / DAY).alias("day")).count().orderBy("day").collect()
    ]
    check_dates(config, days)
    check_days(config, days)
    cuts = shape.cut_times(days, config) if config.split == "temporal" else None
    check_change(config, {"items": items.count(), "interactions": sum(count for _, count in days)})
    users = shape.histories(events, cuts, config.max_history)
    commits = {
        ITEMS.name: shape.save(items, ["item_id"], ITEMS, staging, config),
        INTERACTIONS.name: shape.save(events, BY_TIME, INTERACTIONS, staging, config, judged.files),
        SEQUENCES.name: shape.save(users, ["user_id"], SEQUENCES, staging, config, judged.files),
    }
    return commits, cuts, days


def catalogue(config: Config) -> str:
    """Which catalogue is read, as a manifest tells it."""
    return f"of {config.run.ds}" if "{ds}" in config.items.table else "of the time of reading"


def tell(config: Config, result: Result) -> None:
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
