"""Spark tables (item attributes, SRS logs) -> `items`, `interactions`, `sequences`, `quarantine`."""

from __future__ import annotations

import datetime as dt
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyspark import StorageLevel
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from jobs.engines.spark import session, source
from jobs.extract import window
from jobs.extract.window import Reading
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.lake.locks import alone
from jobs.lake.partitions import Commit
from jobs.lake.tables import INTERACTIONS, ITEMS, LEFT, QUARANTINE, SEQUENCES, Table
from jobs.run import InputError, Refused, Run

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

DAY = 86_400
LATEST_SECONDS = 100_000_000_000
"""Unix seconds past this are the year 5138: such a number counts milliseconds."""
PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
DISK = StorageLevel.DISK_ONLY
BROADCAST_ITEMS = 1_000_000
"""Catalogues up to this size go to every executor, about 100 MB; larger ones are joined by a shuffle."""
BY_TIME = ["user_id", "timestamp", "item_id"]
"""The one order of events: it deduplicates, is the order of the files, and makes histories, all with a single sort."""


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """The table of item attributes."""

    table: str
    """Any table name that Spark's catalogs resolve, or a Parquet path."""
    item_id: str = "item_id"
    attributes: tuple[str, ...]
    """Attribute columns in the order of the prompt: texts, numbers, or lists of them."""


@dataclass(frozen=True, kw_only=True)
class InteractionSource:
    """The table of SRS logs."""

    table: str
    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    """A number in `unit` since 1970, or a date or timestamp column."""
    unit: Literal["s", "ms", "us"] = "s"
    partition: str = ""
    """The column that parts the table by day (dates, 2026-03-01 or 20260301). With it a night reads the newest partitions alone
    and takes earlier events from the last snapshot; without it, the whole table."""
    late_days: int = 3
    """Partitions up to the last snapshot's date that are read again: for late events, and items that came after their events."""
    whole_days: int = 7
    """Days after which the whole table is read again; 1 reads it every night."""

    def __post_init__(self) -> None:
        if self.late_days < 0 or self.whole_days < 1:
            raise InputError("extract.interactions.late_days must be at least 0, whole_days at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is read, how users' histories are split, and how much bad input stops the night."""

    run: Run
    items: ItemSource
    interactions: InteractionSource
    split: Literal["temporal", "leave_one_out"] = "temporal"
    """`temporal`: one cut time for all users (the production default); `leave_one_out`: for comparison with papers."""
    valid_share: float = 0.1
    """Share of the events that validate (temporal split); the cut falls on a midnight, UTC."""
    test_share: float = 0.1
    max_history: int = 2_000
    """Newest events kept for a user in `sequences`: bounds one row."""
    max_quarantine_share: float = 0.05
    """More of a source's records refused than this fails the job."""
    max_row_change: float = 0.5
    """A change in items or interactions against the last snapshot above this share is refused; 0 allows any."""
    max_age_days: int = 0
    """Logs whose newest event is older than this many days before ds fail the job; 0 allows any age."""
    part_rows: int = 2_000_000
    """Rows of one Parquet file, about."""
    spark: dict[str, str] = field(default_factory=dict)
    """Spark settings, for example `"spark.master" = "spark://host:7077"`."""


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
    later: int
    """Events after ds: left for a later snapshot."""
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
    cuts: dict[str, str]
    """The split's cut times, UTC (temporal split)."""


def run(config: Config) -> Result:
    """Takes the snapshot of `run.ds` and replaces its four partitions.

    Two runs of one date wait for each other. Raises InputError for a missing table or column, a date with no data, or too much
    quarantine; Refused for a jump in row counts.
    """
    with alone(config.run.lake, f"extract {config.run.ds}"):
        return in_session(config)


def in_session(config: Config) -> Result:
    """The snapshot, by a Spark session of its own."""
    spark = session("extract", config.spark)
    staging = config.run.lake / ".staging" / f"extract-{uuid.uuid4().hex[:8]}"
    try:
        return snapshot(spark, config, staging)
    finally:
        spark.stop()
        shutil.rmtree(staging, ignore_errors=True)


def snapshot(spark: SparkSession, config: Config, staging: Path) -> Result:
    """The work of `run` inside one session."""
    lake, partition = config.run.lake, f"ds={config.run.ds}"
    reading = window.decide(lake, config.run.ds, config.interactions)
    forgotten = tombstones(lake)
    items = without(spark, forgotten, judge_items(spark, config)).persist(DISK)
    seen = {"items": items.count()}
    known = items.where("reason is null").select("item_id", F.lit(True).alias("known"))
    known = F.broadcast(known) if seen["items"] <= BROADCAST_ITEMS else known
    # judged once: the source is scanned a single time, so that all counts are of the same rows while it is written to
    events = judge_events(config, without(spark, forgotten, read_events(spark, config, reading)), known).persist(DISK)
    sums = events.agg(
        F.count_if(~F.col("later")), F.count_if("later"), order_free_hash("user_id", "item_id", "timestamp"),
        F.min(F.when(F.col("later"), F.col("day"))),
    ).first()  # fmt: skip
    read, later, digest, later_since = tuple(sums) if sums else (0, 0, 0, None)
    seen["interactions"] = int(read)
    inputs = {config.interactions.table: f"{read}:{digest}"}
    kept_before, before = None, 0
    if reading.carried_from:
        commit = partitions.read_commit(lake, INTERACTIONS.name, f"ds={reading.carried_from}")
        inputs[f"{INTERACTIONS.name}/ds={reading.carried_from}"] = commit.digest
        kept_before, before = judge_carried(spark, config, reading, known), commit.rows
    files = -(-max(seen["interactions"] + before, 1) // config.part_rows)
    copies = number_copies(events.where("reason is null and not later"), kept_before, files).persist(DISK)

    quarantine = refused(items, "items", "item_id").unionByName(refused(events, "interactions", "user_id"))
    quarantine = quarantine.unionByName(duplicates(copies))
    if kept_before is not None:
        quarantine = quarantine.unionByName(refused(kept_before, "interactions", "user_id"))
    quarantine = quarantine.persist(DISK)
    reasons = quarantine.groupBy("source", "reason").count().collect()
    quarantined = {f"{row.source}: {row.reason}": int(row["count"]) for row in reasons}
    written = {QUARANTINE.name: save(quarantine, ["source", "reason", "record"], QUARANTINE, staging, config)}
    check_quarantine(config, seen, quarantined, reading.since)

    kept_items = with_first_seen(spark, config, items.where("reason is null")).persist(DISK)
    kept_events = copies.where("copy = 1").select(INTERACTIONS.schema.names)
    days = [
        (int(row.day), int(row["count"]))
        for row in kept_events.groupBy(F.floor(F.col("timestamp") / DAY).alias("day")).count().orderBy("day").collect()
    ]
    check_dates(config, days)
    cuts = cut_times(days, config) if config.split == "temporal" else None
    check_change(config, {"items": kept_items.count(), "interactions": sum(count for _, count in days)})
    written[ITEMS.name] = save(kept_items, ["item_id"], ITEMS, staging, config)
    written[INTERACTIONS.name] = save(kept_events, BY_TIME, INTERACTIONS, staging, config, files)
    sequences = histories(kept_events, cuts, config.max_history)
    written[SEQUENCES.name] = save(sequences, ["user_id"], SEQUENCES, staging, config, files)
    new, changed = compare(spark, config, kept_items)
    text_hash = items.agg(order_free_hash("item_id", "record")).first()
    result = Result(
        inputs={config.items.table: f"{seen['items']}:{text_hash[0] if text_hash else 0}", **inputs},
        outputs={f"{name}/{partition}": commit.digest for name, commit in written.items()},
        rows={name: commit.rows for name, commit in written.items()},
        seen=seen,
        reading=reading,
        carried=before,
        source=window.as_known(config.interactions),
        later=int(later),
        later_since=str(later_since) if later_since else None,
        quarantined=quarantined,
        forgotten=len(forgotten),
        new_items=new,
        changed_items=changed,
        fill=fill(kept_items, config.items.attributes),
        cuts={name: date(cut) for name, cut in zip(("valid", "test"), cuts, strict=True)} if cuts else {},
    )
    tell(result)
    return result


def order_free_hash(*columns: str) -> Column:
    """Identity of what was read, whatever the order of its rows: the sum of the rows' hashes."""
    return F.sum(F.xxhash64(*columns).cast("decimal(38,0)"))


def date(seconds: int) -> str:
    """Unix seconds as YYYY-MM-DD, UTC."""
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d}"


# --------------------------------------------------------------------------------------------------------------- judging


def judge_items(spark: SparkSession, config: Config) -> DataFrame:
    """Every source item with its attributes, content hash and the `reason` to refuse it, if any."""
    names = config.items
    rows = source(spark, names.table, "extract.items.table", [names.item_id, *names.attributes])
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
    return rows.select(
        "item_id",
        "attributes",
        "record",
        content_hash_column(F.col("attributes")).alias("content_hash"),
        F.when(F.coalesce(F.length("item_id"), F.lit(0)) == 0, "item_id is null or empty")
        .when(F.row_number().over(copies) > 1, "duplicate item_id: the fullest record was kept")
        .when(F.size("attributes") == 0, "no attributes")
        .alias("reason"),
    )


def text(value: Column, kind: str) -> Column:
    """A column's value as prompt text: lists joined by commas, structures as JSON, blank as null."""
    if kind == "array":
        value = F.array_join(F.filter(value.cast("array<string>"), lambda part: F.length(F.trim(part)) > 0), ", ")
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


def without(spark: SparkSession, forgotten: frozenset[str], rows: DataFrame) -> DataFrame:
    """Rows of no item that was forgotten."""
    if not forgotten:
        return rows
    gone = spark.createDataFrame([(item,) for item in sorted(forgotten)], "item_id string")
    return rows.join(F.broadcast(gone), "item_id", "left_anti")


def read_events(spark: SparkSession, config: Config, reading: Reading) -> DataFrame:
    """The source's events: user, item, unix seconds, the `record` as it stands in the source, and its partition's day."""
    names = config.interactions
    columns = [names.user_id, names.item_id, names.timestamp, *filter(None, [names.partition])]
    rows = source(spark, names.table, "extract.interactions.table", columns)
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
    """Events with the `reason` to refuse them, and whether they lie after ds (`later`)."""
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
    return rows.select(
        "user_id",
        "item_id",
        "timestamp",
        reason.alias("reason"),
        F.coalesce(F.col("timestamp").between(snapshot_end(config.run.ds), now + DAY), F.lit(False)).alias("later"),
        F.when(reason.isNotNull(), F.to_json("record")).alias("record"),
        "day",
    )


def judge_carried(spark: SparkSession, config: Config, reading: Reading, known: DataFrame) -> DataFrame:
    """Events of the snapshot that the night goes on from, with the one `reason` that can have come up since.

    They were judged then. A join with the whole catalogue would cost more than reading the source: items that left it are few.
    """
    lake, old, names = config.run.lake, f"ds={reading.carried_from}", INTERACTIONS.schema.names
    forgotten = tombstones(lake)
    rows = without(spark, forgotten, window.read_snapshot(spark, lake, INTERACTIONS.name, old))
    items = without(spark, forgotten, window.read_snapshot(spark, lake, ITEMS.name, old))
    left = items.join(known, "item_id", "left_anti").select("item_id", F.lit(LEFT).alias("reason")).persist(DISK)
    count = left.count()
    if not count:
        return rows.select(*names, F.lit(None).cast("string").alias("reason"), F.lit(None).cast("string").alias("record"))
    rows = rows.join(F.broadcast(left) if count <= BROADCAST_ITEMS else left, "item_id", "left")
    return rows.select(*names, "reason", F.when(F.col("reason").isNotNull(), F.to_json(F.struct(*names))).alias("record"))


def snapshot_end(ds: str) -> int:
    """The first unix second after ds."""
    return int(dt.datetime.combine(dt.date.fromisoformat(ds), dt.time(), dt.UTC).timestamp()) + DAY


def refused(rows: DataFrame, name: str, key: str) -> DataFrame:
    """The refused records of a source, as rows of `quarantine`."""
    return rows.where("reason is not null").select(F.lit(name).alias("source"), F.col(key).alias("key"), "reason", "record")


def number_copies(events: DataFrame, before: DataFrame | None, files: int) -> DataFrame:
    """Events by user and time with the number of the `copy`, 1 for the one that is kept; an event read again is no copy."""
    events = events.select(*INTERACTIONS.schema.names, F.lit(False).alias("carried"))
    if before is not None:
        events = events.unionByName(
            before.where("reason is null").select(*INTERACTIONS.schema.names, F.lit(True).alias("carried"))
        )
    events = events.repartition(files, "user_id")
    copy = F.row_number().over(Window.partitionBy(*BY_TIME).orderBy("carried"))
    # the rows are in this order already; saying so lets Spark leave out the sorts of what is made from them
    return events.withColumn("copy", copy).sortWithinPartitions(*BY_TIME)


def duplicates(copies: DataFrame) -> DataFrame:
    """One row of `quarantine` for each further copy of an event."""
    return copies.where("copy > 1 and not carried").select(
        F.lit("interactions").alias("source"),
        F.col("user_id").alias("key"),
        F.lit("duplicate event").alias("reason"),
        F.to_json(F.struct(*INTERACTIONS.schema.names, "copy")).alias("record"),
    )


# --------------------------------------------------------------------------------------------------------------- shaping


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
    lake = config.run.lake
    older = [name for name in partitions.committed(lake, ITEMS.name) if name < f"ds={config.run.ds}"]
    if not older:
        return None
    return window.read_snapshot(spark, lake, ITEMS.name, older[-1])


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
    """Replaces the partition of ds: rows spread by the first column's hash and sorted, so that a rerun's bytes are equal."""
    rows = rows.select(table.schema.names)
    files = files or max(1, -(-rows.count() // config.part_rows))
    where = staging / table.name
    rows.repartition(files, order[0]).sortWithinPartitions(*order).write.option("compression", "zstd").parquet(str(where))
    return partitions.commit_files(config.run.lake, table.name, f"ds={config.run.ds}", sorted(where.glob("part-*.parquet")))


# ----------------------------------------------------------------------------------------------------------------- gates


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


def fill(items: DataFrame, attributes: Sequence[str]) -> dict[str, float]:
    """Share of the items that have each attribute."""
    has = [F.array_contains("attributes.name", name) for name in attributes]
    row = items.agg(*(F.avg(there.cast("double")) for there in has)).first()
    return {name: round(float(value or 0), 4) for name, value in zip(attributes, row or (), strict=True)}


def tell(result: Result) -> None:
    """The funnel, for a person."""
    if result.reading.since:
        where = f"partitions from {result.reading.since} on, {result.carried:,} events from the snapshot of"
        print(f"interactions: {where} {result.reading.carried_from}", file=sys.stderr)
    elif result.source["partition"]:
        print(f"interactions: the whole table, as {result.reading.why}", file=sys.stderr)
    for name, count in result.seen.items():
        print(f"{name}: {count:,} seen, {result.rows[name]:,} kept", file=sys.stderr)
    for reason, count in sorted(result.quarantined.items()):
        print(f"quarantined {count:,} × {reason}", file=sys.stderr)
    print(f"sequences: {result.rows['sequences']:,} users, cut at {result.cuts or 'the last two events'}", file=sys.stderr)
