"""Every held-out event of a user as a case, and what each model makes of it: what `promote`'s gates judge.

The table of `evaluate` has one case a user; gates need all there are. What is kept says whose cases belong together and which
slice each is in, by number, never who the user is.

Shapes: C cases, U users, K models, S slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from jobs.lake import outcomes
from jobs.run import Run
from models.behaviour import data
from models.behaviour.data import Histories, targets
from models.judge.evaluation import SLICES, Cases, Ranks, slices
from models.judge.metrics import by_rank
from models.judge.routing import weakest, weakness, weakness_of_history


def every_case(events: Histories, part: Literal["valid", "test"], last: Cases, most: int, paper_tail: int) -> Cases:
    """The newest `most` (0: all) events of each user's part that have one before them, short histories first.

    Ranked like `last`, the cases of one event a user, and in the same catalogue.
    """
    users_C, position_C = data.cases(events, part, every=True)
    if most:
        end_U = events.valid_end_U if part == "valid" else events.length_U
        newest_C = position_C >= end_U[users_C] - most
        users_C, position_C = users_C[newest_C], position_C[newest_C]
    order_C = position_C.argsort(stable=True)
    users_C, position_C = users_C[order_C], position_C[order_C]
    target_C = targets(events, users_C, position_C)
    slices_SC = slices(events, users_C, position_C, target_C, paper_tail)
    for name in ("short", "long"):  # who is one of the long fifth is counted in users, as in the table, and not in events
        in_U = torch.zeros_like(events.train_end_U, dtype=torch.bool).index_put(
            (last.users_C,), last.slices_SC[SLICES.index(name)]
        )
        slices_SC[SLICES.index(name)] = in_U[users_C]
    return Cases(
        events=events,
        users_C=users_C,
        position_C=position_C,
        length_C=position_C.cpu(),
        target_C=target_C,
        negative_CN=target_C[:, None],  # the sampled ranking is for papers: nothing to rank among here
        slices_SC=slices_SC,
        chunk=last.chunk,
        unseen=last.unseen,
    )


def weak_slices(cases: Cases, valid: Cases | None, before: Ranks | None, k: int) -> dict[str, Tensor]:
    """in_C of the cases of the weakest fifth of the users by each signal, as `weak_SIGNAL`: for the report, not for the gates.

    `before` are the challenger's ranks of the validation events; without any there is no `weak_validation`.
    """
    users_U, place_C = torch.unique(cases.users_C, return_inverse=True)
    signals = weakness_of_history(cases.events, users_U)
    if valid is not None and before is not None:
        valid_A = torch.full((len(cases.events.train_end_U),), torch.nan, dtype=torch.float64, device=users_U.device)
        valid_A[valid.users_C] = by_rank(before[0], k)["ndcg"].double()
        if bool(valid_A[users_U].isfinite().any()):
            signals = weakness(cases.events, users_U, valid_A[users_U])
    return {f"weak_{name}": weakest(weak_U)[place_C] for name, weak_U in signals.items()}


def keep_outcomes(run: Run, cases: Cases, ranks: Mapping[str, tuple[Tensor, ...]], k: int, more: Mapping[str, Tensor]) -> str:
    """Keeps every model's NDCG of every case as an artifact `outcomes`; equal ones are kept once. Gives its id.

    `more`: in_C of slices that are not of the table.
    """
    number_C = torch.unique(cases.users_C, return_inverse=True)[1]
    value_KC = torch.stack([by_rank(full_C2, k)["ndcg"] for full_C2, *_ in ranks.values()])
    found = outcomes.Outcomes(
        models=list(ranks), slices=[*SLICES, *more], user_C=number_C.cpu().numpy(),
        slices_SC=torch.cat([cases.slices_SC, *(in_C[None] for in_C in more.values())]).cpu().numpy(),
        ndcg_KC=value_KC.double().cpu().numpy(),
    )  # fmt: skip
    return outcomes.keep_outcomes(run.lake, found, f"ndcg@{k}")
