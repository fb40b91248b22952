"""What a figure, or a difference between two models, is worth: intervals from resampled users.

All models share the resampled users, so differences are paired; all cases of a user are drawn together, since they are alike.

Shapes: C cases, U users, B users of a chunk, S slices, K columns (model and metric), R resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.judge.metrics import SCORES

DETECTABLE = 1.96 + 0.84
"""Standard errors that a difference must have to be found four times in five at the 5 % level, two-sided."""


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Means of every column in every slice, and what they were in each resample of the users."""

    mean_SK: Tensor
    """NaN where a slice is empty."""
    mean_RSK: Tensor
    n_S: Tensor
    """Users of each slice."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, or a difference of two, with its 95 % interval; NaN where a slice is too small to say."""

    value: float
    low: float
    high: float
    detectable: float
    """The smallest difference that the slice could have shown: 5 % level, two-sided, power 80 %."""
    n: int

    def interval(self) -> dict[str, float | None]:
        """Value and bounds for JSON; None for a bound that there is not: of few users there is no interval."""
        known = {"value": self.value, "low": self.low, "high": self.high}
        return {name: round(value, 5) if math.isfinite(value) else None for name, value in known.items()}


def bootstrap(
    values_CK: Tensor, slices_SC: Tensor, users_C: Tensor | None = None, *, resamples: int = 1000, seed: int = 0
) -> Bootstrap:
    """Means over cases, and over those of resampled users, the same for all columns and slices.

    Each user weighs in by a Poisson(1) draw, which for many users is resampling with replacement, and lets users pass by in
    chunks (Chamandy et al., "Estimating uncertainty for massive data streams", 2012). values_CK finite, slices_SC bool; users_C
    says whose case each one is, without it each is a user's only one.
    """
    device, columns = values_CK.device, values_CK.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    order_C, count_U = by_user(users_C, len(values_CK), device)
    sum_RQ = torch.zeros(resamples, len(slices_SC) * columns, dtype=torch.float64, device=device)
    count_RS = torch.zeros(resamples, len(slices_SC), dtype=torch.float64, device=device)
    users_S = torch.zeros(len(slices_SC), dtype=torch.int64, device=device)
    end_U, chunk = count_U.cumsum(0), max(1, SCORES // max(resamples, len(slices_SC) * columns))
    for start in range(0, len(count_U), chunk):
        count_B = count_U[start : start + chunk]
        some_C = order_C[int(end_U[start] - count_U[start]) : int(end_U[start + len(count_B) - 1])]
        value_BQ, in_BS = user_sums(values_CK[some_C].float(), slices_SC[:, some_C].T.float(), count_B)
        weight_RB = torch.poisson(torch.ones(resamples, len(count_B), device=device), generator=generator)
        sum_RQ += weight_RB @ value_BQ
        count_RS += weight_RB @ in_BS
        users_S += (in_BS > 0).sum(0)
    mean_SK = slices_SC.double() @ values_CK.double() / slices_SC.sum(1)[:, None]
    return Bootstrap(mean_SK=mean_SK, mean_RSK=sum_RQ.view(resamples, -1, columns) / count_RS[:, :, None], n_S=users_S)


def by_user(users_C: Tensor | None, cases: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """order_C that brings a user's cases together, and count_U of each user's cases in that order."""
    if users_C is None:
        return torch.arange(cases, device=device), torch.ones(cases, dtype=torch.int64, device=device)
    sorted_C, order_C = users_C.sort(stable=True)
    return order_C, torch.unique_consecutive(sorted_C, return_counts=True)[1]


def user_sums(value_CK: Tensor, in_CS: Tensor, count_B: Tensor) -> tuple[Tensor, Tensor]:
    """value_BQ, the sums of every slice and column (Q) over each user's cases, and in_BS, how many cases of each slice."""
    value_CQ = (in_CS[:, :, None] * value_CK[:, None, :]).flatten(1)
    if len(count_B) == len(value_CQ):
        return value_CQ, in_CS
    user_C = torch.arange(len(count_B), device=count_B.device).repeat_interleave(count_B)
    sums = (torch.zeros(len(count_B), part.shape[1], device=part.device) for part in (value_CQ, in_CS))
    return tuple(total.index_add_(0, user_C, part) for total, part in zip(sums, (value_CQ, in_CS), strict=True))  # type: ignore[return-value]


def estimate(found: Bootstrap, slice_: int, column: int, minus: int | None = None, min_users: int = 30) -> Estimate:
    """One column in one slice, or its paired difference to the column `minus`; no interval below `min_users` users."""
    value = found.mean_SK[slice_, column]
    mean_R = found.mean_RSK[:, slice_, column]
    if minus is not None:
        value, mean_R = value - found.mean_SK[slice_, minus], mean_R - found.mean_RSK[:, slice_, minus]
    n = int(found.n_S[slice_])
    if n < min_users:
        return Estimate(value=float(value), low=math.nan, high=math.nan, detectable=math.nan, n=n)
    low, high = mean_R.quantile(torch.tensor([0.025, 0.975], dtype=mean_R.dtype, device=mean_R.device)).tolist()
    # where no user differs from another, the slice says nothing about how small a difference it would have shown
    detectable = DETECTABLE * float(mean_R.std()) or math.nan
    return Estimate(value=float(value), low=low, high=high, detectable=detectable, n=n)
