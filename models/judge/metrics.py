"""Ranks that nobody can fool, metrics from ranks, and how much raw embeddings know of popularity.

A rank is a block: the first and the last place of an item among those that its score ties. Metrics are means over the block, so
that a model gains nothing from scoring items alike: taken at the block's middle, tying one's top 19 would make all of them
hits. Scores that are not finite are refused.

Shapes: B users of a chunk, V items + 1 (column 0 is padding), D width, E LLM width, C cases, N negatives or items, I items of a
block, L items left out, G groups of tied values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCORES = 2**26
"""Scores held at once: 256 MiB in float32."""
METRICS = ("hr", "ndcg", "mrr")


# ------------------------------------------------------------------------------------------------------------------ ranks


def refuse_strange(scores_BV: Tensor, masked_BV: Tensor | None = None) -> None:
    """Raises ValueError for NaN or infinity; -inf is allowed in column 0 and where the caller says that it masked."""
    seen = scores_BV[:, 1:] if masked_BV is None else scores_BV.masked_fill(masked_BV, 0.0)[:, 1:]
    if not seen.numel():
        return
    low, high = seen.aminmax()  # a NaN anywhere comes out of both
    if not math.isfinite(float(low)) or not math.isfinite(float(high)):
        bad = int((~seen.isfinite()).sum())
        raise ValueError(f"{bad} of {seen.numel()} scores are not finite: the model is broken, a rank would mean nothing")


def refuse_targets(target_B: Tensor, items: int) -> None:
    """Raises ValueError for a target out of 1..items - 1."""
    if len(target_B) and (int(target_B.min()) < 1 or int(target_B.max()) >= items):
        raise ValueError(f"targets {int(target_B.min())}..{int(target_B.max())} are out of 1..{items - 1}: 0 is padding")


def full_ranks(scores_BV: Tensor, target_B: Tensor, masked_BV: Tensor | None = None) -> Tensor:
    """rank_B2 of each target among all items, 1 is best: the first and the last place of its tied block.

    masked_BV, where given, marks items that the caller took out with -inf. Raises ValueError for scores that are not finite, or
    a target that is padding, masked or out of range.
    """
    refuse_targets(target_B, scores_BV.shape[1])
    refuse_strange(scores_BV, masked_BV)
    own_B1 = scores_BV.gather(1, target_B[:, None])
    if bool((own_B1 == -torch.inf).any()):
        raise ValueError("a target is masked: take the items of a user's history out only where they can't be the answer")
    others_BV = scores_BV[:, 1:]
    return block((others_BV > own_B1).sum(1), (others_BV == own_B1).sum(1) - 1)


def block(ahead_B: Tensor, tied_B: Tensor) -> Tensor:
    """rank_B2 of a target that some items are ahead of and others level with."""
    return torch.stack([1 + ahead_B, 1 + ahead_B + tied_B], dim=1).double()


def sampled_ranks(own_B: Tensor, negative_BN: Tensor) -> Tensor:
    """rank_B2 of each target's score among its negatives' scores, 1 is best. Raises ValueError as above."""
    if not bool(own_B.isfinite().all()) or not bool(negative_BN.isfinite().all()):
        raise ValueError("scores are not finite: the model is broken, a rank would mean nothing")
    return block((negative_BN > own_B[:, None]).sum(1), (negative_BN == own_B[:, None]).sum(1))


def table_ranks(user_BD: Tensor, table_VD: Tensor, target_B: Tensor, hidden_BL: Tensor | None = None) -> Tensor:
    """rank_B2 where scores are dot products with the table's rows, made a block at a time: memory does not know V.

    Two blocks may round equal vectors differently, so scores within rounding of the target's are ties. hidden_BL, where given,
    are items to leave out of the ranking, each once a row, 0 for none; never the target. Raises ValueError for vectors that
    are not finite or a target out of range.
    """
    refuse_targets(target_B, len(table_VD))
    if not bool(user_BD.isfinite().all()) or not bool(table_VD.isfinite().all()):
        raise ValueError("vectors of users or items are not finite: the model is broken, a rank would mean nothing")
    target_BD = table_VD[target_B]
    own_B1 = (user_BD * target_BD).sum(1, keepdim=True)
    near_B1 = (rounding(user_BD) * user_BD.norm(dim=1) * target_BD.norm(dim=1))[:, None]
    ahead_B = torch.zeros(len(user_BD), dtype=torch.int64, device=user_BD.device)
    tied_B = torch.zeros_like(ahead_B)
    step = max(1, SCORES // max(1, len(user_BD)))
    for start in range(1, len(table_VD), step):
        ahead_BI = user_BD @ table_VD[start : start + step].T - own_B1
        leave_out(ahead_BI, target_B[:, None] - start)
        if hidden_BL is not None:
            leave_out(ahead_BI, hidden_BL - start)
        above_B, level_B = above(ahead_BI, near_B1)
        ahead_B, tied_B = ahead_B + above_B, tied_B + level_B
    return block(ahead_B, tied_B)


def leave_out(ahead_BI: Tensor, place_BL: Tensor) -> None:
    """Sets some places of each row to -inf; those outside of the block are of other blocks."""
    row_P, column_P = ((place_BL >= 0) & (place_BL < ahead_BI.shape[1])).nonzero(as_tuple=True)
    ahead_BI[row_P, place_BL[row_P, column_P]] = -torch.inf


def above(ahead_BI: Tensor, near_B1: Tensor) -> tuple[Tensor, Tensor]:
    """How many are ahead by more than rounding, and how many are level."""
    ahead_B = (ahead_BI > near_B1).sum(1)
    return ahead_B, (ahead_BI >= -near_B1).sum(1) - ahead_B


def rounding(user_BD: Tensor) -> float:
    """Relative error of a float32 dot product of this width, twice over."""
    return 2 * float(torch.finfo(torch.float32).eps) * math.sqrt(user_BD.shape[1])


def draw_negatives(target_C: Tensor, seen_keys: Tensor, user_C: Tensor, catalogue: int, count: int, seed: int) -> Tensor:
    """negative_CN: uniform items 1..catalogue that the user never touched, the same at every call with the same seed.

    seen_keys are the sorted `user * (catalogue + 1) + item` of all events. A user who touched nearly everything gets touched
    items, never the target. Drawn on the CPU, so that every device ranks among the same. Raises ValueError for one item.
    """
    if catalogue < 2:
        raise ValueError(f"a catalogue of {catalogue} items has no negatives: rank on a larger one")
    generator = torch.Generator().manual_seed(seed)
    shape = (len(target_C), count)
    offset_CN = torch.randint(1, catalogue, shape, generator=generator)
    other_CN = (target_C[:, None] - 1 + offset_CN) % catalogue + 1  # anything but the target
    drawn_CN = other_CN.clone()
    for _ in range(32):
        key_CN = user_C[:, None] * (catalogue + 1) + drawn_CN
        place_CN = torch.searchsorted(seen_keys, key_CN).clamp_max(max(len(seen_keys) - 1, 0))
        bad_CN = seen_keys[place_CN] == key_CN if len(seen_keys) else torch.zeros(shape, dtype=torch.bool)
        if not bool(bad_CN.any()):
            return drawn_CN
        drawn_CN[bad_CN] = torch.randint(1, catalogue + 1, (int(bad_CN.sum()),), generator=generator)
    return torch.where(bad_CN, other_CN, drawn_CN)


# ---------------------------------------------------------------------------------------------------------------- metrics


def by_rank(rank_C2: Tensor, k: int = 10) -> dict[str, Tensor]:
    """Each case's hr and ndcg at k, and mrr (its reciprocal rank, over all ranks), in float64.

    Of a tied block it is the mean over its places: what breaking the ties by chance gives on average.
    """
    first_C, last_C = rank_C2.double().unbind(1)
    size_C = last_C - first_C + 1
    gain_k = torch.cat([rank_C2.new_zeros(1).double(), 1 / torch.arange(2.0, k + 2, device=rank_C2.device).double().log2()])
    upto_k = gain_k.cumsum(0)
    before_C, inside_C = (first_C - 1).clamp_max(k).long(), last_C.clamp_max(k).long()
    harmonic_C = torch.digamma(last_C + 1) - torch.digamma(first_C)
    return {
        "hr": (inside_C - before_C) / size_C,
        "ndcg": (upto_k[inside_C] - upto_k[before_C]) / size_C,
        "mrr": harmonic_C / size_C,
    }


# ----------------------------------------------------------------------------------------------------------------- leaks


@dataclass(frozen=True, kw_only=True)
class Leak:
    """How well raw embeddings foretell an item's popularity in the held-out period."""

    r2: float
    """Cross-validated; 0 is guessing the mean."""
    spearman: float
    items: int


def popularity_leak(llm_NE: Tensor, count_N: Tensor, *, folds: int = 5, ridge: float = 1e-2, seed: int = 0) -> Leak:
    """Ridge regression of log(1 + held-out count) on embeddings, each item predicted from folds that it is not in.

    `ridge` is relative to the mean variance of a dimension. Raises ValueError for fewer items than folds.
    """
    if len(llm_NE) < 2 * folds:
        raise ValueError(f"{len(llm_NE)} items are too few for {folds} folds: a leak can't be told on so small a catalogue")
    y_N, x_NE = count_N.double().log1p(), llm_NE.double()
    fold_N = torch.randperm(len(y_N), generator=torch.Generator().manual_seed(seed)).to(y_N.device) % folds
    guess_N = torch.empty_like(y_N)
    for fold in range(folds):
        learn_N = fold_N != fold
        mean_E, mean = x_NE[learn_N].mean(0), y_N[learn_N].mean()
        centred_NE = x_NE[learn_N] - mean_E
        gram_EE = centred_NE.T @ centred_NE
        gram_EE.diagonal().add_(ridge * float(gram_EE.diagonal().mean()) + 1e-12)
        weight_E = torch.linalg.solve(gram_EE, centred_NE.T @ (y_N[learn_N] - mean))
        guess_N[~learn_N] = (x_NE[~learn_N] - mean_E) @ weight_E + mean
    spread = float((y_N - y_N.mean()).square().sum())
    r2 = 1 - float((y_N - guess_N).square().sum()) / spread if spread else 0.0
    return Leak(r2=r2, spearman=spearman(guess_N, y_N), items=len(y_N))


def spearman(a_N: Tensor, b_N: Tensor) -> float:
    """Rank correlation, tied values at their mean rank; 0 where one of them is constant."""
    ranks = torch.stack([mean_ranks(a_N), mean_ranks(b_N)])
    if bool((ranks.std(1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def mean_ranks(values_N: Tensor) -> Tensor:
    """Ascending ranks from 1; tied values share their mean."""
    _, place_N, count_G = torch.unique(values_N, return_inverse=True, return_counts=True)
    mean_G: Tensor = count_G.cumsum(0).double() - (count_G - 1) / 2
    return mean_G[place_N]
