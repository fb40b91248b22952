"""SASRec: a causal Transformer over a user's item vectors (Kang and McAuley, arXiv 1808.09781).

Shapes: B rows, L positions (newest last, LEFT-padded), D width, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_mask(valid_BL: Tensor, *, causal: bool) -> Tensor:
    """mask_B1LL, True where a query may look: at valid keys, not after itself, and always at itself.

    The last clause gives padding something to look at: a row of nothing but False is NaN in softmax.
    """
    length = valid_BL.shape[1]
    itself_LL = torch.eye(length, dtype=torch.bool, device=valid_BL.device)
    seen_BLL = valid_BL[:, None, :].expand(-1, length, -1)
    if causal:
        seen_BLL = seen_BLL & torch.ones_like(itself_LL).tril()
    return (seen_BLL | itself_LL)[:, None]


class Block(nn.Module):
    """One pre-norm Transformer block: attention, then a feed-forward net."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} does not divide into {heads} heads: choose another width or number of heads")
        self.heads, self.dropout = heads, dropout
        self.attend_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attend_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x_BLD: Tensor, mask_B1LL: Tensor, newest: int = 0) -> Tensor:
        """x_BLD -> x_BLD; a query sees the keys that its row of the mask allows. `newest` gives as many last positions alone."""
        x_BLD = x_BLD[:, -newest:] + self.attend(self.attend_norm(x_BLD), mask_B1LL[:, :, -newest:], newest)
        fed: Tensor = x_BLD + self.feed(self.feed_norm(x_BLD))
        return fed

    def attend(self, x_BLD: Tensor, mask_B1LL: Tensor, newest: int = 0) -> Tensor:
        """Multi-head attention of x_BLD, or of its `newest` last positions, on all of it."""
        split = self.query_key_value(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed_BHLd = F.scaled_dot_product_attention(
            split[0][:, :, -newest:], split[1], split[2], attn_mask=mask_B1LL, dropout_p=dropout
        )
        return F.dropout(self.attend_out(mixed_BHLd.transpose(1, 2).flatten(-2)), self.dropout, self.training)


def initialise(module: nn.Module) -> None:
    """Small normal weights and zero biases: deep sums then start near the identity."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class SASRec(nn.Module):
    """Position t sees items 0..t and predicts item t + 1."""

    mask_share = 0.0

    def __init__(self, *, width: int, layers: int, heads: int, dropout: float, max_len: int) -> None:
        super().__init__()
        self.max_len, self.dropout = max_len, dropout
        self.scale = math.sqrt(width)
        self.position = nn.Parameter(torch.randn(max_len, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)

    def forward(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """emb_BLD, valid_BL -> hidden_BLD. Positions count back from the newest, so L may be less than max_len."""
        return self.run(emb_BLD, valid_BL)

    def newest(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD after the newest event: the last block needs no other position. What serving and validation ask for."""
        return self.run(emb_BLD, valid_BL, newest=1)[:, -1]

    def run(self, emb_BLD: Tensor, valid_BL: Tensor, newest: int = 0) -> Tensor:
        """hidden_BLD of all positions, or of the `newest` alone."""
        x_BLD = emb_BLD * self.scale + self.position[self.max_len - emb_BLD.shape[1] :]
        x_BLD = F.dropout(x_BLD, self.dropout, self.training)
        mask_B1LL = attention_mask(valid_BL, causal=True)
        for number, block in enumerate(self.blocks, start=1):
            x_BLD = block(x_BLD, mask_B1LL, newest if number == len(self.blocks) else 0)
        hidden_BLD: Tensor = self.norm(x_BLD)
        return hidden_BLD
