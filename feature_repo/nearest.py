"""What finds candidates by dot product: short codes that are all looked at, or, for many items, a graph.

Codes are 4 bits a number (product quantisation, Jégou et al. 2011), many compared at once in registers (Quicker ADC, André et
al. 2019). Candidates are always scored again by their whole vectors. Shapes: N items, D width, Q queries, C candidates, S sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt

BLOCK = 262_144
"""Items taken at once: bounds the memory."""
CLUSTERS = 256
"""Groups of neighbours by which the graph is laid out in memory, at most."""
SAMPLE = 4_096
"""Vectors from which the codes' values are learned: faiss would take no more."""
SINGLE = 192
"""Widest vector of which each number has a code of its own; of wider ones two numbers share one, which finds as much."""
Matrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Parameters of the approximate index: 4-bit codes, or HNSW (Malkov and Yashunin 2018) where there are many items."""

    from_items: int = 2_000_000
    """Items from which a graph is built. For fewer, short codes that are all looked at find more, are made in seconds, not
    minutes, and take an eighth of the memory."""
    neighbours: int = 32
    """Links that an item has in the graph (HNSW's M)."""
    breadth_build: int = 200
    """Candidates while building (ef_construction)."""
    breadth_search: int = 250
    """Candidates while searching (of the graph: ef; of codes half as many): more is slower and finds more."""
    precision: Literal["float16", "int8"] = "float16"
    """Type of the vectors inside the graph, by which candidates are found; they are scored in full. int8 is half as large, and
    finds about a hundredth less."""
    threads: int = 1
    """One thread builds the same graph every time; more are faster, and find as well, but leave other bytes."""


def grown(vector_ND: Matrix, graph: Graph) -> Any:
    """faiss' index over all vectors."""
    faiss.omp_set_num_threads(graph.threads)
    return coded(vector_ND) if len(vector_ND) < graph.from_items else linked(vector_ND, graph)


def coded(vector_ND: Matrix) -> Any:
    """Codes of all vectors, in the order of the rows."""
    width = vector_ND.shape[1]
    each = 1 if width <= SINGLE or width % 2 else 2
    codes = faiss.IndexPQFastScan(width, width // each, 4, faiss.METRIC_INNER_PRODUCT)
    codes.train(sample(vector_ND))
    for start in range(0, len(vector_ND), BLOCK):
        codes.add(np.asarray(vector_ND[start : start + BLOCK]))
    return codes


def sample(vector_ND: Matrix) -> Matrix:
    """emb_SD, drawn with chances as the squared lengths: long vectors are what a dot product finds, and plain chances would leave
    most of the codes' values to the short ones (recall at 10 of 60 candidates: .947, so drawn .989)."""
    length_N = np.concatenate(
        [np.square(vector_ND[start : start + BLOCK]).sum(1, dtype=np.float64) for start in range(0, len(vector_ND), BLOCK)]
    )
    chance_N = length_N / total if (total := length_N.sum()) > 0 else None
    row_S = np.random.default_rng(1).choice(len(vector_ND), SAMPLE, p=chance_N)
    return np.ascontiguousarray(vector_ND[row_S])


def linked(vector_ND: Matrix, graph: Graph) -> Any:
    """The graph over all vectors, which lie in it side by side with their neighbours: a search then walks through near memory."""
    kind = faiss.ScalarQuantizer.QT_fp16 if graph.precision == "float16" else faiss.ScalarQuantizer.QT_8bit
    tree = faiss.IndexHNSWSQ(vector_ND.shape[1], kind, graph.neighbours, faiss.METRIC_INNER_PRODUCT)
    tree.hnsw.efConstruction = graph.breadth_build
    tree.train(np.asarray(vector_ND[:BLOCK]))
    named = faiss.IndexIDMap(tree)
    order_N = side_by_side(vector_ND)
    for start in range(0, len(vector_ND), BLOCK):
        row_N = order_N[start : start + BLOCK]
        named.add_with_ids(np.asarray(vector_ND[row_N]), row_N)
    return named


def side_by_side(vector_ND: Matrix) -> Rows:
    """All rows, those of one cluster (k-means) after each other."""
    clusters = min(CLUSTERS, len(vector_ND) // 100)
    if clusters < 2:
        return np.arange(len(vector_ND))
    means = faiss.Kmeans(vector_ND.shape[1], clusters, niter=8, max_points_per_centroid=100, seed=1)
    means.train(np.asarray(vector_ND))
    blocks = range(0, len(vector_ND), BLOCK)
    cluster_N = np.concatenate([means.assign(np.asarray(vector_ND[start : start + BLOCK]))[1] for start in blocks])
    return np.argsort(cluster_N, kind="stable")


def read(path: Path) -> Any:
    """What was written, mapped where it can be (codes are in memory)."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def is_scan(tree: Any) -> bool:
    """Whether all items are looked at, so that nothing is missed but by the shortness of codes."""
    return isinstance(tree, faiss.IndexPQFastScan)


def scored(count: int) -> int:
    """Candidates that are scored in full to find the best `count`: shorter vectors order them less well than they find them."""
    return 3 * count + 10


def candidates(tree: Any, query_QD: Matrix, count: int, breadth: int, mask_N: npt.NDArray[np.bool_] | None = None) -> Rows:
    """row_QC of what is found among the items of a mask, best first by shorter vectors, -1 after the last.

    `count`; of codes, which order less well than they find, half of `breadth` at least. All are to be scored in full.
    """
    query_QD = np.ascontiguousarray(query_QD, np.float32)
    faiss.omp_set_num_threads(1)
    if is_scan(tree):
        return scanned(tree, query_QD, max(count, breadth // 2), mask_N)
    count = min(tree.ntotal, count)
    search = faiss.SearchParametersHNSW(efSearch=max(breadth, count))
    if mask_N is not None:
        search.sel = selector = faiss.IDSelectorBitmap(np.packbits(mask_N, bitorder="little"))
        assert selector is not None  # it has to live as long as the search
    found: Rows = tree.search(query_QD, count, params=search)[1]
    return found


def scanned(tree: Any, query_QD: Matrix, count: int, mask_N: npt.NDArray[np.bool_] | None) -> Rows:
    """`candidates` of codes: with a mask, as many more are found as it hides, and those are left out."""
    if mask_N is None:
        found: Rows = tree.search(query_QD, min(tree.ntotal, count))[1]
        return found
    left = max(1, int(mask_N.sum()))
    found = tree.search(query_QD, min(tree.ntotal, int(1.5 * count * tree.ntotal / left)))[1]
    found[~mask_N[found] | (found < 0)] = -1
    return np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), 1)[:, :count]


def kept(tree: Any, place_S: Rows) -> tuple[Rows, Matrix]:
    """(row_S, emb_SD) of some places, the vectors as short as they are kept."""
    row_S, held = place_S, holder(tree)
    if isinstance(tree, faiss.IndexIDMap):  # a graph of version 0.1.0 has its vectors in the order of the rows
        row_S = np.array([tree.id_map.at(int(place)) for place in place_S])
    return row_S, np.stack([held.reconstruct(int(place)) for place in place_S])


def shortened(tree: Any, emb_SD: Matrix) -> Matrix:
    """emb_SD as they would be kept: codes may lie far from a vector that was built into them, but not from its own code."""
    held, emb_SD = holder(tree), np.ascontiguousarray(emb_SD, np.float32)
    short_SD: Matrix = held.sa_decode(held.sa_encode(emb_SD))
    return short_SD


def holder(tree: Any) -> Any:
    """The part of an approximate index that keeps the vectors."""
    bare = faiss.downcast_index(tree.index) if isinstance(tree, faiss.IndexIDMap) else tree
    return bare if is_scan(bare) else faiss.downcast_index(bare.storage)
