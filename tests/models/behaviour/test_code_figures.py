"""Figures of codes, by hand."""

import math

import pytest
import torch

from models.behaviour import code_figures


def test_use_of_a_book_by_hand() -> None:
    (even,) = code_figures.usage(torch.tensor([[0], [1], [2], [3]]), 4)
    assert even == {"entropy": 2.0, "gini": 0.0, "dead": 0.0}
    (one,) = code_figures.usage(torch.tensor([[2], [2], [2], [2]]), 4)
    assert one == {"entropy": 0.0, "gini": 0.75, "dead": 3.0}


def test_use_of_a_book_that_is_used_unevenly_by_hand() -> None:
    """Shares 3/4 and 1/4 of two: 2 - 3/4 log2(3) bits; their mean difference over twice their mean is 1/4."""
    first, second = code_figures.usage(torch.tensor([[0, 1], [0, 1], [0, 0], [1, 1]]), 2)
    assert first == second == pytest.approx({"entropy": 2 - 0.75 * math.log2(3), "gini": 0.25, "dead": 0.0})


def test_collisions_count_items_that_share_all_their_codes() -> None:
    assert code_figures.collisions(torch.tensor([[1, 2], [1, 2], [1, 3], [1, 2]])) == {"share": 0.75, "largest": 3.0}


def test_a_code_that_is_the_category_tells_all_of_it_and_a_constant_tells_nothing() -> None:
    category_N = torch.tensor([0, 0, 1, 1, 2, -1])
    code_NK = torch.stack([torch.tensor([7, 7, 3, 3, 5, 0]), torch.zeros(6, dtype=torch.int64)], dim=1)
    assert code_figures.information(code_NK, category_N) == pytest.approx([1.0, 0.0], abs=1e-9)


def test_a_code_that_tells_half_of_a_category_by_hand() -> None:
    """Codes a a a b of kinds x x y y: 1 + .8113 - 1.5 bits of 1. The other book is the kind."""
    told = code_figures.information(torch.tensor([[0, 5], [0, 5], [0, 6], [1, 6]]), torch.tensor([0, 0, 1, 1]))
    assert told == pytest.approx([0.31127812, 1.0])
    # of four kinds a code of one bit tells a half
    assert code_figures.information(torch.tensor([[0], [0], [1], [1]]), torch.tensor([0, 1, 2, 3])) == pytest.approx([0.5])


def test_without_known_categories_nothing_is_told() -> None:
    assert code_figures.information(torch.zeros(3, 2, dtype=torch.int64), torch.full((3,), -1)) == []


def test_neighbours_are_kept_by_the_vectors_themselves_and_not_by_noise() -> None:
    emb_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    noise_ND = torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    assert code_figures.neighbours_kept(emb_ND, 3 * emb_ND) == 1.0
    assert code_figures.neighbours_kept(emb_ND, noise_ND) < 0.1
    assert code_figures.error(emb_ND, emb_ND) == 0.0
    assert code_figures.error(emb_ND, emb_ND.mean(0).expand(300, 8)) == pytest.approx(1.0)


def test_neighbours_kept_by_hand() -> None:
    """Five directions in a plane, by angle; codes move the last one. The two nearest of each, and those that codes find."""

    def at(*degrees: float) -> torch.Tensor:
        angle_N = torch.tensor(degrees).deg2rad()
        return torch.stack([angle_N.cos(), angle_N.sin()], 1)

    exact, coded = at(0, 10, 100, 130, 300), at(0, 10, 100, 130, 195)
    # 300 is 60 from 0 and 70 from 10; 195 is 65 from 130 and 95 from 100
    near = {0: ({1, 4}, {1, 2}), 1: ({0, 4}, {0, 2}), 2: ({3, 1}, {3, 1}), 3: ({2, 1}, {2, 4}), 4: ({0, 1}, {3, 2})}
    expected = sum(len(one & other) for one, other in near.values()) / 10
    assert code_figures.neighbours_kept(exact, coded, k=2) == pytest.approx(expected)


def test_of_items_of_one_text_any_are_the_nearest() -> None:
    """Forty texts of 25 items each: whichever ten of the 24 others come first is as good."""
    generator = torch.Generator().manual_seed(0)
    emb_ND = torch.randn(40, 8, generator=generator).repeat(25, 1)
    read_ND = emb_ND + 1e-6 * torch.randn(1000, 8, generator=generator)
    assert code_figures.neighbours_kept(emb_ND, read_ND) == 1.0
    # a twin that codes put elsewhere is still lost
    read_ND[:500] = emb_ND[:500].roll(1, 0)
    assert code_figures.neighbours_kept(emb_ND, read_ND) < 0.9
