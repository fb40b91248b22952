"""Who is badly served, and what it brings to route these users to another model: against a random router, and the oracle.

Hybrid task allocation (arXiv 2405.00824) sends users who are sparse and badly ranked to an LLM. Here any model may be the other
one. A router is judged on test by what was known before: history, and the rank of the validation event.

Shapes: U users, N events, V items + 1 (row 0 is padding).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.behaviour.data import Histories, train_counts
from models.judge.bootstrap import bootstrap, estimate

SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
WEAK = 0.2
"""Share of the users that count as weak where a figure for them is given."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """A share of the users, the weakest by one signal, served by the other model."""

    signal: str
    share: float
    ndcg: float
    main: float
    """What the main model gives to all."""
    random: float
    """What routing as many users drawn at random gives, on average."""
    oracle: float
    """What routing those whom it helps most gives."""
    gain: float
    """ndcg - random."""
    low: float
    """Ends of its 95 % interval over users."""
    high: float
    over: float
    """ndcg - main: to route must beat not to, too."""
    over_low: float
    over_high: float


def weakness(events: Histories, users_U: Tensor, valid_U: Tensor) -> dict[str, Tensor]:
    """How weak users are by each signal, higher is weaker; valid_U is each one's NDCG on validation, NaN where there is no event.

    `length`, `popularity` and `sparsity` as in `weakness_of_history`; `validation`: a bad rank of the validation event. Who has
    none stands in the middle. Raises ValueError where nobody has one.
    """
    known_U = valid_U.isfinite()
    if not bool(known_U.any()):
        raise ValueError("no user has a validation event: there is nothing to tell weak users by; move the split")
    middle = valid_U[known_U].double().median()
    return weakness_of_history(events, users_U) | {"validation": -torch.where(known_U, valid_U.double(), middle)}


def weakness_of_history(events: Histories, users_U: Tensor) -> dict[str, Tensor]:
    """How weak users are by their train events, higher is weaker.

    `length`: few of them; `popularity`: rare items in them; `sparsity`: few different items of the catalogue.
    """
    rows = events.catalogue + 1
    in_train_N = events.in_train_N
    user_N, item_N = events.user_N[in_train_N], events.items_N[in_train_N]
    count_N = train_counts(events)[item_N].double().log1p()
    users = len(events.train_end_U)
    rare_A = -torch.zeros(users, dtype=torch.float64, device=item_N.device).index_add_(0, user_N, count_N)
    different_A = torch.bincount(torch.unique(user_N * rows + item_N) // rows, minlength=users)
    length_U = events.train_end_U[users_U].double()
    return {
        "length": -length_U,
        "popularity": rare_A[users_U] / length_U.clamp_min(1),
        "sparsity": 1 - different_A[users_U].double() / events.catalogue,
    }


def routed(main_U: Tensor, other_U: Tensor, weak_U: Tensor, share: float) -> Tensor:
    """value_U where the weakest share of the users goes to the other model; of equally weak ones the first."""
    return torch.where(weakest(weak_U, share), other_U, main_U)


def weakest(weak_U: Tensor, share: float = WEAK) -> Tensor:
    """in_U: who is of the weakest share of the users; of equally weak ones the first."""
    in_U = torch.zeros(len(weak_U), dtype=torch.bool, device=weak_U.device)
    in_U[weak_U.argsort(descending=True, stable=True)[: round(share * len(weak_U))]] = True
    return in_U


def routes(
    main_U: Tensor, other_U: Tensor, signals: Mapping[str, Tensor], shares: Sequence[float] = SHARES, *, seed: int = 0
) -> list[Route]:
    """Every signal at every share. Shares 0 and 1 are the two models; the random router lies on the line between them."""
    found = []
    for share in shares:
        exact = round(share * len(main_U)) / len(main_U)
        random_U = (1 - exact) * main_U + exact * other_U
        oracle = float(routed(main_U, other_U, other_U - main_U, share).mean())
        values_KU = torch.stack([routed(main_U, other_U, weak_U, share) for weak_U in signals.values()])
        every_1U = torch.ones(1, len(main_U), dtype=torch.bool, device=main_U.device)
        drawn = bootstrap(torch.cat([values_KU - random_U, values_KU - main_U]).T, every_1U, seed=seed)
        for column, signal in enumerate(signals):
            less, over = estimate(drawn, 0, column), estimate(drawn, 0, len(signals) + column)
            found.append(Route(signal=signal, share=share, ndcg=float(values_KU[column].mean()),
                               main=float(main_U.mean()), random=float(random_U.mean()),
                               oracle=oracle, gain=less.value, low=less.low, high=less.high,
                               over=over.value, over_low=over.low, over_high=over.high))  # fmt: skip
    return found


def weak_groups(ndcg_U: Tensor, signals: Mapping[str, Tensor], share: float = WEAK) -> dict[str, dict[str, float]]:
    """Of the weakest share of the users by each signal: how many, their NDCG, that of all others, the share without any hit."""
    found = {}
    for signal, weak_U in signals.items():
        mine_U = weakest(weak_U, share)
        weak, strong = ndcg_U[mine_U], ndcg_U[~mine_U]
        found[signal] = {"users": float(mine_U.sum()), "ndcg": float(weak.mean()), "others": float(strong.mean()),
                         "without_hit": float((weak == 0).double().mean())}  # fmt: skip
    return found
