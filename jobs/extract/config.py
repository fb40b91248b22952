"""What `extract` reads: the two source tables, and how their snapshot is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jobs.run import InputError, Run


@dataclass(frozen=True, kw_only=True)
class ItemSource:
    """The table of item attributes."""

    table: str
    """Any table name that Spark's catalogs resolve, or a Parquet path. `{ds}` in it is the date, so that a backfill reads the
    catalogue of its own date: ``shop.`items_{ds}` ``, `s3a://shop/items/dt={ds}`, or of a source that keeps its past (Delta,
    Iceberg) `shop.items TIMESTAMP AS OF '{ds} 23:59:59'`, `shop.items VERSION AS OF 'night-{ds}'`."""
    item_id: str = "item_id"
    """The column with the item's id, as the events write it; numbers are read as texts."""
    attributes: tuple[str, ...]
    """Attribute columns in the order of the prompt: texts, numbers, or lists of them."""
    now: str = ""
    """The table of the present, where `table` is one as of `{ds}`: what arrives between two nights (`hourly_items`) is looked for
    there. Empty takes `table`."""
    lists: dict[str, str] = field(default_factory=dict)
    """Text columns that hold several values, and what parts them: `{ genres = "|" }`. Filters of serving find an item by each of
    them. Columns of arrays need no entry."""

    def __post_init__(self) -> None:
        for name, between in self.lists.items():
            if name not in self.attributes or not between:
                raise InputError(
                    f"extract.items.lists has {name} = {between!r}: name one of the attributes ({', '.join(self.attributes)}) "
                    "and the text that stands between its values"
                )


@dataclass(frozen=True, kw_only=True)
class InteractionSource:
    """The table of SRS logs."""

    table: str
    """As for items; `{ds}` is the date here too, and a table of that date that is not there yet is waited for (exit status 4)."""
    user_id: str = "user_id"
    """The column with the user's id."""
    item_id: str = "item_id"
    """The column with the id of the item that the event is about."""
    timestamp: str = "timestamp"
    """A number in `unit` since 1970, or a date or timestamp column."""
    unit: Literal["s", "ms", "us"] = "s"
    """Unit of a timestamp that is a number: seconds, milliseconds or microseconds. Date and timestamp columns need none."""
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
    """Share of the events that the gates judge by, the newest (temporal split); no training sees them before."""
    max_history: int = 2_000
    """Newest events kept for a user in `sequences`: bounds one row."""
    max_quarantine_share: float = 0.05
    """More of a source's records refused than this fails the job."""
    max_row_change: float = 0.5
    """A change in items or interactions against the last snapshot above this share is refused; 0 allows any."""
    max_age_days: int | None = None
    """Logs whose newest event is older than this many days before ds are not there yet (exit status 4); 0 demands an event on ds;
    left out, any age will do. Where partitions are read, one must be as new."""
    min_day_share: float = 0.5
    """A day since the last snapshot with fewer events than this share of what its weekday had in the eight weeks before is
    refused, and so is one that lost as many since it was last read; the bound is wider where days differ much. Where ds alone
    lacks events it is waited for (exit status 4). 0 judges none."""
    settle_minutes: float = 10.0
    """A Parquet folder with `{ds}` in its path is read once it has a `_SUCCESS`, or its newest file is that old; until then a
    load may be under way (exit status 4). 0 reads it at once."""
    part_rows: int = 2_000_000
    """Rows of one Parquet file, about."""
    arriving: bool = False
    """Reads the table of items alone, and keeps what is new or changed since the snapshot of ds: between two nights."""
    most_arriving: int = 50_000
    """Items that may arrive between two nights; more are left to the night."""
    spark: dict[str, str] = field(default_factory=dict)
    """Spark settings, for example `"spark.master" = "spark://host:7077"`."""

    def __post_init__(self) -> None:
        if self.most_arriving < 1:
            raise InputError(f"extract.most_arriving is {self.most_arriving}: it must be at least 1")
        if self.arriving and "{ds}" in self.items.table and not self.items.now:
            raise InputError(
                f"extract.items.table = {self.items.table!r} is the table as of a date, in which nothing arrives: name the table "
                "of the present in extract.items.now, or pause hourly_items"
            )
        if self.settle_minutes < 0:
            raise InputError(f"extract.settle_minutes is {self.settle_minutes}: it must be at least 0")
        if not 0 <= self.min_day_share < 1 or (self.max_age_days or 0) < 0:
            raise InputError("extract.min_day_share must be at least 0 and below 1, extract.max_age_days at least 0")

    @property
    def tables(self) -> tuple[str, str]:
        """Names of the tables of items and of events, for ds; what arrives is looked for in the items of now."""
        items = self.items.now if self.arriving and self.items.now else self.items.table
        return items.replace("{ds}", self.run.ds), self.interactions.table.replace("{ds}", self.run.ds)

    @property
    def manifest(self) -> str:
        """What arrives between nights is no part of a night's record."""
        return "arriving-extract" if self.arriving else "extract"
