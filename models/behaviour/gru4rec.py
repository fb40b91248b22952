"""GRU4Rec: a recurrent net over a user's item vectors (Hidasi et al., arXiv 1511.06939).

Shapes: B rows, L positions (newest last, LEFT-padded), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def roll_rows(x_BLD: Tensor, shift_B: Tensor) -> Tensor:
    """Rows of x_BLD moved LEFT by shift_B positions, what falls out coming back on the right."""
    length = x_BLD.shape[1]
    from_BL = (torch.arange(length, device=x_BLD.device) + shift_B[:, None]) % length
    return x_BLD.gather(1, from_BL[..., None].expand_as(x_BLD))


class GRU4Rec(nn.Module):
    """The state after event t predicts item t + 1."""

    mask_share = 0.0

    def __init__(self, *, width: int, layers: int, heads: int, dropout: float, max_len: int) -> None:
        super().__init__()
        self.max_len, self.dropout = max_len, dropout
        self.scale = width**0.5
        self.recurrent = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """emb_BLD, valid_BL -> hidden_BLD.

        Rows are moved to the left edge first: padding before the first event would push the state off zero.
        """
        padding_B = (~valid_BL).sum(1)
        x_BLD = roll_rows(emb_BLD * self.scale, padding_B)
        # in float32: cuDNN re-packs the weights at every call under autocast, and small states round away in half precision
        with torch.autocast(emb_BLD.device.type, enabled=False):
            x_BLD = F.dropout(x_BLD.float(), self.dropout, self.training)
            for layer in self.recurrent:
                x_BLD = F.dropout(layer(x_BLD)[0], self.dropout, self.training)
        hidden_BLD: Tensor = self.norm(roll_rows(x_BLD, -padding_B))
        return hidden_BLD
