"""Floors: what counting alone achieves. A model that doesn't beat them learned nothing from the logs.

Everything is counted in train rows. Shapes: U users, N events, V items + 1 (row 0 is padding), T different transitions,
B users of a chunk, M ragged transitions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.behaviour.data import Histories, train_counts

PRIOR = 10.0
"""Transitions that popularity is worth beside those seen from an item."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Train rows as counts: popularity, transitions between neighbouring events, and how usual it is to repeat."""

    counts_V: Tensor
    start_V1: Tensor
    """Transitions from item i stand at [start_V1[i], start_V1[i + 1])."""
    next_T: Tensor
    times_T: Tensor
    repeat_share: float
    """Share of train events, each user's first left out, whose item the user had touched before."""


def count(events: Histories) -> Counted:
    """Counts train rows; later events never count."""
    rows = events.catalogue + 1
    in_train_N = events.in_train_N
    user_N, items_N = events.user_N[in_train_N], events.items_N[in_train_N]
    neighbours = user_N[1:] == user_N[:-1]
    key_T, times_T = torch.unique((items_N[:-1] * rows + items_N[1:])[neighbours], return_counts=True)
    from_V = torch.bincount(key_T // rows, minlength=rows)
    later = int(neighbours.sum())
    repeats = len(items_N) - len(torch.unique(user_N * rows + items_N))
    return Counted(
        counts_V=train_counts(events),
        start_V1=torch.cat([from_V.new_zeros(1), from_V.cumsum(0)]),
        next_T=key_T % rows,
        times_T=times_T,
        repeat_share=repeats / later if later else 0.0,
    )


def repeat_markov_popularity(counted: Counted, history_BL: Tensor) -> Tensor:
    """scores_BV of what comes after histories (0 is padding, newest last), as a probability; column 0 is -inf.

    With the repeat share of the logs it is one of the user's own items, by how often each was touched; else a new item, by what
    followed the newest item in train rows, smoothed by popularity.
    """
    rows, history_BL = len(counted.counts_V), history_BL.long()
    touched_BV = torch.zeros(len(history_BL), rows, device=history_BL.device)
    touched_BV.scatter_add_(1, history_BL, (history_BL != 0).float())
    popular_V = counted.counts_V / counted.counts_V.sum().clamp_min(1)
    new_BV = (PRIOR * popular_V).float().repeat(len(history_BL), 1)
    row_M, place_M = transitions(counted, history_BL[:, -1])
    new_BV.index_put_((row_M, counted.next_T[place_M]), counted.times_T[place_M].float(), accumulate=True)
    new_BV = new_BV * (touched_BV == 0)
    share = counted.repeat_share
    scores_BV = share * as_share(touched_BV) + (1 - share) * as_share(new_BV)
    scores_BV[:, 0] = -torch.inf
    return scores_BV


def transitions(counted: Counted, newest_B: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and places of all transitions from each user's newest item: row_M, place_M."""
    first_B, count_B = counted.start_V1[newest_B], counted.start_V1[newest_B + 1] - counted.start_V1[newest_B]
    row_M = torch.arange(len(newest_B), device=newest_B.device).repeat_interleave(count_B)
    before_B = count_B.cumsum(0) - count_B
    return row_M, torch.arange(len(row_M), device=newest_B.device) - before_B[row_M] + first_B[row_M]


def as_share(values_BV: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros stays."""
    return values_BV / values_BV.sum(1, keepdim=True).clamp_min(1e-30)
