"""How well views find each other, and the gates on it: which encoder is refused, and with which figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.text import view_retrieval
from models.text.prompts import Texts, tokenize
from models.text.scft import Scft
from models.text.view_retrieval import Gates, effective_rank, hold_out_views, refusals, target_ranks, validate_views, view_figures
from tests.models import tiny

SMALL = Scft(validation_items=8, candidates=20, compile=False)
GOOD = {
    "recall_1": 0.5,
    "recall_10": 0.8,
    "mrr": 0.6,
    "alignment": 0.1,
    "uniformity": -2.0,
    "mean_cosine": 0.3,
    "effective_rank": 40.0,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "base")


def some_texts(count: int) -> Texts:
    return tokenize(tiny.items(count), tiny.tokenizer(), tiny.POLICY)


def test_held_out_items_are_not_trained_on_and_stand_first_among_the_candidates() -> None:
    validation, rest = hold_out_views(some_texts(50), SMALL, 200, 0)
    assert len(validation.items) == 8
    assert not set(validation.items) & set(rest)
    assert len(validation.items) + len(rest) == 50
    assert len(validation.candidates.length_B) == 20
    assert hold_out_views(some_texts(50), SMALL, 200, 0)[0].view_a.token_T.tolist() == validation.view_a.token_T.tolist()


def test_validation_reports_its_progress_and_gives_the_same_figures(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, told = tiny.encoder(base), []
    validation, _ = hold_out_views(encoder.tokenize(tiny.items(200)), dataclasses.replace(SMALL, candidates=200), 200, 0)
    monkeypatch.setattr(view_retrieval, "QUIET", 0.0)
    monkeypatch.setattr(view_retrieval, "CPU_TOKENS", 500)
    figures, items_CE = validate_views(encoder, validation, lambda done, total: told.append((done, total)))
    assert len(told) > 5 and told == sorted(told) and told[-1] == (216, 216)
    plain, plain_CE = validate_views(encoder, validation)
    np.testing.assert_allclose(items_CE, plain_CE, atol=1e-5)
    assert figures == pytest.approx(plain, rel=1e-4)
    monkeypatch.setattr(view_retrieval, "QUIET", 1e9)
    told.clear()
    validate_views(encoder, validation, lambda done, total: told.append((done, total)))
    assert told == []


def test_ties_take_their_expected_rank() -> None:
    items = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert target_ranks(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), items, torch.tensor([1, 2])).tolist() == [2.0, 1.0]


def test_a_query_that_is_not_finite_has_no_rank() -> None:
    assert math.isnan(float(target_ranks(torch.tensor([[math.nan, 0.0]]), torch.eye(2), torch.tensor([0]))[0]))


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_the_effective_rank_counts_the_directions_in_use(directions: int) -> None:
    emb_NE = torch.zeros(4000, 8)
    emb_NE[:, :directions] = torch.randn(4000, directions, generator=torch.Generator().manual_seed(0))
    assert effective_rank(emb_NE) == pytest.approx(directions, rel=0.01)


def test_perfect_views_are_found_and_aligned() -> None:
    items = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    found = view_figures(items[:10], items[:10], items, torch.arange(10))
    assert (found["recall_1"], found["mrr"], found["alignment"]) == (1.0, 1.0, 0.0)
    assert abs(found["mean_cosine"]) < 0.1


def refused(moved: float = 0.5, *, zero_shot: bool = False, **changed: float) -> list[str]:
    return refusals({**GOOD, **changed}, GOOD, moved, Gates(), candidates=1000, zero_shot=zero_shot)


def test_an_encoder_as_good_as_the_base_model_passes() -> None:
    assert refused() == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: refused(mean_cosine=0.99), "mean cosine 0.9900"),
        (lambda: refused(effective_rank=1.5), "effective rank 1.50"),
        (lambda: refused(moved=1e-6), "are the base model's"),
        (lambda: refused(recall_1=0.49), "0.4900 < 0.5000"),
        (lambda: refused(uniformity=math.nan), "not finite"),
        (lambda: refused(moved=math.nan), "not finite"),
    ],
)
def test_each_gate_refuses_its_kind_of_bad_encoder_with_the_figures(make: Callable[[], list[str]], why: str) -> None:
    reasons = make()
    assert len(reasons) == 1
    assert why in reasons[0]


def test_a_zero_shot_encoder_need_not_have_moved_and_a_tiny_catalogue_needs_less_rank() -> None:
    assert refused(moved=0.0, zero_shot=True) == []
    assert refusals({**GOOD, "effective_rank": 2.0}, GOOD, 0.5, Gates(), candidates=8) == []


def test_a_collapsed_space_is_refused_from_its_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.ones(50, 16) + 1e-3 * torch.randn(50, 1, generator=generator) * torch.ones(16)
    quality = view_figures(items[:10], items[:10], items, torch.arange(10))
    assert any("collapsed" in reason for reason in refusals(quality, {**GOOD, "recall_1": 0.0}, 0.5, Gates(), candidates=50))
