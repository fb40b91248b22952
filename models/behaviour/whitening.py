"""Whitening: LLM embeddings centred, turned to principal directions, each of variance one.

Shapes: N items, E LLM width, K whitened width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHUNK = 65_536
SMALLEST = 1e-7
"""Directions whose variance is below this share of the largest carry rounding of half floats, no text."""


class Whitening(nn.Module):
    """Centres, rotates to principal directions and scales each to variance one."""

    mean_E: Tensor
    map_EK: Tensor

    def __init__(self, mean_E: Tensor, map_EK: Tensor, explained: float) -> None:
        super().__init__()
        self.register_buffer("mean_E", mean_E)
        self.register_buffer("map_EK", map_EK)
        self.explained = explained
        """Share of the variance in the directions kept."""

    @property
    def spread_K(self) -> Tensor:
        """Standard deviation of the texts in each direction kept, before it was made one."""
        spread_K: Tensor = 1 / self.map_EK.norm(dim=0)
        return spread_K

    def forward(self, llm_NE: Tensor) -> Tensor:
        """llm_NE of any float type -> white_NK float32, strongest direction first."""
        return (llm_NE.float() - self.mean_E) @ self.map_EK


def moments(llm_NE: Tensor) -> tuple[Tensor, Tensor]:
    """mean_E and covariance_EE in float64, a chunk at a time. Raises ValueError for a value that is not finite."""
    total_E = torch.zeros(llm_NE.shape[1], dtype=torch.float64, device=llm_NE.device)
    for start in range(0, len(llm_NE), CHUNK):
        chunk_NE = llm_NE[start : start + CHUNK].double()
        bad_N = ~chunk_NE.isfinite().all(1)
        if bool(bad_N.any()):
            row = start + int(bad_N.nonzero()[0])
            raise ValueError(f"LLM embedding of row {row} is not finite ({int(bad_N.sum())} such rows): embed these items again")
        total_E += chunk_NE.sum(0)
    mean_E = total_E / len(llm_NE)
    covariance_EE = torch.zeros(len(mean_E), len(mean_E), dtype=torch.float64, device=llm_NE.device)
    for start in range(0, len(llm_NE), CHUNK):
        centred_NE = llm_NE[start : start + CHUNK].double() - mean_E
        covariance_EE += centred_NE.T @ centred_NE / len(llm_NE)
    return mean_E, covariance_EE


def fit_whitening(llm_NE: Tensor, width: int) -> Whitening:
    """PCA whitening to at most `width` directions; fewer where the items span fewer. Reads texts only, no behaviour.

    Raises ValueError for too few items, a non-finite value, or items that all have one embedding.
    """
    if len(llm_NE) < 2:
        raise ValueError(f"whitening needs at least 2 items, got {len(llm_NE)}: extract more of the catalogue")
    mean_E, covariance_EE = moments(llm_NE)
    variance_E, direction_EE = torch.linalg.eigh(covariance_EE)
    variance_E, direction_EE = variance_E.flip(0).clamp_min(0), direction_EE.flip(1)
    magnitude = float(mean_E.square().sum()) + float(variance_E.sum())
    if float(variance_E.sum()) <= SMALLEST * max(magnitude, 1e-30):
        raise ValueError(f"all {len(llm_NE)} items have the same LLM embedding: the encoder collapsed, train it again")
    kept = min(width, int((variance_E > SMALLEST * variance_E[0]).sum()))
    direction_EK = direction_EE[:, :kept]
    # an eigenvector's sign is the solver's whim: fix it, so that every machine fits the same space
    largest_K = direction_EK.abs().argmax(0)
    direction_EK = direction_EK * direction_EK.gather(0, largest_K[None]).sign()
    explained = float(variance_E[:kept].sum() / variance_E.sum())
    return Whitening(mean_E.float(), (direction_EK / variance_E[:kept].sqrt()).float(), explained)
