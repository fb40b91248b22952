"""Items that a sequence encoder knows by their codes alone: a learned vector for each entry of each book (MoC, arXiv 2410.09560).

With books of its own it is a source like any other: a new item's text is coded by them, so it needs no event to have a vector.

Shapes: N items, K books, V items + 1 (row 0 is padding), E whitened width, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.behaviour.codes import Books, Codes, fit_books


class CodeItems(nn.Module):
    """Items that are their codes alone: the mean of one learned vector a book. Items of the same codes are one to it."""

    code_VK: Tensor
    spread_E: Tensor

    def __init__(self, code_NK: Tensor, entries: int, width: int, *, unit: bool = False) -> None:
        super().__init__()
        self.rows, self.entries, self.unit = len(code_NK) + 1, entries, unit
        self.books: Books | None = None
        """What codes texts; None where codes come from elsewhere, and items are known by their index."""
        # made again from the texts wherever it is needed
        self.register_buffer("code_VK", F.pad(self.placed(code_NK.long()), (0, 0, 1, 0)), persistent=False)
        self.learned = nn.Embedding(entries * code_NK.shape[1], width)
        # a mean of K has the size of a fresh ID table's vectors
        nn.init.normal_(self.learned.weight, std=0.02 * code_NK.shape[1] ** 0.5)

    def placed(self, code_NK: Tensor) -> Tensor:
        """Each book has places of its own in one table."""
        return code_NK + self.entries * torch.arange(code_NK.shape[1], device=code_NK.device)

    def read(self, place_NK: Tensor) -> Tensor:
        """Vectors of places in the table, one dimension for K fewer and one for D more."""
        emb: Tensor = self.learned(place_NK).mean(-2)
        return F.normalize(emb, dim=-1) if self.unit else emb

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        return self.read(self.code_VK[items]) * (items != 0).unsqueeze(-1)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        table_VD: Tensor = self(torch.arange(self.rows, device=self.code_VK.device))
        return table_VD

    def project(self, white_NE: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items by what the books make of their texts; without books, of items by their index."""
        if self.books is None:
            emb_ND: Tensor = self(row_N)
            return emb_ND
        return self.read(self.placed(self.books.encode(white_NE * self.spread_E)))


def code_items(
    config: Mapping[str, Any], width: int, catalogue: int, white_NE: Tensor, spread_E: Tensor | None, *, unit: bool
) -> CodeItems:
    """Items by codes of their texts, with fresh books; without texts, places for the weights of a source that was kept.

    `config` holds the values of `Codes`. Books read texts as they were before whitening, which makes weak directions as wide as
    strong ones: `spread_E` undoes that. Raises ValueError for fewer different texts than a book has entries.
    """
    known = Codes(**{key.name: config[key.name] for key in dataclasses.fields(Codes) if key.name in config})
    spread_E = torch.ones(white_NE.shape[1], device=white_NE.device) if spread_E is None else spread_E
    if len(white_NE):
        text_NE = white_NE * spread_E
        books = fit_books(text_NE, known, seed=0)
        code_NK = books.encode(text_NE)
    else:
        books = Books(known.books, known.entries, white_NE.shape[1], heads=known.apart)
        code_NK = torch.zeros(catalogue, known.books, dtype=torch.int64)
    items = CodeItems(code_NK, known.entries, width, unit=unit)
    items.register_buffer("spread_E", spread_E)
    items.books = books.requires_grad_(False)
    return items
