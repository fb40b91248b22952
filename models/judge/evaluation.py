"""Held-out cases, their slices, and every model's ranks on the same cases: chunked, on the device.

Shapes: C cases, B cases of a chunk, L positions, V items + 1 (row 0 is padding), D width, N negatives, S slices, K events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import COLD, HEAD, TAIL, Histories, cases, inputs_before, item_groups, targets, train_counts
from models.judge.floors import count, repeat_markov_popularity
from models.judge.metrics import SCORES, draw_negatives, full_ranks, sampled_ranks, table_ranks

SLICES = ("overall", "cold", "tail", "head", "repeat", "new", "short", "long", "paper_tail")
LONG_SHARE = 0.2
Encode = Callable[[Tensor, Tensor], Tensor]
"""emb_BLD, valid_BL -> user_BD."""
Ranks = tuple[Tensor, Tensor]
"""rank_C2 of each case among all items, and among its negatives: first and last place of its tied block."""


@dataclass(frozen=True, kw_only=True)
class Cases:
    """What is to be foretold: of each user the last event of the held-out part, from all before it; short histories first."""

    events: Histories
    users_C: Tensor
    position_C: Tensor
    length_C: Tensor
    """position_C, ascending, on the CPU."""
    target_C: Tensor
    negative_CN: Tensor
    slices_SC: Tensor
    """In the order of SLICES."""
    chunk: int
    """Cases ranked at once, at most."""
    unseen: bool
    """Ranks among items that the user has not touched yet, and the target."""

    def chunks(self, fixed: int, per_event: int) -> Iterator[tuple[slice, int]]:
        """Ranges of cases with their longest history, such that `fixed + per_event * history` floats a case fit into memory."""
        start = 0
        while start < len(self.users_C):
            step = max(1, min(self.chunk, len(self.users_C) - start, SCORES // max(fixed, 1)))
            longest = int(self.length_C[start + step - 1])
            step = max(1, min(step, SCORES // max(fixed + per_event * longest, 1)))
            yield slice(start, start + step), int(self.length_C[start + step - 1])
            start += step

    def touched(self, some: slice, width: int) -> Tensor:
        """item_BL that users touched before their case, each once a row, among zeros."""
        item_BL = inputs_before(self.events, self.users_C[some], self.position_C[some], width).sort(1).values
        item_BL[:, 1:] *= item_BL[:, 1:] != item_BL[:, :-1].clone()
        return item_BL


def make_cases(
    events: Histories,
    part: Literal["valid", "test"],
    *,
    negatives: int,
    paper_tail: int,
    chunk: int,
    seed: int,
    unseen: bool = False,
) -> Cases:
    """Cases of a part, with negatives fixed by the seed. Raises ValueError where the part has none."""
    users_C, position_C = cases(events, part)
    if not len(users_C):
        raise ValueError(f"no user has an event in the {part} part with one before it: move the split, or extract more days")
    order_C = position_C.argsort(stable=True)
    users_C, position_C = users_C[order_C], position_C[order_C]
    target_C = targets(events, users_C, position_C)
    key_N = (events.user_N * (events.catalogue + 1) + events.items_N).sort().values.cpu()
    negative_CN = draw_negatives(target_C.cpu(), key_N, users_C.cpu(), events.catalogue, negatives, seed)
    return Cases(
        events=events,
        users_C=users_C,
        position_C=position_C,
        length_C=position_C.cpu(),
        target_C=target_C,
        negative_CN=negative_CN.to(target_C.device),
        slices_SC=slices(events, users_C, position_C, target_C, paper_tail),
        chunk=chunk,
        unseen=unseen,
    )


def slices(events: Histories, users_C: Tensor, position_C: Tensor, target_C: Tensor, paper_tail: int) -> Tensor:
    """slices_SC: which cases belong to each of SLICES.

    Items are cold, tail or head, and users short or long (the fifth with most events), by train rows alone. A target is a repeat
    if the user had touched it before. `paper_tail` counts all rows, as LLMEmb's code does: for comparison with its tables only.
    """
    group_C = item_groups(train_counts(events))[target_C]
    repeat_C = touched_before(events, users_C, position_C, target_C)
    length_C = events.train_end_U[users_C]
    long_C = length_C > length_C.sort().values[int((1 - LONG_SHARE) * (len(length_C) - 1))]
    all_rows_V = torch.bincount(events.items_N, minlength=events.catalogue + 1)
    made = {
        "overall": torch.ones_like(repeat_C),
        "cold": group_C == COLD,
        "tail": group_C == TAIL,
        "head": group_C == HEAD,
        "repeat": repeat_C,
        "new": ~repeat_C,
        "short": ~long_C,
        "long": long_C,
        "paper_tail": all_rows_V[target_C] < paper_tail,
    }
    return torch.stack([made[name] for name in SLICES])


def touched_before(events: Histories, users_C: Tensor, position_C: Tensor, target_C: Tensor) -> Tensor:
    """repeat_C: whether the user's first event with the target lies before the case."""
    rows = events.catalogue + 1
    key_N, order_N = (events.user_N * rows + events.items_N).sort(stable=True)
    first_C = order_N[torch.searchsorted(key_N, users_C * rows + target_C)]
    return events.position_N[first_C] < position_C


def vector_ranks(cases: Cases, table_VD: Tensor, encode: Encode, max_len: int) -> Ranks:
    """Ranks under a sequence encoder over item vectors; scores are dot products."""
    return span_ranks(cases, table_VD, encode, max_len, [(0, table_VD.shape[1])])[0]


@torch.no_grad()
def span_ranks(cases: Cases, table_VD: Tensor, encode: Encode, max_len: int, spans: Sequence[tuple[int, int]]) -> list[Ranks]:
    """As `vector_ranks`, of each of some ranges of columns (first, after the last) alone; histories are encoded once."""
    found: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in spans]
    width = table_VD.shape[1]
    fixed = max(max_len**2, (cases.negative_CN.shape[1] + max_len) * width)
    for some, longest in cases.chunks(fixed, width if cases.unseen else 0):
        target_B = cases.target_C[some]
        input_BL = inputs_before(cases.events, cases.users_C[some], cases.position_C[some], min(max_len, longest))
        user_BD = encode(F.embedding(input_BL, table_VD), input_BL != 0).float()
        touched_BL = cases.touched(some, longest) if cases.unseen else None
        asked_BM = torch.cat([target_B[:, None], cases.negative_CN[some]], dim=1)
        for (start, stop), (full, sampled) in zip(spans, found, strict=True):
            part_BD = torch.zeros_like(user_BD)
            part_BD[:, start:stop] = user_BD[:, start:stop]
            full.append(table_ranks(part_BD, table_VD, target_B, touched_BL))
            # one sum a pair, each in the same order: equal vectors give equal scores
            scores_BM = (part_BD[:, None] * table_VD[asked_BM]).sum(-1)
            sampled.append(sampled_ranks(scores_BM[:, 0], scores_BM[:, 1:]))
    return [(torch.cat(full), torch.cat(sampled)) for full, sampled in found]


def floor_ranks(cases: Cases) -> dict[str, Ranks]:
    """Ranks of the floors that only count."""
    counted = count(cases.events)
    popular_1V = counted.counts_V.float()[None]
    found: dict[str, list[Ranks]] = {"popularity": [], "repeat_markov_popularity": []}
    for some, longest in cases.chunks(cases.events.catalogue + 1, 1):
        target_B = cases.target_C[some]
        history_BL = inputs_before(cases.events, cases.users_C[some], cases.position_C[some], longest)
        markov_BV = repeat_markov_popularity(counted, history_BL)
        scores = {"popularity": popular_1V.repeat(len(target_B), 1), "repeat_markov_popularity": markov_BV}
        for name, scores_BV in scores.items():
            asked_BM = scores_BV.gather(1, torch.cat([target_B[:, None], cases.negative_CN[some]], dim=1))
            masked_BV = None
            if cases.unseen:
                masked_BV = torch.zeros_like(scores_BV, dtype=torch.bool).scatter_(1, cases.touched(some, longest), True)
                masked_BV.scatter_(1, target_B[:, None], False)
                scores_BV.masked_fill_(masked_BV, -torch.inf)
            found[name].append((full_ranks(scores_BV, target_B, masked_BV), sampled_ranks(asked_BM[:, 0], asked_BM[:, 1:])))
    return {name: (torch.cat([full for full, _ in parts]), torch.cat([few for _, few in parts])) for name, parts in found.items()}
