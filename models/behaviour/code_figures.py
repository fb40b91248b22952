"""What codes are worth: how evenly books are used, what codes keep of neighbours, what they say of categories.

Shapes: N items, K books, C entries of a book, D width, Q queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def usage(code_NK: Tensor, entries: int) -> list[dict[str, float]]:
    """Of each book: entropy in bits, the Gini coefficient of its entries' shares (0 even, 1 all in one), and dead entries."""
    found = []
    for code_N in code_NK.T:
        share_C = torch.bincount(code_N, minlength=entries).double() / len(code_N)
        rank_C = torch.arange(1, entries + 1, dtype=torch.float64, device=share_C.device)
        gini = float((2 * rank_C - entries - 1) @ share_C.sort().values) / entries
        found.append({"entropy": entropy(share_C), "gini": gini, "dead": float((share_C == 0).sum())})
    return found


def entropy(share_C: Tensor) -> float:
    """Bits of shares that sum to one."""
    return float(-torch.xlogy(share_C, share_C).sum() / torch.log(torch.tensor(2.0, dtype=share_C.dtype)))


def collisions(code_NK: Tensor) -> dict[str, float]:
    """Share of items whose codes another item has too, and how many share the most common ones."""
    _, count_G = torch.unique(code_NK, dim=0, return_counts=True)
    return {"share": float(count_G[count_G > 1].sum()) / max(1, len(code_NK)), "largest": float(count_G.max())}


def information(code_NK: Tensor, category_N: Tensor) -> list[float]:
    """Of each book: bits that its code tells of an item's category (a number), over the bits of the category; -1 is none."""
    known_N = category_N >= 0
    category_N, code_NK = category_N[known_N], code_NK[known_N]
    if not len(category_N):
        return []
    whole = bits(category_N)
    return [(bits(code_N) + whole - bits(code_N * (int(category_N.max()) + 1) + category_N)) / whole if whole else 0.0
            for code_N in code_NK.T]  # fmt: skip


def bits(value_N: Tensor) -> float:
    """Entropy of values as they come."""
    _, count = torch.unique(value_N, return_counts=True)
    return entropy(count.double() / len(value_N))


def error(emb_ND: Tensor, read_ND: Tensor) -> float:
    """Squared distance between vectors and what codes tell of them, over the vectors' variance."""
    return float((emb_ND - read_ND).square().sum() / (emb_ND - emb_ND.mean(0)).square().sum().clamp_min(1e-30))


TIED = 1e-6
"""Cosines that differ by less are equal: an item of a text that thousands share has no ten nearest ones."""


def neighbours_kept(emb_ND: Tensor, read_ND: Tensor, queries: int = 512, k: int = 10) -> float:
    """Share of an item's k nearest others by what codes tell (cosine) that are among its k nearest by the vectors; of equally
    near ones any will do. Queries are spread evenly."""
    k = min(k, len(emb_ND) - 1)
    row_Q = torch.linspace(0, len(emb_ND) - 1, min(queries, len(emb_ND)), device=emb_ND.device).long()
    near_Qk = cosines(read_ND, row_Q).topk(k).indices  # before the others: only one such matrix is held at once
    exact_QN = cosines(emb_ND, row_Q)
    least_Q1 = exact_QN.topk(k).values[:, -1:] - TIED
    return float((exact_QN.gather(1, near_Qk) >= least_Q1).double().mean())


def cosines(emb_ND: Tensor, row_Q: Tensor) -> Tensor:
    """score_QN of some rows with all; -inf with themselves."""
    unit_ND = F.normalize(emb_ND.float(), dim=1)
    score_QN = unit_ND[row_Q] @ unit_ND.T
    score_QN[torch.arange(len(row_Q), device=row_Q.device), row_Q] = -torch.inf
    return score_QN
