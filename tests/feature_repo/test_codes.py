"""Codes stand beside vectors under the same keys: written where they changed, gone with the space, the item, or who left."""

from pathlib import Path

import numpy as np

from feature_repo import codes, spaces
from feature_repo.reader import Reader, Space, open_store, settings
from feature_repo.stores import lease, open_writer
from feature_repo.strangers import delete_codes

IDS = ["x", "y", "z"]
CODES = np.array([[1, 200], [3, 4], [1, 200]])
NUMBERS = np.array([0, 0, 1])


def write(lake: Path, books: str = "b" * 16, space: str = "a" * 16, codes_NK: np.ndarray = CODES) -> int:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        return codes.write_codes(store, Reader.open(lake), space, books, "2026-01-01", IDS, codes_NK, NUMBERS)


def read(lake: Path, space: str = "a" * 16) -> list[codes.Coded | None]:
    return codes.read_codes(Reader.open(lake), space, [*IDS, "absent"])


def test_codes_are_read_as_they_were_written_and_only_changes_are_written(lake: Path) -> None:
    assert write(lake) == 3
    assert read(lake) == [([1, 200], 0, "b" * 16), ([3, 4], 0, "b" * 16), ([1, 200], 1, "b" * 16), None]
    assert write(lake) == 0
    changed = CODES.copy()
    changed[1, 0] = 9
    assert write(lake, codes_NK=changed) == 1
    assert write(lake, books="c" * 16, codes_NK=changed) == 3


def test_feast_s_own_reader_reads_them(lake: Path) -> None:
    write(lake)
    rows = open_store(lake).get_online_features(
        features=[f"item_codes:{name}" for name in codes.FIELDS], entity_rows=[{"item_id": "z", "space_id": "a" * 16}]
    )
    assert rows.to_dict() == {
        "item_id": ["z"], "space_id": ["a" * 16], "codes": [[1, 200]], "number": [1], "books_id": ["b" * 16]
    }  # fmt: skip


def test_codes_of_a_collected_space_and_of_a_forgotten_item_are_gone_and_others_stay(lake: Path) -> None:
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    for space_id in ("a" * 16, "d" * 16):
        write(lake, space=space_id)
        space = Space(space_id=space_id, recommender_id="r", ds="2026-01-01", width=2, codec="float32", items=3)
        with lease(store, "test"):
            spaces.stage(store, reader, space, [(IDS, np.ones((3, 2), np.float32))], only_changes=False)
    with lease(store, "test"):
        assert spaces.remove_space(store, "d" * 16) == 3
        spaces.forget(store, "y", "2026-01-01")
    assert read(lake, "d" * 16) == [None] * 4
    assert read(lake)[1] is None and read(lake)[0] is not None


def test_codes_and_vectors_of_a_key_do_not_remove_one_another(lake: Path) -> None:
    write(lake)
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    space = Space(space_id="a" * 16, recommender_id="r", ds="2026-01-01", width=2, codec="float32", items=3)
    with lease(store, "test"):
        spaces.stage(store, reader, space, [(IDS, np.ones((3, 2), np.float32))], only_changes=False)
        assert codes.remove_left(store, "a" * 16, ["x", "z"]) == 1
    assert [row is None for row in read(lake)] == [False, True, False, True]
    assert all(raw is not None for _, raw in reader.rows(space, IDS))


def test_a_store_without_codes_loses_nothing_and_fails_nothing(tmp_path: Path) -> None:
    store = open_writer(settings(tmp_path))
    with lease(store, "test"):
        delete_codes(store, [b"a key"])
