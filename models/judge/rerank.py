"""A recommender's lists for held-out events, and what another order of them is worth.

Shapes: C cases, B cases of a chunk, M items of a list, L events of a history, H items had,
V items + 1 (row 0 is padding), D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import Histories, cases, inputs_before, targets
from models.judge.evaluation import Encode
from models.judge.metrics import block, by_rank

AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Lists:
    """The best items for each case by a recommender, best first."""

    history_CL: Tensor
    item_CM: Tensor
    """0 behind the last item, where a user has had nearly all."""
    score_CM: Tensor
    """-inf where there is no item."""
    place_C: Tensor
    """Place of the target in its list, -1 where it is not there."""
    target_C: Tensor
    out_CH: Tensor
    """Items that are left out of the lists, 0 for none. All of this is on the CPU."""

    def mixed(self, other_CM: Tensor, weight: float) -> Tensor:
        """The recommender's scores and others', each standardised in its list, the others times a weight."""
        mixed_CM = standardised(self.score_CM.double()) + weight * standardised(other_CM)
        return mixed_CM.where(self.item_CM != 0, -torch.inf)


def standardised(score_CM: Tensor) -> Tensor:
    """Scores of a list without their mean, over their spread; zero where there is no item."""
    there_CM = score_CM.isfinite()
    count_C1 = there_CM.sum(1, keepdim=True)
    centred_CM = score_CM.where(there_CM, 0.0)
    centred_CM = (centred_CM - centred_CM.sum(1, keepdim=True) / count_C1.clamp_min(1)).where(there_CM, 0.0)
    spread_C1 = (centred_CM.square().sum(1, keepdim=True) / (count_C1 - 1).clamp_min(1)).sqrt()
    return centred_CM / spread_C1.clamp_min(1e-12)


@torch.no_grad()
def make_lists(
    events: Histories, part: Literal["valid", "test"], table_VD: Tensor, encode: Encode, max_len: int, *,
    top: int, most: int, unseen: bool,
) -> Lists:  # fmt: skip
    """Lists for the last event of a part, of at most `most` users, spread evenly. Raises ValueError where it has no event."""
    users_C, position_C = cases(events, part)
    if not len(users_C):
        raise ValueError(f"no user has an event in the {part} part with one before it: move the split, or extract more days")
    some = torch.linspace(0, len(users_C) - 1, min(most, len(users_C)), device=users_C.device).long()
    users_C, position_C = users_C[some], position_C[some]
    target_C = targets(events, users_C, position_C)
    longest, top = int(position_C.max()), min(top, events.catalogue)
    history_CL = inputs_before(events, users_C, position_C, max_len)
    had_CH = inputs_before(events, users_C, position_C, longest)
    # a repeat can still be foretold
    out_CH = had_CH * (had_CH != target_C[:, None]) if unseen else torch.zeros_like(had_CH)
    items, scores = [], []
    for start in range(0, len(users_C), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        input_BL = history_CL[rows]
        score_BV = encode(F.embedding(input_BL, table_VD), input_BL != 0).float() @ table_VD.float().T
        score_BV.scatter_(1, out_CH[rows], -torch.inf)
        score_BV[:, 0] = -torch.inf
        best = score_BV.topk(top)
        items.append(best.indices.where(best.values > -torch.inf, 0))
        scores.append(best.values)
    item_CM = torch.cat(items)
    same_CM = item_CM == target_C[:, None]
    place_C = torch.where(same_CM.any(1), same_CM.int().argmax(1), -1)
    return Lists(history_CL=history_CL.cpu(), item_CM=item_CM.cpu(), score_CM=torch.cat(scores).cpu(), place_C=place_C.cpu(),
                 target_C=target_C.cpu(), out_CH=out_CH.cpu())  # fmt: skip


def placed(score_CM: Tensor, place_C: Tensor) -> Tensor:
    """NDCG@10 of each case where its list stands in the order of the scores; 0 where the target is not in the list."""
    own_C1 = score_CM.gather(1, place_C.clamp_min(0)[:, None])
    rank_C2 = block((score_CM > own_C1).sum(1), (score_CM == own_C1).sum(1) - 1)
    return by_rank(rank_C2)["ndcg"] * (place_C >= 0)


def oracle(place_C: Tensor) -> Tensor:
    """NDCG@10 where a target that is in its list stands first."""
    return (place_C >= 0).double()
