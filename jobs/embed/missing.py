"""Which texts of a shard have no embedding yet: keys of 16 bytes alone stay in memory for the whole catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.embed.config import Config
from jobs.embed.tally import Tally
from jobs.lake import arrivals, partitions
from jobs.lake.items import without_forgotten


def missing(config: Config, snapshot: str, encoder_id: str, tally: Tally) -> Iterator[pa.Table]:
    """Parts of the shard's texts without an embedding, in the snapshot's order; memory holds keys and one part."""
    lake = config.run.lake
    known = committed(lake, encoder_id, config)
    waiting: list[pa.Table] = []
    columns = ("item_id", "content_hash", "attributes")
    for batch in without_forgotten(lake, partitions.scan(lake, config.items, snapshot, columns)):
        rows = pa.Table.from_batches([batch])
        rows = first_of_each(rows.filter(in_shard(keys_of(rows["content_hash"]), config)))
        keys = keys_of(rows["content_hash"])
        embedded = pc.is_in(keys, known)
        tally.known += pc.sum(embedded).as_py() or 0
        waiting.append(rows.filter(pc.invert(embedded)))
        known = pa.concat_arrays([known, keys.filter(pc.invert(embedded))])
        while sum(table.num_rows for table in waiting) >= config.part_items:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, config.part_items)
            waiting = [whole.slice(config.part_items)]
    rest = pa.concat_tables(waiting) if waiting else None
    if rest is not None and rest.num_rows:
        yield rest


def committed(lake: Path, encoder_id: str, config: Config) -> pa.FixedSizeBinaryArray:
    """Keys of the shard's texts that the encoder has embedded in any partition."""
    found = [pa.array([], pa.binary(16))]
    for table, partition in places(lake, encoder_id, config):
        for file in partitions.read_files(lake, table, partition, ["content_hash"]):
            for batch in file.iter_batches(columns=["content_hash"]):
                keys = keys_of(batch["content_hash"])
                found.append(keys.filter(in_shard(keys, config)))
    return pa.concat_arrays(found)


def places(lake: Path, encoder_id: str, config: Config) -> Iterator[tuple[str, str]]:
    """(table, partition) of what an encoder has embedded; a night knows nothing of what arrived between two of them."""
    for table in ("llm_embeddings", arrivals.LLM) if config.arriving else ("llm_embeddings",):
        for partition in partitions.committed(lake, table, f"encoder={encoder_id}"):
            yield table, partition


def keys_of(hashes: pa.Array | pa.ChunkedArray) -> pa.FixedSizeBinaryArray:
    """The 16 bytes that each content hash writes in hexadecimal: they alone stay in memory for the whole catalogue."""
    written = bytes.fromhex("".join(hashes.to_pylist()))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(hashes), [None, pa.py_buffer(written)])


def in_shard(keys: pa.FixedSizeBinaryArray, config: Config) -> pa.Array:
    """Which keys belong to the shard, by their first four bytes."""
    head_N = np.frombuffer(keys.buffers()[1], ">u4", len(keys) * 4, keys.offset * 16)[::4]
    return pa.array(head_N % config.shards == config.shard)


def first_of_each(rows: pa.Table) -> pa.Table:
    """One row of each text, the first."""
    place = pa.array(np.arange(rows.num_rows))
    firsts = pa.table({"hash": rows["content_hash"], "place": place}).group_by("hash").aggregate([("place", "min")])
    return rows.take(np.sort(firsts["place_min"].to_numpy()))
