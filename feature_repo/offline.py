"""Feast's offline tables: Parquet files with an event timestamp, one a snapshot, for retrieval as of a point in time.

A file is on the disk before it has its name, and its name before `write` returns: a power cut leaves the old file or the new one.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import json
import os
import uuid
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo.feature_definitions import CATALOGUE
from feature_repo.reader import CODECS, Pointer, Space, end_of

MOMENT = pa.field("event_timestamp", pa.timestamp("us", "UTC"))
TABLES = {
    "item_embedding": pa.schema(
        [
            ("item_id", pa.string()),
            ("space_id", pa.string()),
            ("vector", pa.list_(pa.float32())),
            ("vector_f16", pa.binary()),
            MOMENT,
        ]
    ),
    "serving_pointer": pa.schema(
        [
            ("catalogue", pa.string()),
            *[(name, pa.string()) for name in ("space_id", "recommender_id", "ds", "codec", "previous", "index", "withheld")],
            *[(name, pa.int64()) for name in ("width", "items", "sequence")],
            MOMENT,
        ]
    ),
    "item_tombstone": pa.schema([("item_id", pa.string()), ("forgotten_at", pa.timestamp("us", "UTC")), MOMENT]),
    "item_attributes": pa.schema(
        [
            ("item_id", pa.string()),
            ("names", pa.list_(pa.string())),
            ("values", pa.list_(pa.string())),
            ("content_hash", pa.string()),
            MOMENT,
        ]
    ),
    "item_codes": pa.schema(
        [
            ("item_id", pa.string()),
            ("space_id", pa.string()),
            ("codes", pa.list_(pa.int64())),
            ("number", pa.int64()),
            ("books_id", pa.string()),
            MOMENT,
        ]
    ),
    "user_history": pa.schema(
        [("user_id", pa.string()), ("item_ids", pa.list_(pa.string())), ("timestamps", pa.list_(pa.int64())), MOMENT]
    ),
}


def prepare(home: Path) -> None:
    """Makes every table's folder, with a file of no rows so that Feast knows its columns."""
    for name, schema in TABLES.items():
        if not (home / name / "empty.parquet").exists():
            write(home, name, "empty", [schema.empty_table()])


def write(home: Path, name: str, file: str, parts: Iterable[pa.Table]) -> None:
    """Replaces one file of a table at once; memory holds one part."""
    make_folder(home / name)
    for leftover in (home / name).glob(f".{file}-*"):  # of a writer that was killed
        leftover.unlink(missing_ok=True)
    aside = home / name / f".{file}-{uuid.uuid4().hex[:8]}"
    with pq.ParquetWriter(aside, TABLES[name], compression="zstd", compression_level=1) as writer:
        for part in parts:
            writer.write_table(part.select(TABLES[name].names).cast(TABLES[name]))
    sync(aside)
    aside.replace(home / name / f"{file}.parquet")
    sync(home / name)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # file systems that keep no folders in memory say that there is nothing to sync
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """A folder with those above it, as far as they are missing, their names on the disk."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in made:
        sync(place.parent)


def moments(moment: dt.datetime, rows: int) -> pa.Array:
    """One timestamp for every row."""
    return pa.repeat(pa.scalar(moment, MOMENT.type), rows)


def write_vectors(home: Path, space: Space, chunks: Iterable[tuple[Sequence[str], npt.NDArray[np.float32]]]) -> None:
    """The vectors of a space at the end of its snapshot, as the online store has them."""

    def part(ids: Sequence[str], vector_ND: npt.NDArray[np.float32]) -> pa.Table:
        packed = np.ascontiguousarray(vector_ND.astype(CODECS[space.codec][1]))
        float32 = space.codec == "float32"
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(packed.ravel()), space.width).cast(pa.list_(pa.float32()))
        nothing = pa.nulls(len(ids))
        return pa.table(
            {
                "item_id": pa.array(ids, pa.string()),
                "space_id": pa.repeat(space.space_id, len(ids)),
                "vector": vectors if float32 else nothing,
                "vector_f16": nothing if float32 else pa.array([row.tobytes() for row in packed], pa.binary()),
                MOMENT.name: moments(end_of(space.ds), len(ids)),
            }
        )

    write(home, "item_embedding", f"{space.space_id}-{space.ds}", (part(*chunk) for chunk in chunks))


def write_items(home: Path, ds: str, batches: Iterable[pa.Table]) -> None:
    """The attributes of a snapshot's items, from tables of (item_id, attributes, content_hash)."""

    def part(items: pa.Table) -> pa.Table:
        pairs = items["attributes"].combine_chunks()
        pairs = pa.concat_arrays([pairs]) if isinstance(pairs, pa.Array) else pa.concat_arrays(pairs.chunks)
        texts = {}
        for name, field in (("names", "name"), ("values", "value")):
            texts[name] = pa.ListArray.from_arrays(pairs.offsets, pairs.values.field(field))
        columns = {"item_id": items["item_id"], "content_hash": items["content_hash"]}
        return pa.table({**columns, **texts, MOMENT.name: moments(end_of(ds), items.num_rows)})

    write(home, "item_attributes", ds, (part(items) for items in batches))


def write_pointer(home: Path, pointer: Pointer) -> None:
    """One write of the pointer: what served when."""
    values = dataclasses.asdict(pointer.space) | {"catalogue": CATALOGUE, "sequence": pointer.sequence}
    values["previous"] = json.dumps(dataclasses.asdict(pointer.previous), sort_keys=True) if pointer.previous else ""
    values["withheld"] = "[]"  # history keeps no id that was forgotten
    values[MOMENT.name] = pointer.written
    write(home, "serving_pointer", f"{pointer.sequence:08d}", [pa.Table.from_pylist([values], TABLES["serving_pointer"])])


def forget(home: Path, item_ids: Collection[str]) -> int:
    """Rewrites every file that names one of the items, without it; returns how many rows went. Histories lose it from lists."""
    removed = 0
    for path in sorted(home.glob("*/*.parquet")):
        name = path.parent.name
        rows = pq.read_table(path)
        if name == "user_history":
            kept = pa.Table.from_pylist([without(row, item_ids) for row in rows.to_pylist()], rows.schema)
        elif "item_id" in rows.schema.names and name != "item_tombstone":
            kept = rows.filter(pc.invert(pc.is_in(rows["item_id"], pa.array(sorted(item_ids), pa.string()))))
        else:
            continue
        if not kept.equals(rows):
            removed += max(1, rows.num_rows - kept.num_rows)
            write(home, name, path.stem, [kept])
    return removed


def without(row: dict[str, list[object]], item_ids: Collection[str]) -> dict[str, list[object]]:
    """A user's history without some items."""
    pairs = [pair for pair in zip(row["item_ids"], row["timestamps"], strict=True) if pair[0] not in item_ids]
    return row | {"item_ids": [pair[0] for pair in pairs], "timestamps": [pair[1] for pair in pairs]}
