"""Where item vectors come from: an index, a text bent by an adapter (LLMEmb's RAT), or both.

Every source knows its items' vectors in training (`forward`, `table`) and, but for the ID table, makes those of items that it
never met from their whitened text (`project`).

Shapes: N items, K whitened width, V items + 1 (row 0 is padding), D SRS width.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_SCALE = 0.05
"""Size of `NullSpaceItems`' text beside a fresh ID table."""


class Items(Protocol):
    """A source of item vectors; index 0 is padding and has a vector of zeros."""

    rows: int

    def __call__(self, items: Tensor) -> Tensor:
        """Vectors of some items, one dimension more."""

    def table(self) -> Tensor:
        """table_VD of all items."""

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items from their whitened text and their index; index 0 stands for an item that was never met."""


class IdItems(nn.Module):
    """Items that are their index alone."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.02)
        with torch.no_grad():
            self.weight[0] = 0.0

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors; the padding row takes no gradient and so stays zero."""
        return F.embedding(items, self.weight, padding_idx=0)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return self.weight

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """An index says nothing of text: raises ValueError."""
        raise ValueError("an ID-only recommender can't project text: give the id of one that `rat` trained")


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
        emb: Tensor = self.bent(self.white_VK[items]) * (items != 0).unsqueeze(-1)
        return emb

    def bent(self, white_NK: Tensor) -> Tensor:
        """Whitened text -> vectors."""
        return self.sized(self.adapter(white_NK))

    def sized(self, emb_ND: Tensor) -> Tensor:
        """The vectors, of length one where that is asked for; zeros stay."""
        return F.normalize(emb_ND, dim=-1) if self.unit else emb_ND

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items; what an item is called does not matter."""
        return self.bent(white_NK)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        emb_ND = self.bent(self.white_VK[1:])
        return torch.cat([torch.zeros_like(emb_ND[:1]), emb_ND])


class ResidualItems(TextItems):
    """Text bent by an adapter, plus a learned ID part that starts at zero: what logs know of an item beyond its text.

    A cold item is its text alone. So that text keeps carrying on its own, training drops each ID part now and then
    (DropoutNet, Volkovs et al., NeurIPS 2017).
    """

    def __init__(self, white_NK: Tensor, adapter: nn.Module, width: int, drop: float = 0.0, *, unit: bool = False) -> None:
        super().__init__(white_NK, adapter, unit=unit)
        self.drop = drop
        self.learned = nn.Parameter(torch.zeros(self.rows, width))

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        return self.sized(super().forward(items) + self.kept(F.embedding(items, self.learned, padding_idx=0)))

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return self.sized(super().table() + self.kept(self.learned))

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items; row 0 stands for those that were never trained."""
        return self.sized(self.bent(white_NK) + self.learned[row_N])

    def kept(self, learned: Tensor) -> Tensor:
        """ID parts, in training each dropped with probability `drop`."""
        if not (self.training and self.drop):
            return learned
        return learned * (torch.rand_like(learned[..., :1]) >= self.drop)


class NullSpaceItems(nn.Module):
    """AlphaFuse (SIGIR 2025): frozen whitened text fills all columns, a learned ID part is added in the last ones.

    The last columns are whitened text's weakest directions, which text leaves almost empty. A cold item is its text alone.
    `added`: as published. Without it, as this project had it before: text in the first columns, scaled to the size of a fresh ID
    table, and the ID part beside it; kept to read old artifacts.
    """

    text_VK: Tensor

    def __init__(self, white_NK: Tensor, width: int, text_width: int, *, added: bool = True, unit: bool = False) -> None:
        super().__init__()
        if not 0 < text_width < width:
            raise ValueError(f"text_width {text_width} is not between 0 and the width {width}: leave room for both parts")
        self.rows, self.width, self.added, self.unit = len(white_NK) + 1, width, added, unit
        self.text_width = text_width if added else min(text_width, white_NK.shape[1])
        text_ND = self.text(white_NK)
        self.register_buffer("text_VK", torch.cat([torch.zeros_like(text_ND[:1]), text_ND]), persistent=False)
        self.learned = nn.Parameter(torch.zeros(self.rows, width - self.text_width))

    def text(self, white_NK: Tensor) -> Tensor:
        """The frozen part of items (N, D): their strongest whitened directions; zeros where there are fewer."""
        text_ND = white_NK[:, : self.width] if self.added else white_NK[:, : self.text_width] * TEXT_SCALE
        return F.pad(text_ND, (0, self.width - text_ND.shape[1]))

    def summed(self, text_ND: Tensor, learned_NI: Tensor) -> Tensor:
        """Text, and the ID part in the last columns."""
        emb_ND = text_ND + F.pad(learned_NI, (self.width - learned_NI.shape[1], 0))
        return F.normalize(emb_ND, dim=1) if self.unit else emb_ND

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items; row 0 stands for those that were never trained."""
        return self.summed(self.text(white_NK), self.learned[row_N])

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        return F.embedding(items, self.table(), padding_idx=0)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return self.summed(self.text_VK, self.learned)


class ShrunkItems(nn.Module):
    """A teacher's vectors shrunk towards what text foretells of them: g id + (1 - g) predicted, g = n / (n + k), n train events.

    A vector learned from few events is mostly noise; an item without events is its prediction (an empirical Bayes estimate).
    Nothing here is trained: `parts.shrunk` fits it in closed form.
    """

    weight: Tensor
    predict_KD: Tensor
    mean_D: Tensor

    def __init__(self, rows: int, white: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("weight", torch.zeros(rows, width))
        self.register_buffer("predict_KD", torch.zeros(white, width))
        self.register_buffer("mean_D", torch.zeros(width))

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        return F.embedding(items, self.weight)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return self.weight

    def predicted(self, white_NK: Tensor) -> Tensor:
        """emb_ND as text alone foretells it."""
        return F.normalize(white_NK, dim=1) @ self.predict_KD + self.mean_D

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items; row 0 stands for those that were never met."""
        return torch.where((row_N != 0)[:, None], self.weight[row_N], self.predicted(white_NK))


class DirectionItems(nn.Module):
    """Text in a few of its whitened directions, of length one, untrained: `parts` chooses the directions."""

    map_KD: Tensor

    def __init__(self, white: int, width: int) -> None:
        super().__init__()
        self.register_buffer("map_KD", torch.zeros(white, width))

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items."""
        return F.normalize(F.normalize(white_NK, dim=1) @ self.map_KD, dim=1)


class TableItems(nn.Module):
    """Vectors that were counted: a fixed table. An item that it lacks has zeros, and so neither gains nor loses by it."""

    weight: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, width))

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of items by their index; text does not matter."""
        return self.weight[row_N]
