"""The tables between the jobs: grain, key and laws of each stand beside its schema; reading and writing both check them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from jobs.run import InputError

ITEM_GROUPS = ("cold", "tail", "head")


Law = Callable[[pa.Table], str | None]
"""Returns what is wrong with a table's rows, or None."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the lake."""

    name: str
    grain: str
    key: tuple[str, ...]
    schema: pa.Schema
    laws: tuple[Law, ...] = field(default=())


ATTRIBUTES = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))


def _filled(*columns: str) -> Law:
    def law(rows: pa.Table) -> str | None:
        for column in columns:
            if rows[column].null_count:
                return f"{rows[column].null_count} null values in {column}"
            if pa.types.is_string(rows.schema.field(column).type) and pc.any(pc.equal(rows[column], "")).as_py():
                return f"empty text in {column}"
        return None

    return law


def _one_of(column: str, values: Sequence[str]) -> Law:
    def law(rows: pa.Table) -> str | None:
        strange = pc.filter(rows[column], pc.invert(pc.is_in(rows[column], pa.array(values))))
        return f"{column} {strange[0].as_py()!r} is none of {', '.join(values)}" if len(strange) else None

    return law


def _finite(column: str) -> Law:
    def law(rows: pa.Table) -> str | None:
        for chunk in rows[column].chunks:
            flat = chunk.flatten()
            if flat.null_count or pc.all(pc.is_finite(flat.cast(pa.float32()))).as_py() is False:
                return f"null, infinite or NaN values in {column}"
        return None

    return law


def _split_inside_history(rows: pa.Table) -> str | None:
    length = pc.list_value_length(rows["item_ids"])
    if pc.all(pc.equal(length, pc.list_value_length(rows["timestamps"]))).as_py() is False:
        return "item_ids and timestamps differ in length"
    ordered = pc.and_(
        pc.and_(pc.less_equal(rows["train_end"], rows["valid_end"]), pc.less_equal(rows["valid_end"], length)),
        pc.greater_equal(rows["train_end"], 0),
    )
    return None if pc.all(ordered).as_py() is not False else "not 0 <= train_end <= valid_end <= length"


ITEMS = Table(
    name="items",
    grain="item of the catalogue at the end of ds",
    key=("item_id",),
    schema=pa.schema(
        [
            ("item_id", pa.string()),
            ("attributes", ATTRIBUTES),
            ("content_hash", pa.string()),
            ("first_seen_ds", pa.string()),
        ]
    ),
    laws=(_filled("item_id", "attributes", "content_hash", "first_seen_ds"),),
)
"""`attributes` stand in the recipe's order, absent ones left out; `content_hash` is `content_hash(attributes)`."""


INTERACTIONS = Table(
    name="interactions",
    grain="event kept, up to the end of ds",
    key=("user_id", "item_id", "timestamp"),
    schema=pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())]),
    laws=(_filled("user_id", "item_id", "timestamp"),),
)
"""`timestamp` is in unix seconds. Every item_id is in `items`."""


SEQUENCES = Table(
    name="sequences",
    grain="user with at least one kept event",
    key=("user_id",),
    schema=pa.schema(
        [
            ("user_id", pa.string()),
            ("item_ids", pa.list_(pa.string())),
            ("timestamps", pa.list_(pa.int64())),
            ("train_end", pa.int32()),
            ("valid_end", pa.int32()),
        ]
    ),
    laws=(_filled("user_id", "item_ids", "timestamps", "train_end", "valid_end"), _split_inside_history),
)
"""Oldest event first. Events [0, train_end) train, [train_end, valid_end) validate, [valid_end, length) test."""


QUARANTINE = Table(
    name="quarantine",
    grain="source record refused",
    key=(),
    schema=pa.schema([("source", pa.string()), ("key", pa.string()), ("reason", pa.string()), ("record", pa.string())]),
    laws=(_filled("source", "reason", "record"),),
)
"""`record` is the raw record as JSON: nothing is lost."""


LEFT = "item left the catalogue"
"""Reason for events of earlier snapshots, which no night read again: they count against no share of records read."""


METRICS = Table(
    name="metrics",
    grain="(model, slice, metric) of one evaluation",
    key=("model", "slice", "metric"),
    schema=pa.schema(
        [
            ("model", pa.string()),
            ("slice", pa.string()),
            ("metric", pa.string()),
            ("value", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
            ("n", pa.int64()),
        ]
    ),
    laws=(_filled("model", "slice", "metric", "n"),),
)
"""`low` and `high` bound the 95 % bootstrap interval over users; `n` is the number of users in the slice."""


@cache
def llm_embeddings(width: int, dtype: str = "float16") -> Table:
    """Rows `llm_embeddings` of one encoder: partition `encoder=ID/...`, width in dimensions, dtype float16 or float32."""
    value = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return Table(
        name="llm_embeddings",
        grain="(encoder, content_hash): a text is embedded once, ever",
        key=("content_hash",),
        schema=pa.schema([("item_id", pa.string()), ("content_hash", pa.string()), ("embedding", pa.list_(value, width))]),
        laws=(_filled("item_id", "content_hash", "embedding"), _finite("embedding")),
    )


@cache
def item_embeddings(width: int) -> Table:
    """Rows `item_embeddings` of one space: partition `space=ID/ds=DATE`, width in dimensions."""
    return Table(
        name="item_embeddings",
        grain="(item, space)",
        key=("item_id",),
        schema=pa.schema(
            [
                ("item_id", pa.string()),
                ("space_id", pa.string()),
                ("embedding", pa.list_(pa.float32(), width)),
                ("content_hash", pa.string()),
                ("group", pa.string()),
            ]
        ),
        laws=(
            _filled("item_id", "space_id", "embedding", "content_hash", "group"),
            _finite("embedding"),
            _one_of("group", ITEM_GROUPS),
        ),
    )


ITEM_CODES = Table(
    name="item_codes",
    grain="(item, books)",
    key=("item_id",),
    schema=pa.schema(
        [
            ("item_id", pa.string()),
            ("books_id", pa.string()),
            ("codes", pa.list_(pa.int32())),
            ("number", pa.int32()),
            ("content_hash", pa.string()),
        ]
    ),
    laws=(_filled("item_id", "books_id", "codes", "number", "content_hash"),),
)
"""Partition `books=ID/ds=DATE`. `number` tells items of the same codes apart; (codes, number) is one item's alone."""


def check(table: Table, rows: pa.Table, where: str) -> pa.Table:
    """Rows in the table's exact schema, its laws kept.

    Raises InputError that names `where`, the column or the law, and what was found.
    """
    missing = [name for name in table.schema.names if name not in rows.schema.names]
    if missing:
        raise InputError(f"{where}: column {missing[0]} is missing; a row of {table.name} is one {table.grain}")
    try:
        rows = rows.select(table.schema.names).cast(table.schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where}: {table.name} does not fit its schema: {error}") from error
    for law in table.laws:
        if wrong := law(rows):
            raise InputError(f"{where}: {table.name} breaks its contract: {wrong}")
    return rows


def check_key(table: Table, rows: pa.Table, where: str) -> None:
    """Raises InputError when two rows share the table's key."""
    if table.key and rows.num_rows:
        counts = rows.select(table.key).group_by(list(table.key)).aggregate([([], "count_all")])
        twice = counts.filter(pc.greater(counts["count_all"], 1))
        if twice.num_rows:
            key = {name: twice[name][0].as_py() for name in table.key}
            raise InputError(f"{where}: {table.name} has {twice.num_rows} keys more than once, for example {key}")


def space_of(encoder_id: str, recommender_id: str) -> str:
    """Identity of a space: one (encoder, whitening, recommender); the whitening is part of the recommender."""
    return hashlib.sha256(f"{encoder_id}\n{recommender_id}".encode()).hexdigest()[:16]
