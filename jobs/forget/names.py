"""Which rows and texts name an item, by the format that they are in."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH_ROWS = 65_536
LONG = 8
"""Characters from which on an id is no coincidence, wherever its bytes stand."""

Ids = frozenset[str]


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A Parquet or Arrow file in bounded batches."""
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as stream:
            yield from pa.ipc.open_file(stream).read_all().to_batches(max_chunksize=BATCH_ROWS)
        return
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def named(batch: pa.RecordBatch, ids: Ids) -> pa.Array:
    """Which rows name an item: in a column or list of items, or as a value of the raw `record` in quarantine.

    An id of some length is looked for in every column; a short one may well be a user's id, or a value of an attribute.
    """
    found = pa.repeat(False, batch.num_rows)
    anywhere = pa.array(sorted(item for item in ids if len(item) >= LONG), pa.string())
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        wanted = pa.array(sorted(ids), pa.string()) if "item" in name else anywhere
        if len(wanted):
            found = pc.or_(found, holds(column, wanted))
    if "record" in batch.schema.names:
        found = pc.or_(found, in_records(batch["record"], ids))
    return found


def holds(column: pa.Array, wanted: pa.Array) -> pa.Array:
    """Which rows of a column, however nested, hold a wanted text."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.is_in(column, wanted.cast(kind))
    if pa.types.is_struct(kind):
        found = pa.repeat(False, len(column))
        for part in column.flatten():
            found = pc.or_(found, holds(part, wanted))
        return found
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        hits = pc.filter(pc.list_parent_indices(column), holds(column.flatten(), wanted))
        return pc.is_in(pa.array(range(len(column)), pa.int64()), hits.cast(pa.int64()))
    return pa.repeat(False, len(column))


def in_records(records: pa.Array, ids: Ids) -> pa.Array:
    """Which JSON texts have an id as a value."""
    texts = records.to_pylist()
    may = pc.match_substring_regex(records, "|".join(re.escape(json.dumps(item, ensure_ascii=False)[1:-1]) for item in ids))
    return pa.array(
        [bool(hit) and bool(ids & values(text)) for hit, text in zip(may.to_pylist(), texts, strict=True)], pa.bool_()
    )


def values(text: str) -> set[str]:
    """All values of a JSON text, as texts."""
    try:
        return {str(value) for value in leaves(json.loads(text))}
    except json.JSONDecodeError:
        return set()


def leaves(found: Any) -> Iterator[Any]:
    """Everything in a JSON value that is no list and no mapping."""
    stack = [found]
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list):
            stack += list(value.values() if isinstance(value, dict) else value)
        else:
            yield value


def said(text: str, ids: Collection[str]) -> bool:
    """Whether a text says an id: in quotes, as messages and lists have it; a long one wherever it stands."""
    return any(f"'{item}'" in text or f'"{item}"' in text or (len(item) >= LONG and item in text) for item in ids)


def ids_on_page(page: str) -> set[str]:
    """The ids of the items that a report names: it lists them for its own script."""
    listed = re.search(r'(?s)id="titles">(.*?)</script>', page)
    return set(json.loads(listed[1])["named"]) if listed else set()
