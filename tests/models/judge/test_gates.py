"""The gate's test: true losses pass seldom at every size, equals pass once the sample that it asks for is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from models.judge.gates import Comparison, above, by_user, compare

DRAWS = 2000
Floats = NDArray[np.float64]


def judged(challenger_U: Floats, other_U: Floats, margin: float = 0.02, **more: int) -> Comparison:
    """A comparison in which each user has one case."""
    return compare(challenger_U, other_U, np.ones(len(other_U), dtype=np.int64), margin=margin, **more)


def hits(won: int, lost: int, both: int = 0, users: int = 1000) -> tuple[Floats, Floats]:
    """Challenger and champion: users whom only one of them serves, or both."""
    kinds = np.arange(users)
    kept = kinds < both
    challenger_U = kept | ((kinds >= both) & (kinds < both + won))
    champion_U = kept | ((kinds >= both + won) & (kinds < both + won + lost))
    return challenger_U.astype(float), champion_U.astype(float)


@pytest.mark.parametrize("users", [40, 400, 4000])
def test_a_model_that_seldom_loses_a_hit_does_not_pass_for_want_of_losses(users: int) -> None:
    """A plain interval passes a true loss of just the margin here in 30 to 80 draws of 100: nobody differs in most of them."""
    rng = np.random.default_rng(users)
    champion_RU = (rng.random((DRAWS, users)) < 0.05).astype(float)
    challenger_RU = champion_RU * (rng.random((DRAWS, users)) >= 0.1)
    assert above(challenger_RU, champion_RU, 0.9).mean() <= 0.025


@pytest.mark.parametrize("users", [30, 300, 3000])
def test_two_models_that_serve_different_users_keep_the_level_too(users: int) -> None:
    rng = np.random.default_rng(users)
    champion_RU = (rng.random((DRAWS, users)) < 0.1).astype(float)
    challenger_RU = (rng.random((DRAWS, users)) < 0.1 * 0.9).astype(float)
    assert above(challenger_RU, champion_RU, 0.9).mean() <= 0.025


def test_a_true_loss_of_a_third_among_forty_users_does_not_pass() -> None:
    rng = np.random.default_rng(0)
    champion_RU = (rng.random((DRAWS, 40)) < 0.05).astype(float)
    challenger_RU = champion_RU * (rng.random((DRAWS, 40)) >= 0.3)
    assert above(challenger_RU, champion_RU, 0.98).sum() == 0


def test_an_equal_challenger_passes_four_times_in_five_with_the_users_that_were_asked_for() -> None:
    def draw(rng: np.random.Generator, draws: int, users: int) -> tuple[Floats, Floats]:
        both_RU, one_RU, other_RU = (rng.random((draws, users)) < rate for rate in (0.15, 0.05, 0.05))
        return (both_RU | one_RU).astype(float), (both_RU | other_RU).astype(float)

    rng = np.random.default_rng(1)
    first = [values_RU[0] for values_RU in draw(rng, 1, 20_000)]
    needed = judged(*first, margin=0.1).needed
    assert 1000 < needed < 10_000
    assert 0.78 < above(*draw(rng, 2000, int(needed)), 0.9).mean() < 0.87
    assert above(*draw(rng, 1000, int(needed / 4)), 0.9).mean() < 0.5


@pytest.mark.parametrize(("rate", "margin"), [(0.2, 0.2), (0.2, 0.1), (0.05, 0.2)])
def test_the_sample_asked_for_is_enough_too_where_few_users_have_most_of_the_hits(rate: float, margin: float) -> None:
    """By the variance alone 461 users were asked for at a rate of .2 and a margin of 20 %, and 68 of 100 equals passed there."""

    def draw(rng: np.random.Generator, draws: int, users: int) -> tuple[Floats, Floats]:
        cases_RU = np.maximum(1, np.exp(rng.normal(0.8, 1.2, (draws, users)))).astype(np.int64)
        chance_RU = rng.beta(4 * rate, 4 * (1 - rate), (draws, users))
        weight_RU = np.minimum(1.0, 10 / cases_RU)
        one_RU, other_RU = (rng.binomial(cases_RU, chance_RU) * weight_RU for _ in range(2))
        return one_RU, other_RU

    rng = np.random.default_rng(3)
    first = [values_RU[0] for values_RU in draw(rng, 1, 50_000)]
    needed = int(judged(*first, margin=margin).needed)
    assert above(*draw(rng, 1500, needed), 1 - margin).mean() > 0.79
    assert above(*draw(rng, 1500, needed), 1 - margin).mean() < 0.92, "nor is much more asked for"


def test_a_challenger_that_is_worse_or_better_is_asked_for_the_users_of_an_equal_one() -> None:
    rng = np.random.default_rng(4)
    both_U, one_U, other_U = (rng.random(20_000) < rate for rate in (0.15, 0.05, 0.05))
    equal = judged((both_U | one_U).astype(float), (both_U | other_U).astype(float), margin=0.1).needed
    fewer_U = one_U & (rng.random(20_000) < 0.7)
    worse = judged((both_U | fewer_U).astype(float), (both_U | other_U).astype(float), margin=0.1).needed
    assert 0.75 < worse / equal < 1.1
    with_none = judged((both_U | one_U).astype(float), (both_U | other_U).astype(float), margin=0.0).needed
    assert with_none == math.inf


@pytest.mark.parametrize(
    ("won", "lost", "verdict"), [(6, 0, "undecided"), (7, 0, "passed"), (0, 7, "failed"), (6, 7, "undecided")]
)
def test_few_discordant_users_decide_no_sooner_than_an_exact_test(won: int, lost: int, verdict: str) -> None:
    """McNemar's exact test at 2 %, one-sided: six to none is 1/64, seven to none 1/128."""
    assert judged(*hits(won, lost), margin=0.0).verdict == verdict


@pytest.mark.parametrize(("both", "verdict"), [(40, "undecided"), (60, "passed")])
def test_the_very_same_hits_pass_only_where_a_loss_would_have_shown(both: int, verdict: str) -> None:
    """Of 40 hits, none of which was lost, a tenth could still be lost in truth: .9 to the power of 40 is 1.5 %, on the edge."""
    assert judged(*hits(0, 0, both), margin=0.1).verdict == verdict


def test_a_slice_without_hits_or_with_few_users_is_undecided_and_says_so() -> None:
    none = judged(np.zeros(500), np.zeros(500))
    assert (none.verdict, none.differing, none.hits) == ("undecided", 0, 0.0)
    assert math.isnan(none.kept) and math.isnan(none.needed)
    few = judged(*hits(20, 0, users=29), margin=0.1)
    assert (few.verdict, few.users) == ("undecided", 29)
    assert math.isnan(few.low)
    assert judged(*hits(20, 0, users=29), margin=0.1, min_users=20).verdict == "passed"


def test_hits_where_the_champion_had_none_pass() -> None:
    found = judged(*hits(12, 0))
    assert (found.verdict, found.kept, found.high) == ("passed", math.inf, math.inf)


def test_the_interval_agrees_with_the_verdict_and_with_turning_the_models_round() -> None:
    rng = np.random.default_rng(2)
    champion_U = np.where(rng.random(4000) < 0.2, rng.random(4000), 0)
    challenger_U = np.where(rng.random(4000) < 0.3, champion_U[rng.permutation(4000)], champion_U)
    found, turned = judged(challenger_U, champion_U), judged(champion_U, challenger_U)
    assert found.low < found.kept < found.high
    assert (found.low, found.high) == pytest.approx((1 / turned.high, 1 / turned.low), rel=0.01)
    for margin in (0.01, 0.2):
        assert (judged(challenger_U, champion_U, margin).verdict == "passed") == (found.low > 1 - margin)


def test_users_without_a_case_in_the_slice_do_not_count() -> None:
    challenger_U, champion_U = hits(30, 20, 100)
    cases_U = (np.arange(1000) < 500).astype(np.int64)
    found = compare(challenger_U, champion_U, cases_U, margin=0.1)
    assert (found.users, found.cases) == (500, 500)


def test_one_heavy_user_neither_decides_nor_blinds_the_gate() -> None:
    challenger_U, champion_U = hits(0, 0, 400, users=2000)
    cases_U = np.ones(2000, dtype=np.int64)
    challenger_U[0], champion_U[0], cases_U[0] = 300.0, 300.0, 400
    assert compare(challenger_U, champion_U, cases_U, margin=0.1).verdict == "undecided"
    assert compare(challenger_U, champion_U, cases_U, margin=0.1, heaviest=10).verdict == "passed"


def test_cases_are_summed_by_user() -> None:
    assert by_user(np.array([0.5, 1.0, 0.25]), np.array([2, 0, 2]), 4).tolist() == [1.0, 0.0, 0.75, 0.0]


@pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
def test_values_that_are_no_metric_are_refused(bad: float) -> None:
    values_U = np.full(100, 0.5)
    values_U[3] = bad
    with pytest.raises(ValueError, match="finite and at least 0"):
        judged(values_U, np.full(100, 0.5))
