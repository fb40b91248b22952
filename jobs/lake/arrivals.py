"""What arrived since the snapshot that serves: items new or changed in the source, beside the tables of the nights.

No night reads these tables, so a night ends with the same bytes whether hours brought items before it or not. Serving reads the
vectors of the snapshot with those that arrived laid over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import partitions, tables
from jobs.lake.items import live_items, without_forgotten
from jobs.lake.tables import ITEMS, Table

ARRIVING_ITEMS = dataclasses.replace(ITEMS, name="arriving_items", grain="item new or changed since the snapshot of ds")
LLM = "arriving_llm_embeddings"
VECTORS = "arriving_embeddings"
TABLES = (ARRIVING_ITEMS.name, LLM, VECTORS)
"""Partitions `ds=DATE`, `encoder=ID/ds=DATE/…` and `space=ID/ds=DATE`, where DATE is that of the snapshot."""


def llm_embeddings(width: int, dtype: str = "float16") -> Table:
    """Rows of LLM embeddings of texts that arrived."""
    return dataclasses.replace(tables.llm_embeddings(width, dtype), name=LLM)


def item_embeddings(width: int) -> Table:
    """Rows of vectors of items that arrived, in one space."""
    return dataclasses.replace(tables.item_embeddings(width), name=VECTORS)


def digest(lake: Path, name: str, partition: str) -> str:
    """Digest of a partition of these tables; "" where nothing arrived."""
    return partitions.read_commit(lake, name, partition).digest if partitions.is_committed(lake, name, partition) else ""


def laid_over(
    lake: Path, table: Table, over: Table, partition: str, batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Batches of a partition of `table` without the items that have a row in the same partition of `over`; then those rows."""
    if not digest(lake, over.name, partition):
        yield from batches
        return
    first = next(batches, None)
    columns = over.schema.names if first is None else first.schema.names
    # Spark says of nested fields that they are never null: one form for both
    schema = pa.schema([over.schema.field(name) for name in columns])
    arrived = [batch.cast(schema) for batch in partitions.scan(lake, over, partition, columns)]
    ids = pa.array([item_id for batch in arrived for item_id in batch["item_id"].to_pylist()], pa.string())
    for batch in (first, *batches) if first is not None else ():
        yield batch.filter(pc.invert(pc.is_in(batch["item_id"], ids))).cast(schema)
    yield from arrived


def catalogue(lake: Path, snapshot: str, columns: tuple[str, ...], rows: int) -> Iterator[pa.RecordBatch]:
    """Live items of a snapshot with those that arrived since; `columns` must name `item_id`."""
    base = live_items(lake, snapshot, columns, rows)
    yield from without_forgotten(lake, laid_over(lake, ITEMS, ARRIVING_ITEMS, snapshot, base))


def drop(lake: Path, space_id: str, ds: str) -> None:
    """Takes what arrived for a snapshot out of a space: a night that publishes it anew starts without."""
    partitions.drop(lake, VECTORS, f"space={space_id}/ds={ds}")


def drop_before(lake: Path, ds: str) -> None:
    """Removes what arrived for snapshots older than that of `ds`: a night has taken it in since."""
    for name in TABLES:
        for partition in partitions.committed(lake, name):
            dates = [part.removeprefix("ds=") for part in partition.split("/") if part.startswith("ds=")]
            if dates and dates[0] < ds:
                partitions.drop(lake, name, partition)
