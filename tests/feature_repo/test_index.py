"""Index: the exact one is exact, the approximate one nearly, and both are on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from feature_repo.index import Graph, Index, build, recall

Matrix = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def vectors(items: int, width: int = 16, seed: int = 0) -> Matrix:
    generator = np.random.default_rng(seed)
    # lengths that differ, as those of popular and rare items do: the hard case for dot products
    return (generator.normal(size=(items, width)) * generator.lognormal(sigma=0.7, size=(items, 1))).astype(np.float32)


def built(folder: Path, vector_ND: Matrix, graph: Graph | None = None) -> Index:
    folder.mkdir()
    ids = [f"i{number}" for number in range(len(vector_ND))]
    chunks = [(ids[start : start + 100], vector_ND[start : start + 100]) for start in range(0, len(ids), 100)]
    build(folder, chunks, len(ids), vector_ND.shape[1], graph)
    return Index(folder)


def test_the_exact_index_equals_a_full_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_repo.index.BLOCK", 64)
    vector_ND, query_QD = vectors(500), vectors(7, seed=1)
    row_QK, score_QK = built(tmp_path / "x", vector_ND).exact(query_QD, 10)
    full_QN = query_QD @ vector_ND.T
    assert np.array_equal(row_QK, np.argsort(-full_QN, axis=1, kind="stable")[:, :10])
    assert np.allclose(score_QK, np.take_along_axis(full_QN, row_QK, 1), rtol=1e-5)


def test_the_approximate_index_finds_nearly_all_also_with_uneven_lengths(tmp_path: Path) -> None:
    index = built(tmp_path / "x", vectors(3000), Graph(neighbours=16, breadth_build=100))
    assert recall(index, vectors(50, seed=1)) > 0.97


def test_scores_of_both_are_dot_products(tmp_path: Path) -> None:
    index = built(tmp_path / "x", vectors(300), Graph())
    (rows_exact, exact), (rows_found, found) = index.exact(vectors(3, seed=2), 5), index.approximate(vectors(3, seed=2), 5)
    assert np.array_equal(rows_exact, rows_found)
    assert np.allclose(exact, found, rtol=1e-5)


def test_building_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("x", "y"):
        built(tmp_path / name, vectors(500), Graph())
    for file in ("items.arrow", "hashes.npy", "rows.npy", "vectors.npy", "graph.faiss", "index.json"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_more_than_there_are_gives_all(tmp_path: Path) -> None:
    index = built(tmp_path / "x", vectors(5), Graph())
    assert index.exact(vectors(1, seed=3), 9)[0].shape == index.approximate(vectors(1, seed=3), 9)[0].shape == (1, 5)


def test_without_a_graph_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"publish\.approximate = true"):
        built(tmp_path / "x", vectors(5)).approximate(vectors(1), 1)
