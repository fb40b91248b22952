"""What embeddings of texts foretell before anything is trained on them: the currency in which encoders are compared.

A user is the fading mean of the whitened embeddings of what they had; items are ranked by their cosine to it, among those not
had yet (METHOD §3, §7). An encoder that is no better here gives the recommender nothing that its base model would not give.

Shapes: C cases, N items of the sample, E width of an encoder, V items + 1 (row 0 is padding), U users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import Histories, cases, inputs_before, targets
from models.behaviour.whitening import fit_whitening
from models.judge.bootstrap import bootstrap, estimate
from models.judge.evaluation import SLICES, Cases, make_cases, slices
from models.judge.metrics import by_rank
from models.judge.text_floor import NEWEST, text_ranks

TOLD = ("overall", "tail", "cold", "head")
DECIDING = ("overall", "tail", "cold")
FEWEST = 100
"""Users below which nothing is decided."""
ASKED = 0.75
"""Share of a sample that users had or took next; the rest are items drawn at random."""
Verdict = Literal["better", "worse", "no different", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Validation events whose items lie in a sample of the catalogue."""

    rows_N: Tensor
    """Which items, counted from 0 in the catalogue's order, ascending; they have index 1..N in the cases."""
    cases: Cases


@dataclass(frozen=True, kw_only=True)
class Worth:
    """NDCG@10 of encoders on a trial, and what each has more than another: (difference, low, high), 95 %, paired over users."""

    users: int
    ndcg: dict[str, dict[str, float]]
    """By encoder, then slice; slices without a case are left out."""
    less: dict[str, dict[str, tuple[float, float, float]]]
    """By `one - other`, then slice; NaN ends where a slice is too small for an interval."""


def draw(events: Histories, limit: int, seed: int) -> Trial:
    """Histories (on the CPU, without what is held out as cold) -> a trial with about `limit` items, at least 100.

    Users come in random order until what they had and took fills most of the sample. Slices stand for all train rows, not for
    those of the sample. Raises ValueError where no user has a validation event with one before it.
    """
    users_C, position_C = cases(events, "valid")
    if not len(users_C):
        raise ValueError("no user has an event in the valid part with one before it")
    order = torch.from_numpy(np.random.default_rng([seed, 6]).permutation(len(users_C)))
    users_C, position_C = users_C[order], position_C[order]
    in_V = torch.zeros(events.catalogue + 1, dtype=torch.bool)
    if events.catalogue <= limit:
        in_V[1:] = True
    else:
        target_C = targets(events, users_C, position_C)
        asked_CL = torch.cat([inputs_before(events, users_C, position_C, NEWEST), target_C[:, None]], dim=1)
        first = np.unique(asked_CL.numpy(), return_index=True)[1] // asked_CL.shape[1]
        known_C = np.bincount(first, minlength=len(users_C)).cumsum()
        count = max(1, int(np.searchsorted(known_C, int(ASKED * max(limit, 100)), side="right")))
        users_C, position_C = users_C[:count], position_C[:count]
        in_V[asked_CL[:count].flatten()] = True
        others = (~in_V[1:]).nonzero().flatten() + 1
        free = max(0, max(limit, 100) - int(in_V[1:].sum()))
        in_V[others[torch.from_numpy(np.random.default_rng([seed, 7]).permutation(len(others)))[:free]]] = True
    in_V[0] = False
    users_U = users_C.sort().values
    position_V = torch.zeros(len(events.train_end_U), dtype=torch.int64)
    position_V[users_C] = position_C
    made = make_cases(restricted(events, users_U, in_V), "valid", negatives=1, paper_tail=4, chunk=4096, seed=seed, unseen=True)
    whole_C = users_U[made.users_C]
    slices_SC = slices(events, whole_C, position_V[whole_C], targets(events, whole_C, position_V[whole_C]), 4)
    return Trial(rows_N=in_V[1:].nonzero().flatten(), cases=dataclasses.replace(made, slices_SC=slices_SC))


def restricted(events: Histories, users_U: Tensor, in_V: Tensor) -> Histories:
    """Histories of some users (ascending) over some items, which get new numbers 1..N in their old order."""
    number_V = in_V.cumsum(0) * in_V
    mine_U = torch.zeros(len(events.train_end_U), dtype=torch.bool)
    mine_U[users_U] = True
    user_N, position_N = events.user_N, events.position_N
    kept_N = in_V[events.items_N] & mine_U[user_N]

    def count(before_N: Tensor) -> Tensor:
        return torch.bincount(user_N[kept_N & before_N], minlength=len(mine_U))[users_U]

    length_U = count(torch.ones_like(kept_N))
    return Histories(
        offsets_U1=torch.cat([torch.zeros(1, dtype=torch.int64), length_U.cumsum(0)]),
        items_N=number_V[events.items_N[kept_N]],
        timestamps_N=events.timestamps_N[kept_N],
        train_end_U=count(events.in_train_N),
        valid_end_U=count(position_N < events.valid_end_U[user_N]),
        catalogue=int(in_V.sum()),
    )


def untrained_ndcg(trial: Trial, llm_NE: Tensor) -> Tensor:
    """Embeddings of the trial's items, in the order of rows_N -> ndcg_C. Raises ValueError where they aren't finite or collapsed.

    Whitened to an eighth of the items' number at most: to more directions, all items lie equally far apart (METHOD §7).
    """
    device = trial.cases.target_C.device
    white_NK = fit_whitening(llm_NE.to(device), max(1, min(llm_NE.shape[1], len(llm_NE) // 8)))(llm_NE.to(device))
    table_VK = F.pad(F.normalize(white_NK, dim=1), (0, 0, 1, 0))
    return by_rank(text_ranks(trial.cases, table_VK)[0])["ndcg"].cpu()


def weigh(trial: Trial, encoders: Mapping[str, Tensor], seed: int = 0) -> Worth:
    """llm_NE of each encoder by name -> what they are worth, the first beside each of the others."""
    first, *others = encoders
    ndcg_C = {name: untrained_ndcg(trial, llm_NE) for name, llm_NE in encoders.items()}
    return compare_rankings(trial, ndcg_C, [(first, other) for other in others], seed)


def compare_rankings(trial: Trial, ndcg_C: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], seed: int = 0) -> Worth:
    """ndcg_C by name -> means by slice, and the differences of the pairs whose names are both there and differ."""
    column, slices_SC = {name: number for number, name in enumerate(ndcg_C)}, trial.cases.slices_SC.cpu()
    found = bootstrap(torch.stack(list(ndcg_C.values()), dim=1), slices_SC, seed=seed)
    some = {slice_: SLICES.index(slice_) for slice_ in TOLD if bool(slices_SC[SLICES.index(slice_)].any())}
    ndcg = {name: {key: float(found.mean_SK[place, k]) for key, place in some.items()} for name, k in column.items()}
    less = {}
    for one, other in pairs:
        if one != other and one in column and other in column:
            ends = {key: estimate(found, place, column[one], minus=column[other]) for key, place in some.items()}
            less[f"{one} - {other}"] = {key: (end.value, end.low, end.high) for key, end in ends.items()}
    return Worth(users=int(found.n_S[0]), ndcg=ndcg, less=less)


def verdict(worth: Worth, pair: str) -> Verdict:
    """Whether the first of a pair is surely better than the other, surely worse, or neither.

    Better: overall, and nowhere surely worse. Worse: in one of DECIDING, unless better overall.
    """
    if worth.users < FEWEST:
        return "unknown"
    ends = {key: worth.less[pair][key][1:] for key in DECIDING if key in worth.less[pair]}
    lost = [key for key, (_, high) in ends.items() if high < 0]
    if ends["overall"][0] > 0:
        return "no different" if lost else "better"
    return "worse" if lost else "no different"
