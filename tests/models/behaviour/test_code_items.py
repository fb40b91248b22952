"""Items by their codes: by index where codes come from elsewhere, by text where books are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.behaviour.code_items import CodeItems, code_items
from models.behaviour.whitening import fit_whitening

CODES = {"books": 2, "entries": 4}


def test_items_of_codes_have_vectors_of_their_codes_and_learn() -> None:
    items = CodeItems(torch.tensor([[0, 1], [0, 1], [1, 1]]), 2, 5)
    assert not items.table()[0].any()
    assert torch.equal(items.table()[1], items.table()[2]) and not torch.equal(items.table()[1], items.table()[3])
    # a book's entry 1 is not the other book's
    torch.testing.assert_close(items.table()[3], (items.learned.weight[1] + items.learned.weight[3]) / 2)
    assert torch.equal(items(torch.tensor([[0, 3]]))[0], items.table()[torch.tensor([0, 3])])
    assert torch.equal(items.project(torch.zeros(2, 1), torch.tensor([3, 0])), items.table()[torch.tensor([3, 0])])
    items.table().sum().backward()
    assert items.learned.weight.grad is not None


def texts(items: int = 60) -> torch.Tensor:
    """Eight places in two strong directions, and weak ones that tell nothing."""
    generator = torch.Generator().manual_seed(0)
    place_PE = 5 * torch.randn(8, 2, generator=generator)
    return torch.cat([place_PE[torch.arange(items) % 8], 0.1 * torch.randn(items, 6, generator=generator)], 1)


def source(llm_NE: torch.Tensor, **more: Any) -> tuple[CodeItems, torch.Tensor]:
    """A source over whitened texts, and these."""
    whitening = fit_whitening(llm_NE, 8)
    white_NE = whitening(llm_NE)
    return code_items(CODES | more, 5, len(llm_NE), white_NE, whitening.spread_K, unit=False), white_NE


def test_a_new_item_has_the_vector_of_its_text_s_codes_and_what_was_trained_is_what_is_projected() -> None:
    items, white_NE = source(texts())
    found_ND = items.project(white_NE, torch.arange(1, 61))
    torch.testing.assert_close(found_ND, items.table()[1:])
    # text decides, not the index
    torch.testing.assert_close(items.project(white_NE[3:5], torch.zeros(2, dtype=torch.int64)), found_ND[3:5])
    assert len(torch.unique(found_ND.detach().round(decimals=5), dim=0)) >= 8


def test_books_read_texts_as_they_were_before_whitening() -> None:
    """Items of one place get the same codes: weak directions, which whitening blows up, tell nothing apart."""
    items, _ = source(texts())
    first_NK = items.code_VK[1:9].repeat(8, 1)[:60]
    assert torch.equal(items.code_VK[1:], first_NK)


def test_training_moves_what_entries_mean_and_never_the_books() -> None:
    items, _ = source(texts())
    assert [name for name, value in items.named_parameters() if value.requires_grad] == ["learned.weight"]


def test_length_one_where_it_is_asked_for_and_padding_stays_zero() -> None:
    whitening = fit_whitening(texts(), 8)
    items = code_items(CODES, 5, 60, whitening(texts()), whitening.spread_K, unit=True)
    torch.testing.assert_close(items.table()[1:].norm(dim=1), torch.ones(60))
    assert not items.table()[0].any()


def test_fewer_texts_than_entries_are_refused_by_count() -> None:
    with pytest.raises(ValueError, match="60 items have 60 different vectors, a book has 64 entries"):
        source(texts(), entries=64)
