"""Whether a challenger is worse than another model by more than a margin: a test that keeps its level where few users differ.

A user gives the sums of both models' values over their cases, `a` and `b`. The challenger keeps at least a share 1 - margin of
the other's value where the mean of `a - (1 - margin) b` isn't below zero. That mean is tested by its empirical likelihood ratio
(Owen, "Empirical Likelihood", 2001, ch. 2) with one more user, who lost the most that any user has to lose (after Chen, Variyath
and Abraham, "Adjusted empirical likelihood", 2008): so a loss that the slice was too small to hold is thought of. For hits alone
it comes near the exact tests, McNemar's where models differ a lot and Poisson's where they hardly do, and for many users near
Student's t. Its error rates are measured by tests/benchmarks/bench_gates.py.

Shapes: R comparisons at once (one, except when the gate itself is measured), U users, C cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Verdict = Literal["passed", "failed", "undecided"]
LEVEL = 0.02
"""Nominal risk of letting a loss of just the margin pass, one-sided; below 2.5 %, which simulations must not exceed."""
POWER = 0.82
"""How often an equal challenger shall pass with the users that are asked for: simulated, that is four times in five at least."""
DEVIATES = -NormalDist().inv_cdf(LEVEL)
ENOUGH = DEVIATES**2 / 2
"""Log likelihood ratio from which on the mean is taken to be above zero."""
RARE = 4.65
"""Losses of the margin's size that must have been possible: r - 1 - log r = ENOUGH. Below, no result at all can pass."""
ROUNDS = 60


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a slice says of a challenger beside another model."""

    verdict: Verdict
    kept: float
    """The challenger's value as a share of the other model's; infinity where that has none."""
    low: float
    """Ends of the interval of `kept`: each is passed by chance with `LEVEL` at most. NaN below `min_users`."""
    high: float
    users: int
    cases: int
    differing: int
    """Users whose two values differ."""
    hits: float
    """The other model's value over the most that one user gave: how many of the largest losses there could have been."""
    needed: float
    """Users for which an equal challenger passes four times in five; NaN where the slice can't tell."""


def compare(
    challenger_U: Array,
    other_U: Array,
    cases_U: npt.NDArray[np.int64],
    *,
    margin: float,
    min_users: int = 30,
    heaviest: int = 0,
) -> Comparison:
    """Judges a challenger by each user's sums of values, 0 and more, over `cases_U` cases; users without a case don't count.

    `passed` where a loss of more than `margin` (a share of the other's value; 0 asks for a gain) is refuted, `failed` where at
    least such a loss is shown, else `undecided`. A user with more cases than `heaviest` weighs as much as one with so many (0: no
    bound): the test must think of losing the heaviest user, so a few of them would leave it without power. Raises ValueError for
    values that are negative or not finite.
    """
    some_U = cases_U > 0
    weight_U = np.minimum(1.0, heaviest / cases_U[some_U]) if heaviest else 1.0
    challenger_U, other_U = challenger_U[some_U] * weight_U, other_U[some_U] * weight_U
    if not (np.isfinite(challenger_U) & np.isfinite(other_U) & (challenger_U >= 0) & (other_U >= 0)).all():
        raise ValueError("values of cases must be finite and at least 0: a metric such as NDCG, not a score")
    users, total = int(some_U.sum()), float(other_U.sum())
    found_U = (challenger_U > 0) | (other_U > 0)  # who has nothing to win or lose tells nothing
    pair = challenger_U[found_U][None], other_U[found_U][None]
    kept = float(challenger_U.sum()) / total if total else math.inf if found_U.any() else math.nan
    low, high, verdict = math.nan, math.nan, "undecided"
    if users >= min_users and found_U.any():
        verdict = "passed" if above(*pair, 1 - margin)[0] else "failed" if below(*pair, 1 - margin)[0] else "undecided"
        low, high = interval(*pair)
    return Comparison(
        verdict=verdict,  # type: ignore[arg-type]
        kept=kept,
        low=low,
        high=high,
        users=users,
        cases=int(cases_U.sum()),
        differing=int((challenger_U != other_U).sum()),
        hits=total / float(largest(*pair)[0]) if total else 0.0,
        needed=needed(*pair, margin, users),
    )


# ------------------------------------------------------------------------------------------------------------------- test


def above(challenger_RU: Array, other_RU: Array, share: float) -> npt.NDArray[np.bool_]:
    """Whether each challenger is shown to keep more than `share` of the other's value; rows may hold zeros for no user."""
    return evidence(challenger_RU - share * other_RU, max(1.0, share) * largest(challenger_RU, other_RU)) >= ENOUGH


def below(challenger_RU: Array, other_RU: Array, share: float) -> npt.NDArray[np.bool_]:
    """Whether each challenger is shown to keep less than `share` of the other's value."""
    return evidence(share * other_RU - challenger_RU, max(1.0, share) * largest(challenger_RU, other_RU)) >= ENOUGH


def largest(challenger_RU: Array, other_RU: Array) -> Array:
    """The most that any user gave either model."""
    most_R: Array = np.maximum(challenger_RU.max(1, initial=0.0), other_RU.max(1, initial=0.0))
    return most_R


def evidence(gain_RU: Array, worst_R: Array) -> Array:
    """Log likelihood ratio for a mean above zero, one more user having lost `worst_R`; 0 where the mean isn't above it.

    It is the largest sum of log(1 + t gain) over 0 <= t < 1 / worst, found by halving: the sum is concave in t.
    """
    worst_R = np.maximum(worst_R, 1e-12)
    low_R, high_R = np.zeros(len(gain_RU)), 1 / worst_R
    for _ in range(ROUNDS):
        t_R = (low_R + high_R) / 2
        rising_R = (gain_RU / (1 + t_R[:, None] * gain_RU)).sum(1) > worst_R / (1 - t_R * worst_R)
        low_R, high_R = np.where(rising_R, t_R, low_R), np.where(rising_R, high_R, t_R)
        if not (high_R - low_R > 1e-9 / worst_R).any():
            break
    found_R: Array = np.log1p(low_R[:, None] * gain_RU).sum(1) + np.log1p(-low_R * worst_R)
    return found_R.clip(0)


def interval(challenger_1U: Array, other_1U: Array) -> tuple[float, float]:
    """Shares of the other's value between which the challenger's lies; infinity where the slice sets no end."""
    return edge(challenger_1U, other_1U, above), edge(challenger_1U, other_1U, below)


def edge(challenger_1U: Array, other_1U: Array, shown: object) -> float:
    """Where `above` ends, or `below` begins, to be shown; both are monotone in the share."""
    rising = shown is below
    test = below if rising else above
    low, high = 0.0, 64.0
    if bool(test(challenger_1U, other_1U, high)[0]) != rising:
        return math.inf
    if bool(test(challenger_1U, other_1U, low)[0]) == rising:
        return 0.0
    while high - low > 1e-4 * max(1.0, low):
        middle = (low + high) / 2
        if bool(test(challenger_1U, other_1U, middle)[0]) == rising:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def needed(challenger_1U: Array, other_1U: Array, margin: float, users: int) -> float:
    """Users of this kind for which a challenger just as good passes with `POWER`; infinity for no margin, NaN where unknown.

    Just as good is a challenger who is as often the better one as the worse: each user counts half as it is and half with the
    models turned round. What the test sums then is known for any number of users: its expected evidence E, largest at some t, and
    its spread there. The root of 2 E, a deviate, has a spread too, which is not 1 where gains are skewed: that many deviates more
    than `DEVIATES` are asked for, times the quantile of `POWER`. Each t is the largest for one number of users, so t is searched.
    """
    total, most = float(other_1U.sum()), float(largest(challenger_1U, other_1U)[0])
    if not users or not total:
        return math.nan
    if not margin:
        return math.inf
    kept = 1 - margin
    gain_G = np.concatenate([challenger_1U - kept * other_1U, other_1U - kept * challenger_1U], axis=None)
    low, high, enough = 0.0, 1 / most, math.inf
    for _ in range(ROUNDS):
        t = (low + high) / 2
        count, deviates, spread = expected(gain_G, most, t, users)
        if deviates - NormalDist().inv_cdf(POWER) * spread >= DEVIATES:
            high, enough = t, min(enough, count)
        else:
            low = t
    return float(math.ceil(max(enough, RARE * most * users / (margin * total))))


def expected(gain_G: Array, most: float, t: float, users: int) -> tuple[float, float, float]:
    """How many users have their evidence largest at t, its deviate, and that one's spread; `gain_G` are two for each user."""
    slope = float((gain_G / (1 + t * gain_G)).sum()) / (2 * users)
    if slope <= 0:  # more evidence than any number of users gives
        return math.inf, math.inf, 0.0
    log_G = np.log1p(t * gain_G)
    mean = float(log_G.sum()) / (2 * users)
    count = most / ((1 - t * most) * slope)
    evidence = count * mean + math.log1p(-t * most)
    if evidence <= 0:
        return count, 0.0, 0.0
    deviates = math.sqrt(2 * evidence)
    variance = count * max(float((log_G**2).sum()) / (2 * users) - mean**2, 0.0)
    return count, deviates, math.sqrt(variance) / deviates


# ------------------------------------------------------------------------------------------------------------------ cases


def by_user(values_C: Array, users_C: npt.NDArray[np.int64], users: int) -> Array:
    """Sums of the cases' values by user, user numbers 0 to users - 1."""
    sum_U: Array = np.bincount(users_C, weights=values_C, minlength=users).astype(np.float64)  # integers where there is no case
    return sum_U
