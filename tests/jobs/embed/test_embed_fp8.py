"""embed's gate of 8 bits: embeddings that differ too much from those in full are refused, each figure by its own bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from jobs import embed
from jobs.run import Refused
from models.text import fp8
from models.text.base_model import layers_of
from tests.jobs.embed.test_embed import changed, config, own_cache, rows

__all__ = ["config", "own_cache"]  # fixtures


def spoil(monkeypatch: pytest.MonkeyPatch, strength: float) -> None:
    """Conversion to 8 bits that errs by a share of each weight, as a GPU would with `strength` near 0.03."""

    def convert(model: nn.Module, **_: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for layer in layers_of(model):
            for weight in layer.parameters():
                weight.data *= 1 + strength * torch.randn(weight.shape, generator=generator).to(weight.dtype)

    monkeypatch.setattr(fp8, "convert", convert)


@pytest.mark.parametrize("bounds", [{"fp8_cosine": 0.99, "fp8_overlap": 0.0}, {"fp8_cosine": -1.0, "fp8_overlap": 0.8}])
def test_embeddings_far_from_those_in_full_are_refused_and_none_is_written(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch, bounds: dict[str, float]
) -> None:
    spoil(monkeypatch, 3.0)
    with pytest.raises(Refused, match="differ too much"):
        embed.run(changed(config, fp8=True, **bounds))
    assert not list((config.run.lake / "llm_embeddings").rglob("*.parquet"))


def test_embeddings_near_those_in_full_pass_with_their_figures(config: embed.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 1e-3)
    result = embed.run(changed(config, fp8=True))
    assert result.fp8_cosine is not None and 0.99 < result.fp8_cosine <= 1 + 1e-6
    assert result.fp8_overlap is not None and 0.8 < result.fp8_overlap <= 1
    assert rows(config).num_rows == result.embedded
