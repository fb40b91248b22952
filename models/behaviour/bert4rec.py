"""Bert4Rec: a Transformer that sees both sides of a masked item (Sun et al., arXiv 1904.06690).

Shapes: B rows, L positions (newest last, LEFT-padded), D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.behaviour.sasrec import Block, attention_mask, initialise


class Bert4Rec(nn.Module):
    """Predicts the items behind masks; the next item is a mask after the newest event."""

    mask_share = 0.3
    """Share of the items masked in training."""

    def __init__(self, *, width: int, layers: int, heads: int, dropout: float, max_len: int) -> None:
        super().__init__()
        # one position more than the history: the mask after it
        self.max_len, self.dropout = max_len + 1, dropout
        self.scale = math.sqrt(width)
        self.mask = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(self.max_len, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)

    def forward(self, emb_BLD: Tensor, valid_BL: Tensor, masked_BL: Tensor | None = None) -> Tensor:
        """emb_BLD, valid_BL -> hidden_BLD.

        With masked_BL (training) the vectors there are hidden, and position t predicts item t. Without, a mask is put
        after the newest event and only the last position means anything: it predicts the next item.
        """
        if masked_BL is None:
            emb_BLD = F.pad(emb_BLD, (0, 0, 0, 1))
            valid_BL = F.pad(valid_BL, (0, 1), value=True)
            masked_BL = F.pad(torch.zeros_like(valid_BL[:, 1:]), (0, 1), value=True)
            return self.states(emb_BLD, valid_BL, masked_BL)[:, 1:]
        return self.states(emb_BLD, valid_BL, masked_BL)

    def states(self, emb_BLD: Tensor, valid_BL: Tensor, masked_BL: Tensor) -> Tensor:
        """hidden_BLD with the vectors at masked_BL replaced by the mask's."""
        x_BLD = torch.where(masked_BL[..., None], self.mask.to(emb_BLD.dtype), emb_BLD) * self.scale
        x_BLD = x_BLD + self.position[self.max_len - emb_BLD.shape[1] :]
        x_BLD = F.dropout(x_BLD, self.dropout, self.training)
        mask_B1LL = attention_mask(valid_BL, causal=False)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_B1LL)
        hidden_BLD: Tensor = self.norm(x_BLD)
        return hidden_BLD
