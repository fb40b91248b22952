"""Figures of codes, by hand."""

import pytest
import torch

from models.behaviour import code_figures


def test_use_of_a_book_by_hand() -> None:
    (even,) = code_figures.usage(torch.tensor([[0], [1], [2], [3]]), 4)
    assert even == {"entropy": 2.0, "gini": 0.0, "dead": 0.0}
    (one,) = code_figures.usage(torch.tensor([[2], [2], [2], [2]]), 4)
    assert one == {"entropy": 0.0, "gini": 0.75, "dead": 3.0}


def test_collisions_count_items_that_share_all_their_codes() -> None:
    assert code_figures.collisions(torch.tensor([[1, 2], [1, 2], [1, 3], [1, 2]])) == {"share": 0.75, "largest": 3.0}


def test_a_code_that_is_the_category_tells_all_of_it_and_a_constant_tells_nothing() -> None:
    category_N = torch.tensor([0, 0, 1, 1, 2, -1])
    code_NK = torch.stack([torch.tensor([7, 7, 3, 3, 5, 0]), torch.zeros(6, dtype=torch.int64)], dim=1)
    assert code_figures.information(code_NK, category_N) == pytest.approx([1.0, 0.0], abs=1e-9)


def test_without_known_categories_nothing_is_told() -> None:
    assert code_figures.information(torch.zeros(3, 2, dtype=torch.int64), torch.full((3,), -1)) == []


def test_neighbours_are_kept_by_the_vectors_themselves_and_not_by_noise() -> None:
    emb_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    noise_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    assert code_figures.neighbours_kept(emb_ND, 3 * emb_ND) == 1.0
    assert code_figures.neighbours_kept(emb_ND, noise_ND) < 0.1
    assert code_figures.error(emb_ND, emb_ND) == 0.0
    assert code_figures.error(emb_ND, emb_ND.mean(0).expand(300, 8)) == pytest.approx(1.0)
