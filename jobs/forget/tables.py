"""Tables of the lake without an item: whole partitions rewritten at once, histories made shorter."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.forget.names import Ids, batches, named
from jobs.lake import arrivals, partitions

TABLES = ("items", "interactions", "sequences", "quarantine", "llm_embeddings", "item_embeddings", "item_codes", *arrivals.TABLES)


def forget_tables(lake: Path, ids: Ids) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """(rows removed by table, digests of the partitions before, and after)."""
    removed, inputs, outputs = dict[str, int](), dict[str, str](), dict[str, str]()
    for name in TABLES:
        for partition in partitions.committed(lake, name):
            before = partitions.read_commit(lake, name, partition)
            if gone := forget_partition(lake, name, partition, ids):
                removed[name] = removed.get(name, 0) + gone
                inputs[f"{name}/{partition}"] = before.digest
                outputs[f"{name}/{partition}"] = partitions.read_commit(lake, name, partition).digest
    return removed, inputs, outputs


def forget_partition(lake: Path, name: str, partition: str, ids: Ids) -> int:
    """Rewrites a partition without the items, at once, file by file; returns how many rows changed or went."""
    here, staged, changed = partitions.folder(lake, name, partition), [], 0
    before = partitions.read_commit(lake, name, partition)
    for file in before.files:
        rows = sum(pc.sum(named(batch, ids)).as_py() or 0 for batch in batches(here / file))
        changed += rows
        staged.append(rewritten(here / file, ids) if rows else here / file)
    if changed:
        partitions.commit_files(lake, name, partition, staged, over=before)
    return changed


def drop_leftovers(lake: Path, ids: Ids) -> None:
    """Deletes Parquet files that name an item and are no part of a table: what writers that were killed left behind."""
    for path in sorted(lake.rglob("*.parquet")):
        commit = path.parent / partitions.COMMIT
        live = {entry["name"] for entry in json.loads(commit.read_text())["files"]} if commit.exists() else set()
        if path.name not in live and any(pc.any(named(batch, ids)).as_py() for batch in batches(path)):
            path.unlink()


def rewritten(path: Path, ids: Ids) -> Path:
    """A copy of a Parquet file beside it, without the items."""
    aside = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.parquet")
    with pq.ParquetWriter(aside, pq.read_schema(path), compression="zstd") as writer:
        for batch in batches(path):
            writer.write_table(without(batch, ids))
    return aside


def without(batch: pa.RecordBatch, ids: Ids) -> pa.Table:
    """Rows without the items: whole rows go, but a user's history only loses its events."""
    rows = pa.Table.from_batches([batch])
    if "item_ids" not in batch.schema.names:
        return rows.filter(pc.invert(named(batch, ids)))
    histories = [shorter(row, ids) for row in rows.to_pylist()]
    return pa.Table.from_pylist([row for row in histories if row["item_ids"]], rows.schema)


def shorter(row: dict[str, Any], ids: Ids) -> dict[str, Any]:
    """A row of `sequences` without the items' events; the split falls between the same events as before."""
    kept = [number for number, item_id in enumerate(row["item_ids"]) if item_id not in ids]
    return row | {
        "item_ids": [row["item_ids"][number] for number in kept],
        "timestamps": [row["timestamps"][number] for number in kept],
        "train_end": sum(number < row["train_end"] for number in kept),
        "valid_end": sum(number < row["valid_end"] for number in kept),
    }
