"""Codes online, beside the vectors of the space that serves, and in Feast's offline history."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from feature_repo import codes, offline
from feature_repo.feature_definitions import define
from feature_repo.reader import Reader, end_of, offline_folder, open_store, settings
from feature_repo.stores import alone, lease, open_writer
from jobs.codes.books import Source
from jobs.codes.coding import matrix
from jobs.codes.config import Config
from jobs.engines import online
from jobs.lake.store import refuse_without_services
from jobs.run import InputError


def publish(config: Config, rows: pa.Table, books_id: str, source: Source) -> int:
    """Writes the rows that are not online as they are, and removes those of items that left; how many were written.

    Raises InputError where another space serves: codes stand beside vectors, and go with them.
    """
    lake = config.run.lake
    refuse_without_services(lake, "codes")
    serving = online.served(Reader.open(lake))
    if serving.space_id != source.space_id:
        raise InputError(f"space {serving.space_id} serves, the codes are of space {source.space_id}: run publish first, or set "
                         "codes.publish to false")  # fmt: skip
    with online.refusals():
        with alone(settings(lake), "codes", config.lease_wait_s):
            open_store(lake).apply(list(define(offline_folder(lake))))
        store, reader = open_writer(settings(lake)), Reader.open(lake)
        with lease(store, "codes", config.lease_wait_s):
            written = 0
            for start in range(0, rows.num_rows, config.chunk_rows):
                some = rows.slice(start, config.chunk_rows)
                numbers = some["number"].to_numpy()
                ids = some["item_id"].to_pylist()
                written += codes.write_codes(
                    store, reader, source.space_id, books_id, config.run.ds, ids, matrix(some).astype(np.int64), numbers
                )  # fmt: skip
            codes.remove_left(store, source.space_id, rows["item_id"].to_pylist())
    with online.offline_home(lake) as home:
        write_offline(home, rows, books_id, source.space_id, config.run.ds)
    return written


def write_offline(home: Path, rows: pa.Table, books_id: str, space_id: str, ds: str) -> None:
    """The codes as they were at the end of ds."""
    offline.prepare(home)
    table = pa.table(
        {
            "item_id": rows["item_id"],
            "space_id": pa.repeat(space_id, rows.num_rows),
            "codes": rows["codes"],
            "number": rows["number"],
            "books_id": pa.repeat(books_id, rows.num_rows),
            "event_timestamp": offline.moments(end_of(ds), rows.num_rows),
        }
    )
    offline.write(home, "item_codes", f"{space_id}-{ds}", [table])
