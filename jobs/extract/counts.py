"""Judged records -> figures: all of one source in one pass, as over a small table Spark's plans cost more than its work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class OfItems:
    """The catalogue in figures."""

    seen: int
    kept: int
    refused: dict[str, int]
    """Records by the reason to refuse them."""
    digest: int
    """Identity of what was read."""
    new: int
    changed: int
    """Kept items that are new, and that changed their text, since the last snapshot before ds."""
    fill: dict[str, float]
    """Share of the kept items that have each attribute."""


@dataclass(frozen=True, kw_only=True)
class OfEvents:
    """The logs in figures."""

    seen: int
    """Events up to ds."""
    later: int
    undated: int
    """Records without a usable time."""
    refused: dict[str, int]
    digest: int
    """Identity of what was read."""
    later_since: str | None
    """The first partition that has later events."""


def of_items(items: DataFrame, attributes: Sequence[str]) -> OfItems:
    """Figures of the judged catalogue."""
    has = [F.count_if(F.array_contains("attributes.name", name)).alias(f"has {name}") for name in attributes]
    groups = items.groupBy("reason").agg(
        F.count(F.lit(1)).alias("rows"),
        order_free(F.col("mark")).alias("digest"),
        F.count_if(F.col("old").isNull()).alias("new"),
        F.count_if(F.col("old") != F.col("content_hash")).alias("changed"),
        *has,
    )
    found = {row.reason: row.asDict() for row in groups.collect()}
    kept = found.get(None, {})
    return OfItems(
        seen=sum(row["rows"] for row in found.values()),
        kept=kept.get("rows", 0),
        refused={reason: row["rows"] for reason, row in found.items() if reason},
        digest=sum(int(row["digest"]) for row in found.values()),
        new=kept.get("new", 0),
        changed=kept.get("changed", 0),
        fill={name: round(kept.get(f"has {name}", 0) / kept.get("rows", 1), 4) for name in attributes},
    )


def of_events(events: DataFrame) -> OfEvents:
    """Figures of the judged logs."""
    groups = events.groupBy("reason", "later").agg(
        F.count(F.lit(1)).alias("rows"),
        F.count_if("undated").alias("undated"),
        order_free(F.xxhash64("user_id", "item_id", "timestamp")).alias("digest"),
        F.min("day").alias("since"),
    )
    found = groups.collect()
    since = [row.since for row in found if row.later and row.since]
    return OfEvents(
        seen=sum(row.rows for row in found if not row.later),
        later=sum(row.rows for row in found if row.later),
        undated=sum(row.undated for row in found),
        refused={row.reason: row.rows for row in found if row.reason},
        digest=sum(int(row.digest) for row in found),
        later_since=f"{min(since)}" if since else None,
    )


def of_copies(copies: DataFrame) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Events kept by day since 1970, in order; and those refused by reason."""
    told = copies.where("copy = 1 or reason is not null")
    groups = told.groupBy(F.floor(F.col("timestamp") / DAY).alias("day"), "reason").agg(F.count(F.lit(1)).alias("rows"))
    days, refused = list[tuple[int, int]](), Counter[str]()
    for row in groups.collect():
        if row.reason:
            refused[row.reason] += row.rows
        else:
            days.append((int(row.day), row.rows))
    return sorted(days), dict(refused)


def order_free(hashes: Column) -> Column:
    """Identity of rows, whatever their order: the sum of their hashes."""
    return F.sum(hashes.cast("decimal(38,0)"))
