"""Routing: the ends are the two models, a router that knows nothing gains nothing, and one that knows is told from it."""

import dataclasses
import math

import pytest
import torch

from models.behaviour.data import histories
from models.judge.routing import SHARES, routed, routes, weak_groups, weakness


def users(count: int = 600, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """main_U, other_U and who is weak: the other model is better for these, the main one for all others."""
    generator = torch.Generator().manual_seed(seed)
    weak_U = (torch.rand(count, generator=generator) < 0.3).double()
    main_U = torch.rand(count, generator=generator, dtype=torch.float64) * (1 - 0.6 * weak_U)
    other_U = torch.rand(count, generator=generator, dtype=torch.float64) * (0.4 + 0.6 * weak_U)
    return main_U, other_U, weak_U


def test_shares_of_nothing_and_of_all_are_the_two_models_bit_by_bit() -> None:
    main_U, other_U, weak_U = users()
    assert torch.equal(routed(main_U, other_U, weak_U, 0.0), main_U)
    assert torch.equal(routed(main_U, other_U, weak_U, 1.0), other_U)
    found = {(one.signal, one.share): one for one in routes(main_U, other_U, {"weak": weak_U})}
    for share, mean in ((0.0, float(main_U.mean())), (1.0, float(other_U.mean()))):
        end = found["weak", share]
        assert end.ndcg == end.random == pytest.approx(mean, abs=1e-12)
        assert end.oracle == pytest.approx(mean, abs=1e-12)
        assert end.gain == end.low == end.high == 0


def test_a_router_that_knows_beats_the_random_one_and_one_that_does_not_is_not_told_to() -> None:
    main_U, other_U, weak_U = users()
    noise_U = torch.rand(len(main_U), generator=torch.Generator().manual_seed(9))
    found = {(one.signal, one.share): one for one in routes(main_U, other_U, {"knows": weak_U, "noise": noise_U})}
    assert found["knows", 0.3].low > 0
    assert found["noise", 0.3].low <= 0 <= found["noise", 0.3].high
    assert found["knows", 0.3].over == pytest.approx(found["knows", 0.3].ndcg - float(main_U.mean()))
    assert found["knows", 0.3].over_low > 0
    # whoever is routed loses as much: no better than chance, and surely worse than not to route
    worse = {one.share: one for one in routes(main_U, main_U - 0.1, {"noise": noise_U})}[0.5]
    assert worse.over_high < 0 and worse.low <= 0
    assert found["knows", 0.3].ndcg > max(found["knows", 0.0].ndcg, found["knows", 1.0].ndcg)


def test_the_oracle_is_never_below_a_router_and_the_random_one_lies_between_the_ends() -> None:
    main_U, other_U, weak_U = users()
    for one in routes(main_U, other_U, {"weak": weak_U}):
        assert one.oracle >= one.ndcg - 1e-12
        expected = (1 - one.share) * float(main_U.mean()) + one.share * float(other_U.mean())
        assert one.random == pytest.approx(expected, abs=1e-3)
    assert [one.share for one in routes(main_U, other_U, {"weak": weak_U})] == list(SHARES)


def logs() -> object:
    """User 0: items 1, 1, 2 (popular); user 1: item 3 alone; user 2: items 1, 2, 1, 4."""
    return histories(
        offsets=[0, 5, 8, 14], items=[1, 1, 2, 1, 2, 3, 1, 2, 1, 2, 1, 4, 3, 3], timestamps=range(14),
        train_end=[3, 1, 4], valid_end=[4, 2, 5], catalogue=4,
    )  # fmt: skip


def test_signals_by_hand_come_from_train_rows_and_the_validation_rank() -> None:
    found = weakness(logs(), torch.tensor([0, 1, 2]), torch.tensor([1.0, math.nan, 0.0]))  # type: ignore[arg-type]
    assert found["length"].tolist() == [-3, -1, -4]
    assert found["sparsity"].tolist() == [1 - 2 / 4, 1 - 1 / 4, 1 - 3 / 4]
    ones, twos = math.log1p(4), math.log1p(2)
    assert found["popularity"][0] == pytest.approx(-(2 * ones + twos) / 3)
    assert found["popularity"][1] == pytest.approx(-math.log1p(1))
    # a user without a validation event stands in the middle, not at an end
    assert found["validation"].tolist() == [-1.0, 0.0, 0.0]


def test_without_any_validation_event_nobody_can_be_told_weak() -> None:
    with pytest.raises(ValueError, match="no user has a validation event"):
        weakness(logs(), torch.tensor([0, 1]), torch.full((2,), math.nan))  # type: ignore[arg-type]


def test_later_events_change_no_signal_of_history() -> None:
    changed = dataclasses.replace(logs(), items_N=torch.tensor([1, 1, 2, 4, 4, 3, 4, 4, 1, 2, 1, 4, 2, 2]))  # type: ignore[type-var]
    valid_U = torch.zeros(3)
    one, other = (weakness(some, torch.tensor([0, 1, 2]), valid_U) for some in (logs(), changed))  # type: ignore[arg-type]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_weak_are_described_beside_the_others() -> None:
    ndcg_U = torch.tensor([0.0, 0.0, 1.0, 0.5, 1.0])
    found = weak_groups(ndcg_U, {"length": torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0])}, share=0.4)
    assert found == {"length": {"users": 2.0, "ndcg": 0.0, "others": pytest.approx(2.5 / 3), "without_hit": 1.0}}
