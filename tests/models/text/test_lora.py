"""LoRA's own arithmetic: PEFT's numbers, dropout from a seed, and gradients through maps in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from models.text import fp8
from models.text.base_model import layers_of
from models.text.embedding import embed
from models.text.encoder import Encoder
from models.text.lora import Lora, lora_state
from models.text.lora_dropout import SeededDropout, Seeds
from models.text.lora_layer import LoraLinear
from models.text.low_rank import narrow_product
from models.text.prompts import prompts
from models.text.scft import Scft, Trainer
from tests.models import tiny


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    return tiny.llama(tmp_path / "base")


def moved(encoder: Encoder) -> Encoder:
    """The encoder with LoRA weights that change something."""
    torch.manual_seed(3)
    for name, value in encoder.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    return encoder


def gradients(encoder: Encoder, backend: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings of some items in training, and the gradient of a function of them."""
    for layer in layers_of(encoder.model) if backend else ():
        layer.compile(backend=backend, dynamic=True)
    texts = encoder.tokenize(tiny.items(6))
    rows, _ = prompts(texts, np.arange(6), encoder.limit)
    emb_BE = encoder.train()(encoder.step(rows))
    emb_BE.square().sum().backward()
    found = {name: value.grad for name, value in encoder.model.named_parameters() if value.grad is not None}
    return emb_BE.detach(), found


@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_embeddings_and_gradients_are_those_of_pefts_layer(base: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    torch._dynamo.reset()
    ours, ours_of = gradients(moved(tiny.encoder(base, lora=Lora(dropout=0.0))), backend)
    monkeypatch.setattr(LoraLinear, "forward", Linear.forward)
    theirs, theirs_of = gradients(moved(tiny.encoder(base, lora=Lora(dropout=0.0))))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours_of.keys() == theirs_of.keys() and len(ours_of) == 2 * 7 * 2
    for name, value in ours_of.items():
        # of the largest entry: small ones are sums that nearly cancel
        torch.testing.assert_close(value, theirs_of[name], rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


def test_a_turned_off_adapter_leaves_the_base_model(base: Path) -> None:
    encoder, plain = moved(tiny.encoder(base, lora=Lora())), tiny.encoder(base)
    source, _ = prompts(plain.tokenize(tiny.items(4)), np.arange(4), plain.limit)
    with encoder.model.disable_adapter():  # type: ignore[operator]
        off = embed(encoder, source)
    np.testing.assert_allclose(off, embed(plain, source), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_a_narrow_product_is_a_product_in_compiled_code_too(rank: int) -> None:
    torch.manual_seed(0)
    left, right = torch.randn(9, rank), torch.randn(rank, 7)
    compiled: Any = torch.compile(narrow_product, backend="aot_eager")
    torch.testing.assert_close(compiled(left, right), left @ right, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_drops_its_share_keeps_the_mean_and_does_nothing_in_evaluation() -> None:
    dropout = SeededDropout(0.1, torch.tensor(5, dtype=torch.int32))
    states = torch.ones(1, 400, 300)
    dropped = dropout(states)
    assert float((dropped == 0).float().mean()) == pytest.approx(0.1, abs=0.003)
    assert float(dropped.mean()) == pytest.approx(1, abs=0.004)
    # no row, no column and no pair of rows stands out: five standard deviations of a fair draw
    kept_TI = (dropped[0] > 0).float()
    assert float((kept_TI.mean(1) - 0.9).abs().max()) < 5 * 0.3 / 300**0.5
    assert float((kept_TI.mean(0) - 0.9).abs().max()) < 5 * 0.3 / 400**0.5
    centred_TI = (kept_TI - 0.9) / 0.3
    for one_NK in (centred_TI, centred_TI.T):
        pairs_NN = (one_NK @ one_NK.T / one_NK.shape[1] ** 0.5).fill_diagonal_(0)
        assert float(pairs_NN.abs().max()) < 6 and float(pairs_NN.std()) == pytest.approx(1, abs=0.05)
    assert dropout.eval()(states) is states


def test_a_seed_makes_the_mask_compiled_or_not_and_passes_its_gradient() -> None:
    seed = torch.tensor(5, dtype=torch.int32)
    dropout = SeededDropout(0.3, seed)
    states = torch.randn(6, 50, requires_grad=True)
    first = dropout(states)
    first.sum().backward()
    assert states.grad is not None and bool(((states.grad == 0) == (first == 0)).all())
    compiled: Any = torch.compile(dropout, backend="aot_eager")
    assert torch.equal(compiled(states), first) and torch.equal(dropout(states), first)
    seed += 1
    assert not torch.equal(dropout(states) == 0, first == 0)


def test_every_layer_has_a_mask_of_its_own_that_one_seed_sets(base: Path) -> None:
    encoder = tiny.encoder(base, lora=Lora(dropout=0.5)).train()
    seeds = Seeds(layers_of(encoder.model), encoder.device)
    found = [[module for module in layer.modules() if isinstance(module, SeededDropout)] for layer in layers_of(encoder.model)]
    assert [len(dropouts) for dropouts in found] == [7, 7]
    states = torch.ones(40, 32)

    def masks(seed: int) -> list[Tensor]:
        seeds.set(seed)
        return [dropouts[0](states) for dropouts in found]

    first, again, other = masks(2**32 - 1), masks(2**32 - 1), masks(0)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], other[0])


# ---------------------------------------------------------------------------------------------------------------- 8 bits


def test_the_gradient_through_a_map_in_8_bits_is_near_the_exact_one() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).requires_grad_(False)
    eighth = fp8.Fp8Linear(linear, trained_through=True)
    results = []
    for maps in (linear, eighth):
        states = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = maps(states)
        (out.float() ** 2).sum().backward()
        assert states.grad is not None
        results.append((out.detach().float(), states.grad))
    for exact, near in zip(*results, strict=True):
        assert near.shape == exact.shape
        assert float(F.cosine_similarity(exact.flatten(), near.flatten(), dim=0)) > 0.998
        assert float((exact - near).norm() / exact.norm()) < 0.06


@pytest.mark.parametrize("rank", [8, 16])
def test_scft_in_8_bits_learns_as_in_full_and_only_frozen_maps_are_turned(
    base: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    monkeypatch.setattr(fp8, "check_device", lambda device: None)
    losses = []
    for turned in (False, True):
        encoder = tiny.encoder(base, lora=Lora(r=rank, dropout=0.0), dtype=torch.bfloat16)
        names = lora_state(encoder.model).keys()
        config = Scft(steps=12, batch=16, ratio=0.1, learning_rate=5e-3, compile=False, fp8=turned)
        trainer = Trainer(encoder, encoder.tokenize(tiny.items(40)), np.arange(40), config, seed=1)
        losses.append([trainer.train_step() for _ in range(config.steps)])
        maps = [module for module in encoder.model.modules() if isinstance(module, fp8.Fp8Linear)]
        assert len(maps) == (14 if turned else 0)
        assert lora_state(encoder.model).keys() == names
    exact, near = losses
    assert near == pytest.approx(exact, rel=0.15) and near[-1] < near[0]


def test_8_bits_need_a_gpu(base: Path) -> None:
    encoder = tiny.encoder(base, lora=Lora())
    with pytest.raises(ValueError, match="set fp8 to false"):
        Trainer(encoder, encoder.tokenize(tiny.items(20)), np.arange(20), Scft(fp8=True), seed=1)
