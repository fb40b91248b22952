"""From LLM embeddings to the SRS's item vectors: whitening, then an adapter (LLMEmb's RAT, AlphaFuse's null space).

Shapes: N items, E LLM width, K whitened width, V items + 1 (row 0 is padding), D SRS width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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


class MlpAdapter(nn.Module):
    """Linear, GELU, LayerNorm, Linear: two linear maps without an activation between would be one."""

    def __init__(self, white: int, hidden: int, width: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, width)
        # vectors start at the size of a fresh ID table's
        nn.init.normal_(last.weight, std=0.02 / hidden**0.5)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(white, hidden), nn.GELU(), nn.LayerNorm(hidden), last)

    def forward(self, white_NK: Tensor) -> Tensor:
        """white_NK -> emb_ND."""
        emb_ND: Tensor = self.net(white_NK)
        return emb_ND


class TextItems(nn.Module):
    """Items that are their text alone: a frozen whitened table, bent by a trained adapter."""

    white_VK: Tensor

    def __init__(self, white_NK: Tensor, adapter: nn.Module, *, unit: bool = False) -> None:
        super().__init__()
        self.rows = len(white_NK) + 1
        self.unit = unit
        """Whether vectors have length one, as a cosine softmax wants them."""
        # rebuilt from `llm_embeddings` wherever it is needed: no part of the recommender's weights
        self.register_buffer("white_VK", torch.cat([torch.zeros_like(white_NK[:1]), white_NK]), persistent=False)
        self.adapter = adapter

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        emb: Tensor = self.project(self.white_VK[items]) * (items != 0).unsqueeze(-1)
        return emb

    def project(self, white_NK: Tensor) -> Tensor:
        """Whitened text -> vectors, also of items that were never met."""
        emb_ND: Tensor = self.adapter(white_NK)
        return F.normalize(emb_ND, dim=-1) if self.unit else emb_ND

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        emb_ND = self.project(self.white_VK[1:])
        return torch.cat([torch.zeros_like(emb_ND[:1]), emb_ND])


class ResidualItems(TextItems):
    """Text bent by an adapter, plus a learned ID part that starts at zero: what logs know of an item beyond its text.

    A cold item is its text alone. So that text keeps carrying on its own, training drops each ID part now and then
    (DropoutNet, Volkovs et al., NeurIPS 2017).
    """

    def __init__(self, white_NK: Tensor, adapter: nn.Module, width: int, drop: float = 0.0) -> None:
        super().__init__(white_NK, adapter)
        self.drop = drop
        self.learned = nn.Parameter(torch.zeros(self.rows, width))

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        return super().forward(items) + self.kept(F.embedding(items, self.learned, padding_idx=0))

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return super().table() + self.kept(self.learned)

    def kept(self, learned: Tensor) -> Tensor:
        """ID parts, in training each dropped with probability `drop`."""
        if not (self.training and self.drop):
            return learned
        return learned * (torch.rand_like(learned[..., :1]) >= self.drop)


class NullSpaceItems(nn.Module):
    """AlphaFuse (SIGIR 2025): frozen text in the strongest directions, a learned ID part in the directions text leaves empty.

    The text part is scaled to the size of a fresh ID table. A cold item has no ID part: zeros stand there.
    """

    text_VK: Tensor

    def __init__(self, white_NK: Tensor, width: int, text_width: int) -> None:
        super().__init__()
        if not 0 < text_width < width:
            raise ValueError(f"text_width {text_width} is not between 0 and the width {width}: leave room for both parts")
        self.rows, self.text_width = len(white_NK) + 1, min(text_width, white_NK.shape[1])
        text_NK = self.text(white_NK)
        self.register_buffer("text_VK", torch.cat([torch.zeros_like(text_NK[:1]), text_NK]), persistent=False)
        self.learned = nn.Parameter(torch.zeros(self.rows, width - self.text_width))

    def text(self, white_NK: Tensor) -> Tensor:
        """The frozen part of items: their strongest whitened directions."""
        return white_NK[:, : self.text_width] * TEXT_SCALE

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        return F.embedding(items, self.table(), padding_idx=0)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return torch.cat([self.text_VK, self.learned], dim=1)


TEXT_SCALE = 0.05
