"""Vectors -> rows of `item_codes`: what has codes keeps them, the rest is coded; items of the same codes get a number each.

Shapes: N items, D width, K books.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jobs.codes.books import Source, Version
from jobs.codes.config import Config
from jobs.lake import partitions
from jobs.lake.items import without_forgotten
from jobs.lake.tables import ITEM_CODES, item_embeddings
from jobs.lake.tensors import as_matrix, read_catalogue, read_embeddings
from jobs.run import InputError, Run
from models.behaviour.codes import Books

Chunk = tuple[pa.Array, pa.Array, Tensor]
"""Item ids, content hashes, emb_ND."""


def chunks(config: Config, source: Source) -> Iterator[Chunk]:
    """The vectors, at most `pass_items` at once."""
    lake = config.run.lake
    if source.table == "llm_embeddings":
        catalogue = read_catalogue(config.run)
        ids = pa.array(catalogue.item_ids, pa.string())
        for start in range(0, len(ids), config.pass_items):
            hashes = catalogue.content_hashes.slice(start, config.pass_items)
            yield ids.slice(start, config.pass_items), hashes, read_embeddings(config.run, source.encoder_id, hashes)
        return
    partition = f"space={source.space_id}/ds={config.run.ds}"
    width = partitions.read_schema(lake, source.table, partition).field("embedding").type.list_size
    columns = ("item_id", "embedding", "content_hash")
    rows = partitions.scan(lake, item_embeddings(width), partition, columns, min(config.pass_items, 65_536))
    for batch in without_forgotten(lake, rows):
        if batch.num_rows:
            yield batch["item_id"], batch["content_hash"], as_matrix(batch["embedding"])


def sample(config: Config, source: Source) -> Tensor:
    """emb_ND of at most about `training.sample` items, chosen by their ids: the same on every run."""
    total = sum(len(ids) for ids, _, _ in chunks(config, source))
    if not total:
        raise InputError(f"{source.name} has no item to code: run project, or embed, for {config.run.ds} first")
    share, found = min(1.0, config.training.sample / total), []
    for ids, _, emb_ND in chunks(config, source):
        mine = [number for number, item_id in enumerate(ids.to_pylist()) if zlib.crc32(item_id.encode()) < share * 2**32]
        found.append(emb_ND[mine].float())
    return torch.cat(found)


def codes_of(run: Run, books_id: str) -> pa.Table | None:
    """The newest codes of some books at or before ds; None where there are none."""
    under = f"books={books_id}"
    dates = [one for one in partitions.committed(run.lake, ITEM_CODES.name, under) if one <= f"{under}/ds={run.ds}"]
    return partitions.read(run.lake, ITEM_CODES, dates[-1]) if dates else None


def coded(config: Config, source: Source, used: Version, model: Books) -> tuple[pa.Table, dict[str, int]]:
    """Rows by item id, and how many are new, changed and kept."""
    before = codes_of(config.run, used.books_id)
    ids, hashes, codes, counts = [], [], [], {"new": 0, "changed": 0, "kept": 0}
    for some_ids, some_hashes, emb_ND in chunks(config, source):
        code_NK, kept_N, known_N = from_before(before, some_ids, some_hashes, len(model.entry_KCD))
        lacks = ~kept_N
        if lacks.any():
            made_NK = model.encode(emb_ND[torch.from_numpy(lacks)].to(model.mean_D.device))
            code_NK[lacks] = made_NK.cpu().numpy()
        counts["kept"] += int(kept_N.sum())
        counts["changed"] += int((lacks & known_N).sum())
        counts["new"] += int((lacks & ~known_N).sum())
        ids.append(some_ids.cast(pa.string()))
        hashes.append(some_hashes.cast(pa.string()))
        codes.append(code_NK)
    table = pa.table({"item_id": pa.chunked_array(ids), "content_hash": pa.chunked_array(hashes)})
    order = pc.sort_indices(table["item_id"])
    code_NK = np.concatenate(codes)[order.to_numpy()]
    table = table.take(order)
    number_N = numbered(code_NK, table, before)
    return as_rows(table, code_NK, number_N, used.books_id), counts


def from_before(
    before: pa.Table | None, ids: pa.Array, hashes: pa.Array, books: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """code_NK of items that have codes (zeros for the others), which of them keep theirs, and which had any."""
    code_NK = np.zeros((len(ids), books), np.int32)
    if before is None or not before.num_rows:
        nothing = np.zeros(len(ids), bool)
        return code_NK, nothing, nothing
    place = pc.index_in(ids.cast(pa.string()), value_set=before["item_id"].combine_chunks())
    known_N = pc.is_valid(place).to_numpy(zero_copy_only=False)
    row_N = pc.fill_null(place, 0).to_numpy(zero_copy_only=False)
    same_N = pc.equal(before["content_hash"].combine_chunks().take(pa.array(row_N)), hashes.cast(pa.string()))
    kept_N = known_N & same_N.to_numpy(zero_copy_only=False)
    code_NK[kept_N] = matrix(before)[row_N[kept_N]]
    return code_NK, kept_N, known_N


def numbered(code_NK: npt.NDArray[np.int32], table: pa.Table, before: pa.Table | None) -> npt.NDArray[np.int32]:
    """number_N: kept with the codes; a new item of codes that others have, or had before, gets the next one, by id."""
    number_N = np.full(len(code_NK), -1, np.int32)
    old_NK = matrix(before) if before is not None and before.num_rows else np.zeros((0, code_NK.shape[1]), np.int32)
    group_M = np.unique(np.concatenate([old_NK, code_NK]), axis=0, return_inverse=True)[1].reshape(-1)
    next_G = np.zeros(int(group_M.max(initial=-1)) + 1, np.int32)
    if before is not None and before.num_rows:
        old_N = before["number"].to_numpy()
        np.maximum.at(next_G, group_M[: len(old_NK)], old_N + 1)
        place = pc.index_in(table["item_id"].combine_chunks(), value_set=before["item_id"].combine_chunks())
        row_N = pc.fill_null(place, 0).to_numpy(zero_copy_only=False)
        stays_N = pc.is_valid(place).to_numpy(zero_copy_only=False) & (old_NK[row_N] == code_NK).all(1)
        number_N[stays_N] = old_N[row_N[stays_N]]
    new_M = np.flatnonzero(number_N < 0)
    group_M = group_M[len(old_NK) :][new_M]
    order = np.argsort(group_M, kind="stable")
    first = np.searchsorted(group_M[order], group_M[order])
    number_N[new_M[order]] = next_G[group_M[order]] + np.arange(len(order)) - first
    return number_N


def matrix(rows: pa.Table) -> npt.NDArray[np.int32]:
    """code_NK of a table of codes."""
    flat: Any = pc.list_flatten(rows["codes"].combine_chunks()).to_numpy(zero_copy_only=False)
    code_NK: npt.NDArray[np.int32] = flat.reshape(rows.num_rows, -1).astype(np.int32)
    return code_NK


def as_rows(table: pa.Table, code_NK: npt.NDArray[np.int32], number_N: npt.NDArray[np.int32], books_id: str) -> pa.Table:
    """Rows of `item_codes`."""
    flat = pa.FixedSizeListArray.from_arrays(pa.array(code_NK.ravel(), pa.int32()), code_NK.shape[1])
    return pa.table(
        {
            "item_id": table["item_id"],
            "books_id": pa.repeat(books_id, len(code_NK)),
            "codes": flat.cast(pa.list_(pa.int32())),
            "number": pa.array(number_N, pa.int32()),
            "content_hash": table["content_hash"],
        }
    )
