"""What a publishing writes beside vectors: attributes online, and the offline history; and what serves before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from feature_repo import offline, spaces
from feature_repo.reader import Reader, Space, offline_folder
from feature_repo.stores import Store
from jobs.engines import online
from jobs.lake import arrivals, partitions
from jobs.lake.items import live_items
from jobs.lake.tables import ITEMS

ROW_GROUP = 64
"""Chunks of a row group of the offline tables."""


def serves(lake: Path, space_id: str, ds: str) -> bool:
    """Whether a snapshot in a space is what serves."""
    with online.refusals():
        pointer = spaces.current(Reader.open(lake))
    return pointer is not None and (pointer.space_id, pointer.ds) == (space_id, ds)


def write_attributes(lake: Path, store: Store, reader: Reader, ds: str, rows: int, *, arriving: bool) -> int:
    """Brings `item_attributes` up to the catalogue's; returns how many items changed."""
    return sum(
        spaces.write_attributes(store, reader, items.to_pylist(), ds) for items in catalogue(lake, ds, rows, arriving=arriving)
    )


def catalogue(lake: Path, ds: str, rows: int, *, arriving: bool = False) -> Iterator[pa.Table]:
    """The items of the snapshot in bounded tables, without forgotten ones; with what arrived since where asked for."""
    columns = ("item_id", "attributes", "content_hash")
    snapshot = partitions.latest(lake, ITEMS.name, ds)
    for batch in arrivals.catalogue(lake, snapshot, columns, rows) if arriving else live_items(lake, snapshot, columns, rows):
        yield pa.Table.from_batches([batch])


def write_offline(lake: Path, space: Space, chunk_rows: int) -> None:
    """The history of vectors and items, as Feast's offline store reads it."""
    home, rows = Path(offline_folder(lake)), chunk_rows * ROW_GROUP
    offline.prepare(home)
    offline.write_vectors(home, space, online.chunks(lake, online.partition_of(space.space_id, space.ds), rows, arrived=False))
    offline.write_items(home, space.ds, catalogue(lake, space.ds, rows))
