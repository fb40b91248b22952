"""Nearest neighbours in a space by dot product: exact, and approximate with hnswlib; written once, swapped with the space.

A folder holds item_ids.json, vectors.npy and, for the approximate one, graph.bin. Shapes: N items, D width, Q queries, K found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import hnswlib
import numpy as np
import numpy.typing as npt

IDS, VECTORS, GRAPH = "item_ids.json", "vectors.npy", "graph.bin"
BLOCK = 262_144
"""Items scored at once by the exact index: bounds its memory."""
Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Parameters of the approximate index (HNSW, Malkov and Yashunin 2018)."""

    neighbours: int = 32
    """Links an item (M)."""
    breadth_build: int = 200
    """Candidates while building (ef_construction)."""
    breadth_search: int = 200
    """Candidates while searching (ef): more is slower and finds more."""
    threads: int = 1
    """One thread builds the same graph every time; more are faster, and find as well, but leave other bytes."""


def build(folder: Path, chunks: Iterable[tuple[list[str], Matrix]], items: int, width: int, graph: Graph | None) -> None:
    """Writes the index of a space into an empty folder; the exact one holds one chunk in memory, the graph all vectors."""
    vector_ND = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=np.float32, shape=(items, width))
    item_ids: list[str] = []
    for ids, chunk_ND in chunks:
        vector_ND[len(item_ids) : len(item_ids) + len(ids)] = chunk_ND
        item_ids += ids
    vector_ND.flush()
    (folder / IDS).write_text(json.dumps(item_ids))
    if graph is not None:
        # measured on vectors of uneven lengths, 20,000 x 64: dot products 1.00 recall, the reduction to distances below 0.2
        tree = hnswlib.Index(space="ip", dim=width)
        tree.init_index(max_elements=items, M=graph.neighbours, ef_construction=graph.breadth_build, random_seed=42)
        for start in range(0, items, BLOCK):
            tree.add_items(vector_ND[start : start + BLOCK], num_threads=graph.threads)
        tree.save_index(str(folder / GRAPH))


class Index:
    """An index read from a folder; vectors stay on disk until they are touched."""

    def __init__(self, folder: Path) -> None:
        self.item_ids: list[str] = json.loads((folder / IDS).read_text())
        self.vector_ND: Matrix = np.load(folder / VECTORS, mmap_mode="r")
        self.folder = folder
        self.tree: hnswlib.Index | None = None

    def exact(self, query_QD: Matrix, count: int) -> tuple[npt.NDArray[np.int64], Matrix]:
        """(row_QK, score_QK) of the items with the largest dot products, best first; K is `count` or all items there are."""
        count = min(count, len(self.item_ids))
        row_QK = np.empty((len(query_QD), 0), np.int64)
        score_QK = np.empty((len(query_QD), 0), np.float32)
        for start in range(0, len(self.item_ids), BLOCK):
            block_QN = query_QD.astype(np.float32) @ np.asarray(self.vector_ND[start : start + BLOCK]).T
            rows_QN = np.broadcast_to(np.arange(start, start + block_QN.shape[1]), block_QN.shape)
            score_QK, row_QK = best(np.hstack([score_QK, block_QN]), np.hstack([row_QK, rows_QN]), count)
        return row_QK, score_QK

    def approximate(self, query_QD: Matrix, count: int, breadth: int = 200) -> tuple[npt.NDArray[np.int64], Matrix]:
        """As `exact`, from the graph; some of the best may be missed. Raises ValueError where no graph was built."""
        count = min(count, len(self.item_ids))
        if self.tree is None:
            if not (self.folder / GRAPH).exists():
                raise ValueError(f"{self.folder} has no approximate index: publish with publish.approximate = true")
            self.tree = hnswlib.Index(space="ip", dim=self.vector_ND.shape[1])
            self.tree.load_index(str(self.folder / GRAPH))
        self.tree.set_ef(max(breadth, count))
        query_QD = query_QD.astype(np.float32)
        found_QK, _ = self.tree.knn_query(query_QD, k=count, num_threads=1)
        row_QK = found_QK.astype(np.int64)
        score_QK = np.einsum("qd,qkd->qk", query_QD, np.asarray(self.vector_ND[row_QK]))
        score_QK, row_QK = best(score_QK, row_QK, count)
        return row_QK, score_QK


def best(score_QN: Matrix, row_QN: npt.NDArray[np.int64], count: int) -> tuple[Matrix, npt.NDArray[np.int64]]:
    """The `count` largest scores of each query with their rows, best first; ties in the order of the rows."""
    if score_QN.shape[1] > count:
        at_QK = np.argpartition(-score_QN, count - 1, axis=1)[:, :count]
        score_QN, row_QN = np.take_along_axis(score_QN, at_QK, 1), np.take_along_axis(row_QN, at_QK, 1)
    order_QK = np.lexsort((row_QN, -score_QN), axis=1)
    return np.take_along_axis(score_QN, order_QK, 1), np.take_along_axis(row_QN, order_QK, 1)


def recall(index: Index, query_QD: Matrix, count: int = 10, breadth: int = 200) -> float:
    """Share of the exact neighbours that the approximate index finds."""
    exact_QK, _ = index.exact(query_QD, count)
    found_QK, _ = index.approximate(query_QD, count, breadth)
    return float(np.mean([np.isin(wanted, found).mean() for wanted, found in zip(exact_QK, found_QK, strict=True)]))
