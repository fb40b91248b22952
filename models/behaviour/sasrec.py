"""SASRec: a causal Transformer over a user's item vectors (Kang and McAuley, arXiv 1808.09781).

Shapes: B rows, L positions (newest last, LEFT-padded), D width, H heads.
"""

from __future__ import annotations

import math
from typing import Any

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

    def forward(self, x_BLD: Tensor, mask_B1LL: Tensor) -> Tensor:
        """x_BLD -> x_BLD; a query sees the keys that its row of the mask allows."""
        x_BLD = x_BLD + self.attend(self.attend_norm(x_BLD), mask_B1LL)
        fed: Tensor = x_BLD + self.feed(self.feed_norm(x_BLD))
        return fed

    def attend(self, x_BLD: Tensor, mask_B1LL: Tensor) -> Tensor:
        """Multi-head attention."""
        split = self.query_key_value(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed_BHLd = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=mask_B1LL, dropout_p=dropout)
        return F.dropout(self.attend_out(mixed_BHLd.transpose(1, 2).flatten(-2)), self.dropout, self.training)


def parts(norm: nn.LayerNorm) -> tuple[tuple[int, ...], Tensor, Tensor, float]:
    """What `layer_norm` asks for."""
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


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
        hidden_BLD: Tensor = self.norm(self.through(self.blocks, emb_BLD, valid_BL))
        return hidden_BLD

    def newest(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD after the newest event: the last block needs no other position. What serving and validation ask for."""
        return self.served().newest(emb_BLD, valid_BL)

    def served(self) -> Newest:
        """The same of weights that no longer change."""
        return Newest(self)

    def through(self, blocks: nn.ModuleList, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """x_BLD of item vectors at their positions, after some blocks."""
        x_BLD = emb_BLD * self.scale + self.position[self.max_len - emb_BLD.shape[1] :]
        x_BLD = F.dropout(x_BLD, self.dropout, self.training)
        if len(blocks):
            mask_B1LL = attention_mask(valid_BL, causal=True)
            for block in blocks:
                x_BLD = block(x_BLD, mask_B1LL)
        return x_BLD


class Newest:
    """`SASRec.newest` of weights that no longer change: products of two of them are made once, which halves what one user takes.

    There is one query, so keys are applied to it and values to the one mix of positions, not both to each position: L x D numbers
    are touched, not L x D x D. The two products are of keys and queries, and of output and values (HD: heads side by side, each D
    wide). The keys' bias would add the same to all scores: softmax ignores it.
    """

    @torch.no_grad()
    def __init__(self, model: SASRec) -> None:
        # looked up once: a module finds its parts slowly
        self.through, self.before = model.through, model.blocks[:-1]
        last: Any = model.blocks[-1]
        self.first, self.second, self.third = parts(last.attend_norm), parts(last.feed_norm), parts(model.norm)
        self.wide, self.narrow = (last.feed[0].weight, last.feed[0].bias), (last.feed[3].weight, last.feed[3].bias)
        heads, width = last.heads, last.attend_norm.normalized_shape[0]
        query_HdD, key_HdD, value_HdD = last.query_key_value.weight.view(3, heads, -1, width)
        query_Hd1, _, value_Hd1 = last.query_key_value.bias.view(3, heads, -1, 1)
        scaled_HDd = key_HdD.transpose(1, 2) / math.sqrt(query_HdD.shape[1])
        self.asked_HDxD = (scaled_HDd @ query_HdD).flatten(0, 1).contiguous()
        self.asked_HD = (scaled_HDd @ query_Hd1).flatten()
        out_HDd = last.attend_out.weight.view(width, heads, -1).transpose(0, 1)
        self.mixed_DxHD = (out_HDd @ value_HdD).transpose(0, 1).flatten(1).contiguous()
        self.mixed_D = (out_HDd @ value_Hd1).sum(0).flatten() + last.attend_out.bias

    def newest(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD, as `SASRec.newest` gives it."""
        x_BLD = self.through(self.before, emb_BLD, valid_BL)
        normed_BLD = F.layer_norm(x_BLD, *self.first)
        asked_BHD = F.linear(normed_BLD[:, -1], self.asked_HDxD, self.asked_HD).view(len(x_BLD), -1, x_BLD.shape[2])
        score_BHL = asked_BHD @ normed_BLD.transpose(1, 2)
        if not valid_BL.all():
            hidden_BL = ~valid_BL
            hidden_BL[:, -1] = False  # itself, also in a row of nothing but padding
            score_BHL = score_BHL.masked_fill(hidden_BL[:, None], -torch.inf)
        mixed_BHD = score_BHL.softmax(-1) @ normed_BLD
        x_BD = x_BLD[:, -1] + F.linear(mixed_BHD.flatten(1), self.mixed_DxHD, self.mixed_D)
        wide_BD = F.gelu(F.linear(F.layer_norm(x_BD, *self.second), *self.wide))
        return F.layer_norm(x_BD + F.linear(wide_BD, *self.narrow), *self.third)
