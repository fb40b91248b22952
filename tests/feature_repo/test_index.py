"""Index: the exact one is exact, the approximate one nearly, and both are on disk."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from feature_repo import nearest
from feature_repo.index import Foreign, Graph, Index, build, recall

Matrix = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
LINKED = Graph(from_items=0)


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


@pytest.mark.parametrize("width", [16, 17, 200], ids=["codes", "odd", "wide"])
def test_codes_find_nearly_all_also_with_uneven_lengths(tmp_path: Path, width: int) -> None:
    index = built(tmp_path / "x", vectors(3000, width), Graph())
    assert nearest.is_scan(index.tree)
    index.check()
    assert recall(index, vectors(50, width, seed=1), 10, 120) > 0.98


def test_long_vectors_are_what_codes_learn_from(tmp_path: Path) -> None:
    # one in a hundred is ten times as long: all answers are among them
    vector_ND = vectors(20_000, 64) / np.linalg.norm(vectors(20_000, 64), axis=1, keepdims=True)
    vector_ND[::100] *= 10
    index = built(tmp_path / "x", vector_ND, Graph())
    assert recall(index, vectors(50, 64, seed=1), 10, 40) > 0.98


def test_a_graph_is_built_of_many_items_and_finds_nearly_all_also_with_uneven_lengths(tmp_path: Path) -> None:
    index = built(tmp_path / "x", vectors(3000), Graph(from_items=3000, neighbours=16, breadth_build=100))
    assert not nearest.is_scan(index.tree)
    assert recall(index, vectors(50, seed=1)) > 0.97


@pytest.mark.parametrize("graph", [Graph(), LINKED], ids=["codes", "graph"])
def test_an_approximate_index_of_other_vectors_is_refused(tmp_path: Path, graph: Graph) -> None:
    index, other = built(tmp_path / "x", vectors(500), graph), built(tmp_path / "y", vectors(500, seed=9), graph)
    index.check()
    (tmp_path / "x" / "graph.faiss").write_bytes((tmp_path / "y" / "graph.faiss").read_bytes())
    other.check()
    with pytest.raises(Foreign, match="not built of these vectors"):
        Index(tmp_path / "x").check()


def test_equal_vectors_and_one_item_alone_have_codes_too(tmp_path: Path) -> None:
    index = built(tmp_path / "x", np.ones((40, 16), np.float32), Graph())
    assert index.approximate(vectors(1), 3)[0].shape == (1, 3)
    index = built(tmp_path / "y", vectors(1), Graph())
    assert index.approximate(vectors(2, seed=1), 3)[0].tolist() == [[0], [0]]


@pytest.mark.parametrize("graph", [Graph(), LINKED], ids=["codes", "graph"])
def test_scores_of_both_are_dot_products(tmp_path: Path, graph: Graph) -> None:
    index = built(tmp_path / "x", vectors(300), graph)
    (rows_exact, exact), (rows_found, found) = index.exact(vectors(3, seed=2), 5), index.approximate(vectors(3, seed=2), 5)
    assert np.array_equal(rows_exact, rows_found)
    assert np.allclose(exact, found, rtol=1e-5)


@pytest.mark.parametrize("graph", [Graph(), LINKED], ids=["codes", "graph"])
def test_building_again_gives_the_same_bytes(tmp_path: Path, graph: Graph) -> None:
    for name in ("x", "y"):
        built(tmp_path / name, vectors(500), graph)
    for file in ("items.arrow", "hashes.npy", "rows.npy", "vectors.npy", "graph.faiss", "index.json"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_more_than_there_are_gives_all(tmp_path: Path) -> None:
    index = built(tmp_path / "x", vectors(5), Graph())
    assert index.exact(vectors(1, seed=3), 9)[0].shape == index.approximate(vectors(1, seed=3), 9)[0].shape == (1, 5)


def test_without_a_graph_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"publish\.approximate = true"):
        built(tmp_path / "x", vectors(5)).approximate(vectors(1), 1)


def test_an_id_leads_to_its_row_also_where_hashes_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_repo.index.hashed", lambda ids: np.array([len(text) for text in ids], np.uint64))
    index = built(tmp_path / "x", vectors(120))
    assert index.rows_of(["i119", "i0", "i77", "nothing", "i12345678", ""]).tolist() == [119, 0, 77, -1, -1, -1]
    assert index.rows_of([]).tolist() == []


@pytest.mark.parametrize("graph", [Graph(), LINKED], ids=["codes", "graph"])
def test_a_mask_bounds_what_is_found(tmp_path: Path, graph: Graph) -> None:
    index = built(tmp_path / "x", vectors(2000), graph)
    mask_N = np.zeros(2000, np.bool_)
    mask_N[::3] = True
    row_QK, score_QK = index.approximate(vectors(20, seed=1), 10, 200, mask_N)
    exact_QK, _ = index.among(vectors(20, seed=1), np.flatnonzero(mask_N), 10)
    assert (row_QK % 3 == 0).all() and (np.diff(score_QK, axis=1) <= 0).all()
    assert np.mean([np.isin(wanted, found).mean() for wanted, found in zip(exact_QK, row_QK, strict=True)]) > 0.95
    rare_N = np.zeros(2000, np.bool_)
    rare_N[::20] = True
    row_QK, _ = index.approximate(vectors(20, seed=1), 10, 20, rare_N)
    assert row_QK.shape == (20, 10) and (row_QK % 20 == 0).all(), "as many more are looked at as the mask hides"
    few_N = np.zeros(2000, np.bool_)
    few_N[[5, 9]] = True
    assert index.approximate(vectors(1, seed=1), 10, 200, few_N)[0].shape[1] <= 2, "no row that is none"


@pytest.mark.parametrize("graph", [Graph(), LINKED], ids=["codes", "graph"])
def test_an_index_of_other_vectors_is_foreign_also_where_all_have_much_in_common(tmp_path: Path, graph: Graph) -> None:
    one, other = (built(tmp_path / f"{seed}", vectors(1000, seed=seed) + 5, graph) for seed in (1, 2))
    one.check()
    (one.folder / "graph.faiss").write_bytes((other.folder / "graph.faiss").read_bytes())
    with pytest.raises(Foreign, match="not built of these vectors"):
        Index(one.folder).check()


def test_codes_that_learned_from_a_few_very_long_vectors_are_their_own(tmp_path: Path) -> None:
    vector_ND = vectors(2000)
    vector_ND[5] *= 1e4
    built(tmp_path / "x", vector_ND, Graph()).check()


def test_neighbours_lie_side_by_side_in_the_graph_and_rows_stay_as_they_came(tmp_path: Path) -> None:
    # two clusters, their items in turn
    vector_ND = vectors(400) * 0.1
    vector_ND[::2, 0] += 20
    vector_ND[1::2, 1] += 20
    index = built(tmp_path / "x", vector_ND, LINKED)
    order_N, kept_ND = nearest.kept(index.tree, np.arange(400))
    assert sorted(order_N) == list(range(400)) and np.allclose(kept_ND, vector_ND[order_N], atol=0.02)
    assert (np.diff(order_N % 2) != 0).sum() < 10, "each cluster in one or a few pieces"
    assert index.item_ids[:3] == ["i0", "i1", "i2"]
    row_QK, _ = index.approximate(vector_ND[[6, 7]], 20)
    assert (row_QK[0] % 2 == 0).all() and (row_QK[1] % 2 == 1).all()


def test_a_graph_of_version_0_1_0_is_read_on(tmp_path: Path) -> None:
    vector_ND = vectors(400)
    index = built(tmp_path / "x", vector_ND, LINKED)
    wanted_QK, _ = index.approximate(vector_ND[:9], 5)
    bare = faiss.IndexHNSWSQ(16, faiss.ScalarQuantizer.QT_fp16, 32, faiss.METRIC_INNER_PRODUCT)
    bare.train(vector_ND)
    bare.add(vector_ND)
    faiss.write_index(bare, str(tmp_path / "x" / "graph.faiss"))
    about = tmp_path / "x" / "index.json"
    about.write_text(about.read_text().replace('"format": 3', '"format": 2'))
    old = Index(tmp_path / "x")
    old.check()
    assert np.array_equal(old.approximate(vector_ND[:9], 5)[0], wanted_QK)


def test_int8_takes_less_and_finds_nearly_as_much(tmp_path: Path) -> None:
    half = built(tmp_path / "half", vectors(3000), Graph(from_items=0, neighbours=16, breadth_build=100))
    byte = built(tmp_path / "byte", vectors(3000), Graph(from_items=0, neighbours=16, breadth_build=100, precision="int8"))
    byte.check()
    assert recall(byte, vectors(50, seed=1)) > 0.95
    sizes = [(index.folder / "graph.faiss").stat().st_size for index in (half, byte)]
    assert sizes[0] - sizes[1] > 3000 * 15


def test_an_attribute_that_is_a_list_is_found_by_each_of_its_values(tmp_path: Path) -> None:
    import pyarrow as pa

    from feature_repo.index import PAIRS, Described

    texts = {"a": "Action, Comedy", "b": "Comedy", "c": "Dark Comedy , Drama", "d": "Drama"}
    pairs = [[{"name": "title", "value": text}, {"name": "genres", "value": text}] for text in texts.values()]
    ids = [*texts, "without"]
    known = Described(
        item_ids=pa.array(list(texts)),
        attributes=pa.array(pairs, PAIRS),
        recent=pa.array([0] * 4, pa.int64()),
        lists={"genres": ","},
    )
    (tmp_path / "x").mkdir()
    build(tmp_path / "x", [(ids[:2], vectors(2)), (ids[2:], vectors(3))], 5, 16, None, known)
    index = Index(tmp_path / "x")

    def found(name: str, *values: str) -> str:
        return "".join(item_id for item_id, one in zip(ids, index.having(name, values), strict=True) if one)

    assert found("genres", "Comedy") == "ab"
    assert found("genres", "Dark Comedy") == "c"
    assert found("genres", "Drama", "Action") == "acd"
    assert found("genres", "Action, Comedy") == "a", "the whole text counts too"
    assert found("genres", "") == found("genres", ", ") == ""
    assert (found("title", "Comedy"), found("title", "Action, Comedy")) == ("b", "a"), "a title is no list, whatever it holds"


def test_attributes_and_recent_events_come_with_the_items_in_any_order(tmp_path: Path) -> None:
    import pyarrow as pa

    from feature_repo.index import NOTHING, PAIRS, Described

    pairs = [[{"name": "genre", "value": "x"}, {"name": "genre", "value": "y"}], [{"name": "title", "value": "t"}]]
    known = Described(item_ids=pa.array(["b", "a"]), attributes=pa.array(pairs, PAIRS), recent=pa.array([3, 4], pa.int64()))
    (tmp_path / "x").mkdir()
    build(tmp_path / "x", [(["a"], vectors(1)), (["b", "c"], vectors(2))], 3, 16, None, known)
    index = Index(tmp_path / "x")
    assert index.items["recent"].to_pylist() == [4, 3, 0]
    assert index.having("genre", ["y"]).tolist() == [False, True, False]
    assert index.having("title", ["nothing"]).tolist() == [False] * 3
    assert (index.attributes_of(0), index.attributes_of(2)) == ({"title": "t"}, {})
    with pytest.raises(KeyError):
        index.having("colour", ["red"])
    assert len(NOTHING.item_ids) == 0


def test_only_so_many_ids_are_remembered_and_all_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_repo.index.REMEMBERED", 10)
    index = built(tmp_path / "x", vectors(200))
    for _ in range(2):
        for start in range(0, 60, 7):
            rows = list(range(start, start + 7))
            ids = [index.id_of(row) for row in rows]
            assert index.rows_of([*ids, "who"]).tolist() == [*rows, -1]
            assert len(index.rows) <= 10 + 7 and len(index.names) <= 10 + 1 and "who" not in index.rows
