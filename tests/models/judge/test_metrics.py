"""Ranks and metrics: ties and broken scores favour nobody, differences are paired, negatives never move."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

from models.judge.metrics import (
    by_rank,
    draw_negatives,
    full_ranks,
    popularity_leak,
    sampled_ranks,
    spearman,
    table_ranks,
)

NAN, INF = math.nan, math.inf


def scores(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[-INF, *row] for row in rows])


# ------------------------------------------------------------------------------------------------------------------ ranks


def test_metrics_equal_those_of_scikit_learn() -> None:
    scores_BV = torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    scores_BV[:, 0] = -INF
    target_B = torch.randint(1, 31, (50,), generator=torch.Generator().manual_seed(1))
    relevant = np.zeros((50, 30))
    relevant[np.arange(50), target_B.numpy() - 1] = 1
    found = by_rank(full_ranks(scores_BV, target_B), k=10)
    public = scores_BV[:, 1:].numpy()
    assert float(found["ndcg"].mean()) == pytest.approx(ndcg_score(relevant, public, k=10), abs=1e-9)
    assert float(found["mrr"].mean()) == pytest.approx(label_ranking_average_precision_score(relevant, public), abs=1e-9)
    best = np.argsort(-public, axis=1)[:, :10]
    assert float(found["hr"].mean()) == np.mean((best == target_B.numpy()[:, None] - 1).any(1))


def test_a_model_that_scores_all_items_alike_gains_nothing_by_the_order_of_the_table() -> None:
    """METHOD 5.6: with a double argsort the position in the table decides, and the positive, put first, wins."""
    rank_B2 = full_ranks(scores([0.5] * 101, [0.5] * 101), torch.tensor([1, 101]))
    assert rank_B2.tolist() == [[1.0, 101.0], [1.0, 101.0]]
    assert sampled_ranks(torch.zeros(1), torch.zeros(1, 100)).tolist() == [[1.0, 101.0]]
    assert by_rank(rank_B2)["hr"].tolist() == pytest.approx([10 / 101] * 2)
    naive = (-torch.zeros(101)).argsort(stable=True).argsort()[0] + 1
    assert int(naive) == 1


def test_a_rank_is_the_first_and_the_last_place_of_its_tied_block() -> None:
    assert full_ranks(scores([3.0, 2.0, 2.0, 2.0, 1.0]), torch.tensor([3])).tolist() == [[2.0, 4.0]]


def test_tying_ones_best_nineteen_gains_no_hit() -> None:
    """At the block's middle, place 10, each of them would be a hit: a tenth of a hit rate more for nothing."""
    generator = torch.Generator().manual_seed(0)
    scores_BV = torch.randn(2000, 101, generator=generator)
    scores_BV[:, 0] = -INF
    target_B = torch.randint(1, 101, (2000,), generator=generator)
    tied_BV = scores_BV.clone()
    tied_BV.scatter_(1, scores_BV.topk(19).indices, 9.0)
    plain, tied = (by_rank(full_ranks(some_BV, target_B)) for some_BV in (scores_BV, tied_BV))
    for metric in ("hr", "ndcg", "mrr"):
        # the block's mean is what breaking its ties by chance gives: 2,000 cases tell a third more from nothing
        assert float(tied[metric].mean()) == pytest.approx(float(plain[metric].mean()), rel=0.2)
    middle = (full_ranks(tied_BV, target_B).mean(1) <= 10).double().mean()
    assert float(middle) > 1.5 * float(plain["hr"].mean())


@pytest.mark.parametrize(("first", "last"), [(1, 1), (10, 10), (11, 11), (3, 5), (8, 12), (1, 30), (11, 14)])
def test_metrics_of_a_block_are_means_over_its_places(first: int, last: int) -> None:
    found = by_rank(torch.tensor([[float(first), float(last)]]))
    places = range(first, last + 1)
    assert float(found["hr"]) == pytest.approx(np.mean([place <= 10 for place in places]))
    assert float(found["ndcg"]) == pytest.approx(np.mean([(place <= 10) / np.log2(place + 1) for place in places]))
    assert float(found["mrr"]) == pytest.approx(np.mean([1 / place for place in places]))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [1, 2])
def test_a_score_that_is_not_finite_is_refused_wherever_it_stands(bad: float, place: int) -> None:
    """METHOD 5.6: NaN compares false with everything, so a NaN positive would be ranked first."""
    broken = scores([1.0, 2.0, 3.0])
    broken[0, place] = bad
    with pytest.raises(ValueError, match="not finite"):
        full_ranks(broken, torch.tensor([1]))
    with pytest.raises(ValueError, match="not finite"):
        sampled_ranks(broken[:, place], broken[:, 3:])
    with pytest.raises(ValueError, match="not finite"):
        sampled_ranks(broken[:, 3], broken[:, 1:3])


def test_masked_items_stand_below_all_others_and_a_masked_target_is_refused() -> None:
    masked = scores([1.0, -INF, 3.0])
    hidden = torch.tensor([[True, False, True, False]])
    assert full_ranks(masked, torch.tensor([1]), hidden).tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match="masked"):
        full_ranks(masked, torch.tensor([2]), hidden)


@pytest.mark.parametrize("target", [-1, 0, 4])
def test_a_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match=r"out of 1\.\.3"):
        full_ranks(scores([1.0, 2.0, 3.0]), torch.tensor([target]))
    with pytest.raises(ValueError, match=r"out of 1\.\.3"):
        table_ranks(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([target]))


def test_ranks_made_in_blocks_equal_ranks_over_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    table_VD = torch.randint(-2, 3, (200, 4), generator=generator).float()  # small integers: many exact ties
    user_BD = torch.randint(-2, 3, (30, 4), generator=generator).float()
    target_B = torch.randint(1, 200, (30,), generator=generator)
    whole_BV = user_BD @ table_VD.T
    whole_BV[:, 0] = -INF
    monkeypatch.setattr("models.judge.metrics.SCORES", 30 * 17)
    assert torch.equal(table_ranks(user_BD, table_VD, target_B), full_ranks(whole_BV, target_B))


@pytest.mark.parametrize("scores", [20, 10_000])
def test_items_to_leave_out_are_no_rivals_in_whatever_block_they_lie(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    monkeypatch.setattr("models.judge.metrics.SCORES", scores)
    generator = torch.Generator().manual_seed(0)
    user_BD, table_VD = torch.randn(5, 8, generator=generator), torch.randn(40, 8, generator=generator)
    target_B = torch.tensor([1, 39, 7, 20, 3])
    hidden_BL = torch.tensor([[0, 2, 3, 39], [0, 0, 0, 1], [0, 0, 0, 0], [20, 21, 22, 23], [0, 1, 2, 30]])
    whole_BV = (user_BD @ table_VD.T).scatter(1, hidden_BL, -torch.inf)
    whole_BV[:, 0] = -torch.inf
    whole_BV.scatter_(1, target_B[:, None], (user_BD * table_VD[target_B]).sum(1, keepdim=True))
    masked_BV = whole_BV == -torch.inf
    assert torch.equal(table_ranks(user_BD, table_VD, target_B, hidden_BL), full_ranks(whole_BV, target_B, masked_BV))


def test_equal_vectors_tie_however_their_scores_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    row_1D = torch.randn(1, 200, generator=generator)
    table_VD = torch.cat([torch.zeros(1, 200), row_1D.repeat(99, 1)])
    rank_B = table_ranks(torch.randn(5, 200, generator=generator), table_VD, torch.tensor([1, 50, 99, 2, 3]))
    assert rank_B.tolist() == [[1.0, 99.0]] * 5


@pytest.mark.parametrize("where", ["user", "table"])
def test_a_vector_that_is_not_finite_is_refused(where: str) -> None:
    user_BD, table_VD = torch.ones(2, 3), torch.ones(5, 3)
    {"user": user_BD, "table": table_VD}[where][1, 1] = NAN
    with pytest.raises(ValueError, match="not finite"):
        table_ranks(user_BD, table_VD, torch.tensor([1, 2]))


# -------------------------------------------------------------------------------------------------------------- negatives


def keys(seen: dict[int, list[int]], catalogue: int) -> torch.Tensor:
    return torch.tensor(sorted(user * (catalogue + 1) + item for user, items in seen.items() for item in items))


def test_negatives_are_the_same_at_every_call_and_never_the_users_own_items() -> None:
    """METHOD 5.6: the reference draws them anew at every call, so that no two figures can be compared."""
    seen = {0: [1, 2, 3], 1: [7], 2: [5, 9]}
    asked = torch.tensor([3, 7, 9]), keys(seen, 12), torch.tensor([0, 1, 2]), 12, 400
    torch.manual_seed(1)
    first_CN = draw_negatives(*asked, seed=7)
    torch.manual_seed(2)
    assert torch.equal(first_CN, draw_negatives(*asked, seed=7))
    assert not torch.equal(first_CN, draw_negatives(*asked, seed=8))
    for row, items in seen.items():
        assert set(first_CN[row].tolist()) == set(range(1, 13)) - set(items)


def test_a_user_who_touched_everything_still_never_gets_the_target_as_negative() -> None:
    drawn_CN = draw_negatives(torch.tensor([2]), keys({0: [1, 2, 3]}, 3), torch.tensor([0]), 3, 50, seed=0)
    assert set(drawn_CN.flatten().tolist()) == {1, 3}


def test_negatives_are_uniform() -> None:
    drawn_CN = draw_negatives(torch.tensor([1]), keys({0: [1]}, 5), torch.tensor([0]), 5, 40_000, seed=0)
    counts = torch.bincount(drawn_CN.flatten(), minlength=6)[2:]
    assert (counts / 40_000 - 0.25).abs().max() < 0.02


# ------------------------------------------------------------------------------------------------------------------- leaks


def test_embeddings_that_carry_popularity_are_found_out_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    count_N = torch.poisson(torch.rand(600, generator=generator) * 50, generator=generator)
    text_NE = torch.randn(600, 20, generator=generator)
    leaky_NE = text_NE + count_N.log1p()[:, None] * torch.randn(1, 20, generator=generator)
    assert popularity_leak(text_NE, count_N).r2 < 0.05
    leak = popularity_leak(leaky_NE, count_N)
    assert leak.r2 > 0.8
    assert leak.spearman > 0.8


def test_a_catalogue_nobody_touched_leaks_nothing() -> None:
    leak = popularity_leak(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(50))
    assert (leak.r2, leak.spearman) == (0.0, 0.0)


def test_too_few_items_for_the_leak_test_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        popularity_leak(torch.randn(6, 2), torch.ones(6))


def test_rank_correlation_gives_ties_their_mean_rank() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 20.0, 5.0])
    ranks_a, ranks_b = np.array([1, 2.5, 2.5, 4]), np.array([2, 3.5, 3.5, 1])
    assert spearman(a, b) == pytest.approx(np.corrcoef(ranks_a, ranks_b)[0, 1])
