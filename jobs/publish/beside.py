"""What a publishing writes beside vectors: attributes online, and the offline history; what serves before it; its clock."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from feature_repo import index, offline, spaces
from feature_repo.index import Graph
from feature_repo.reader import CODECS, Pointer, Reader, Space
from feature_repo.stores import Store
from jobs.engines import online
from jobs.lake import arrivals, partitions
from jobs.lake.items import live_items
from jobs.lake.tables import ITEMS
from jobs.run import Refused

log = logging.getLogger("jobs.publish")
ROW_BYTES = 570
"""Bytes of a row in Redis besides its vector, with its place on the list of its space: of ids of 32 characters, measured."""
ROW_GROUP = 64
"""Chunks of a row group of the offline tables."""


class Clock:
    """Seconds of each step, told as they end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, step: str, what: str) -> None:
        """Ends a step and says what it did."""
        now = time.monotonic()
        self.seconds[step] = round(now - self.last, 4)
        self.last = now
        log.info("%s: %s in %.2f s", step, what, self.seconds[step])


def refuse_full(lake: Path, store: Store, reader: Reader, space: Space) -> None:
    """Raises Refused where the store has no room for what is to be staged, beside all spaces that are there already; NotPublished
    where it would make room by itself.

    Rows that are there (a delta, or a publishing that was killed) take nothing more; how many is told by a sample.
    """
    free, sample = store.free_bytes(), online.sample_ids(lake, space, 1_000)
    if free is None:
        log.info("the online store does not tell what room it has: nothing looked whether the space fits")
    if free is None or not sample:
        return
    absent = sum(raw is None for _, raw in reader.rows(space, sample)) / len(sample)
    needs = int(space.items * absent * (ROW_BYTES + space.width * np.dtype(CODECS[space.codec][1]).itemsize))
    if needs > free:
        raise Refused(
            f"the online store has {free:,} bytes free, and {round(space.items * absent):,} rows of space {space.space_id} take "
            f"about {needs:,}: run collect, which removes spaces past their grace period (collect.grace_days), or give it more "
            "memory. It holds the space that serves, the one before, and the one that is staged (docs/sizing.md)"
        )


def serves(lake: Path, space_id: str, ds: str) -> bool:
    """Whether a snapshot in a space is what serves."""
    with online.refusals():
        return points_to(spaces.current(Reader.open(lake)), space_id, ds)


def points_to(pointer: Pointer | None, space_id: str, ds: str) -> bool:
    """Whether a pointer names a snapshot in a space."""
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
    rows = chunk_rows * ROW_GROUP
    with online.offline_home(lake) as home:
        offline.prepare(home)
        offline.write_vectors(
            home, space, online.chunks(lake, online.partition_of(space.space_id, space.ds), rows, arrived=False)
        )
        offline.write_items(home, space.ds, catalogue(lake, space.ds, rows))


def recall(lake: Path, space: Space, graph: Graph | None) -> float:
    """Recall at 10 of the approximate index, items as queries; 0 without one."""
    if graph is None:
        return 0.0
    built = online.open_index(lake, space)
    rows = np.linspace(0, space.items - 1, min(256, space.items)).astype(np.int64)
    return index.recall(built, np.asarray(built.vector_ND[rows]), 10, graph.breadth_search)
