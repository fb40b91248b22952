"""Spaces: rows that must not be served are found before anything is written."""

from __future__ import annotations

import numpy as np
import pytest

from feature_repo.spaces import Chunk, inspect
from feature_repo.strangers import outside

GOOD_ND = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def changed(row: int, value: float) -> Chunk:
    emb_ND = GOOD_ND.copy()
    emb_ND[row] = value
    return ["d", "e", "f"], emb_ND


@pytest.mark.parametrize(
    ("chunk", "complaint"),
    [
        ((["d", "e", "f"], GOOD_ND[:, :3]), r"vectors of shape \(3, 3\) for 3 items: the space is 4 wide"),
        ((["d", "e"], GOOD_ND), r"vectors of shape \(3, 4\) for 2 items"),
        (changed(1, np.nan), "1 items have a value that is not finite as float16, for example 'e'"),
        (changed(2, -np.inf), "not finite as float16, for example 'f'"),
        (changed(0, 1e5), "not finite as float16, for example 'd'"),
        (changed(0, 0.0), "nothing but zeros as float16, for example 'd'"),
        (changed(0, 1e-9), "nothing but zeros as float16, for example 'd'"),
        ((["d", "", "f"], GOOD_ND), "an item id is empty"),
        ((["d", "d", "f"], GOOD_ND), "1 item ids stand more than once"),
        ((["d", "b", "a"], GOOD_ND), "2 item ids stand more than once"),
    ],
)
def test_a_row_that_must_not_be_served_is_named_also_in_a_later_chunk(chunk: Chunk, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        inspect([(["a", "b", "c"], GOOD_ND), chunk], 4, "float16")


def test_a_space_without_items_is_refused() -> None:
    for nothing in ([], [([], GOOD_ND[:0])]):
        with pytest.raises(ValueError, match="no items: run project first"):
            inspect(nothing, 4, "float32")


def test_ids_that_are_not_in_a_space_are_found_by_their_hashes() -> None:
    hash_N = inspect([(["a", "B", "ü"], GOOD_ND)], 4, "float32")
    assert outside(["a", "b", "ü", "u", "B", ""], hash_N) == ["b", "u", ""]
