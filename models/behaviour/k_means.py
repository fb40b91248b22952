"""Means of clusters of wide vectors (Liu et al. 2015, "Improved residual vector quantization", arXiv 1509.05195).

Shapes: N items, D width, C entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.behaviour.whitening import moments

ROUNDS, FIRST = 8, 8
"""Rounds by each number of directions, and how many these are at first."""


def k_means(z_ND: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """entry_CD from random items: rounds by the strongest directions alone, then by twice as many, until all count.

    By all directions at once, items of wide vectors lie about equally far apart, and k-means stays where it began. An entry
    without items moves to a random one.
    """
    _, direction_DD = torch.linalg.eigh(moments(z_ND)[1])
    strong_DD = direction_DD.flip(1).float()
    turned_ND = z_ND @ strong_DD
    entry_CD = turned_ND[drawn(len(z_ND), entries, generator).to(z_ND.device)]
    for width in widths(z_ND.shape[1]):
        for _ in range(ROUNDS):
            code_N = nearest(turned_ND[:, :width], entry_CD[:, :width])
            count_C = torch.bincount(code_N, minlength=entries)
            entry_CD = torch.zeros_like(entry_CD).index_add_(0, code_N, turned_ND) / count_C.clamp_min(1)[:, None]
            empty_C = count_C == 0
            entry_CD[empty_C] = turned_ND[drawn(len(z_ND), int(empty_C.sum()), generator).to(z_ND.device)]
    back_CD: Tensor = entry_CD @ strong_DD.T
    return back_CD


def widths(width: int) -> list[int]:
    """FIRST directions, twice as many, and so on, all of them last."""
    return [FIRST << power for power in range(width.bit_length()) if FIRST << power < width] + [width]


def drawn(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Places of random items, each once where there are enough."""
    return torch.randperm(count, generator=generator)[:wanted] if wanted <= count else torch.arange(wanted) % count


def nearest(z_ND: Tensor, entry_CD: Tensor) -> Tensor:
    """code_N of the nearest entry; of equal ones the first."""
    return (entry_CD.square().sum(1) - 2 * z_ND @ entry_CD.T).argmin(1)
