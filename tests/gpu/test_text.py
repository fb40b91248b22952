"""Text models on a GPU: variable-length attention, compiled layers and 8 bits come to what the CPU or the plain path comes to.

Needs torch, transformers, peft, accelerate and pytest; the models are small and random. `make test-gpu` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.text import fp8
from models.text.embedding import compile_layers, embed, embed_items
from models.text.encoder import Encoder
from models.text.lora import Lora
from models.text.prompts import Prompts, prompts
from models.text.scft import Interrupted, Scft, Tuned, fine_tune
from tests.models import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE = torch.device("cuda")
HALF = torch.bfloat16
eight_bits = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9 for 8 bits"
)
SHORT = Scft(
    steps=12, batch=16, ratio=0.1, learning_rate=5e-3, validate_every=6, validation_items=8, candidates=20, compile=False
)


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of one's own, and nothing compiled before."""
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(folder: Path, name: str = "llama", *, device: torch.device = DEVICE, dtype: torch.dtype = HALF, **more: Any) -> Encoder:
    """A tiny encoder on a device; the same weights for the same name."""
    base = folder / name
    if not base.exists():
        # wide enough for 8 bits, grouped queries
        wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96} if name == "llama" else {}
        getattr(tiny, name)(base, **wide)
    return tiny.encoder(base, dtype=dtype, **more).to(device)


def some_prompts(encoder: Encoder, count: int = 40) -> Prompts:
    return prompts(encoder.tokenize(tiny.items(count)), np.arange(count), encoder.limit)[0]


def cosine(one: Any, two: Any) -> float:
    """The smallest cosine between rows."""
    return float(F.cosine_similarity(torch.as_tensor(one).float(), torch.as_tensor(two).float(), dim=1).min())


# --------------------------------------------------------------------------------------------------------------- varlen


@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_float32_embeddings_are_those_of_the_cpu(tmp_path: Path, name: str) -> None:
    wanted = embed_items(made(tmp_path, name, device=tiny.CPU, dtype=torch.float32), tiny.items(30))
    found = embed_items(made(tmp_path, name, dtype=torch.float32), tiny.items(30))
    np.testing.assert_allclose(found, wanted, atol=5e-3)


@pytest.mark.parametrize("fill", [0, 4, 16])
@pytest.mark.parametrize("name", ["llama", "bert", "roberta"])
def test_variable_length_attention_gives_the_embeddings_of_padded_attention_and_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fill: int
) -> None:
    encoder = made(tmp_path, name)
    assert encoder.variable, "this torch has no variable-length attention that agrees with padded attention"
    source = some_prompts(encoder)
    encoder.fill = fill
    assert encoder.step(source).packing.pad_SQ is None
    found = embed(encoder, source)
    few = embed(encoder, source, budget=150)
    monkeypatch.setattr(Encoder, "variable", property(lambda self: False))
    encoder.fill = 0
    padded = embed(encoder, source)
    exact = embed(made(tmp_path, name, device=tiny.CPU, dtype=torch.float32), source)
    assert cosine(found, padded) > 0.999 and cosine(found, few) > 0.999
    # far nearer than two items are to one another
    assert 1 - cosine(found, exact) < 0.2 * (1 - cosine(exact, np.roll(exact, 1, axis=0)))


@pytest.mark.parametrize("fill", [0, 16])
@pytest.mark.parametrize("shape", [{"attention": "both"}, {"suffix_tokens": 3}])
def test_attention_both_ways_and_suffix_tokens_give_the_embeddings_of_padded_attention_and_of_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], fill: int
) -> None:
    encoder = made(tmp_path, **shape)
    source = some_prompts(encoder)
    encoder.fill = fill
    found = embed(encoder, source)
    monkeypatch.setattr(Encoder, "variable", property(lambda self: False))
    encoder.fill = 0
    assert cosine(found, embed(encoder, source)) > 0.999
    exact = embed(made(tmp_path, device=tiny.CPU, dtype=torch.float32, **shape), source)
    assert 1 - cosine(found, exact) < 0.2 * (1 - cosine(exact, np.roll(exact, 1, axis=0)))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_gradients_through_variable_length_attention_are_those_of_padded_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def gradient(fill: int) -> Tensor:
        encoder = made(tmp_path, name)
        encoder.fill = fill
        encoder(encoder.step(some_prompts(encoder, 20))).square().sum().backward()
        found = [value.grad.float().flatten() for value in encoder.model.parameters() if value.grad is not None]
        return torch.cat(found)

    variable, filled = gradient(0), gradient(16)
    monkeypatch.setattr(Encoder, "variable", property(lambda self: False))
    padded = gradient(0)
    for found in (variable, filled):
        assert bool(found.isfinite().all())
        assert float(F.cosine_similarity(found, padded, dim=0)) > 0.99
        assert float((found - padded).norm() / padded.norm()) < 0.1


# -------------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compiled_layers_give_the_embeddings_of_plain_ones(tmp_path: Path, name: str) -> None:
    encoder = made(tmp_path, name)
    source = some_prompts(encoder)
    plain = embed(encoder, source)
    compile_layers(encoder)
    assert encoder.fill
    for budget in (0, 400):
        assert cosine(embed(encoder, source, budget=budget), plain) > 0.999


def tuned(folder: Path, config: Scft, *, dropout: float = 0.0, dtype: torch.dtype = HALF, **more: Any) -> Tuned:
    encoder = made(folder, dtype=dtype, device=more.pop("device", DEVICE), lora=Lora(dropout=dropout))
    return fine_tune(encoder, encoder.tokenize(tiny.items(40)), config, seed=more.pop("seed", 1), log=lambda *_: None, **more)


def changed(**more: Any) -> Scft:
    return Scft(**{**vars(SHORT), **more})


def test_scft_in_float32_has_the_losses_of_the_cpu_dropout_included(tmp_path: Path) -> None:
    found, wanted = (tuned(tmp_path, SHORT, dropout=0.1, dtype=torch.float32, device=device) for device in (DEVICE, tiny.CPU))
    assert found.losses == pytest.approx(wanted.losses, rel=0.03)
    assert tuned(tmp_path, SHORT, dropout=0.1, dtype=torch.float32, seed=2).losses != pytest.approx(wanted.losses, rel=0.03)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_scft_has_the_losses_of_plain_scft_and_learns(tmp_path: Path, dropout: float) -> None:
    plain, compiled = (tuned(tmp_path, changed(compile=compile), dropout=dropout) for compile in (False, True))
    assert compiled.losses[:3] == pytest.approx(plain.losses[:3], rel=0.05)
    assert compiled.losses == pytest.approx(plain.losses, rel=0.2)
    assert np.mean(compiled.losses[-3:]) < np.mean(compiled.losses[:3])


@pytest.mark.parametrize("compile", [False, True])
def test_micro_batches_have_the_losses_of_the_whole_batch(tmp_path: Path, compile: bool) -> None:
    whole, parts = (tuned(tmp_path, changed(compile=compile, tokens=tokens)) for tokens in (0, 300))
    assert parts.losses[:3] == pytest.approx(whole.losses[:3], rel=0.05)
    assert parts.losses == pytest.approx(whole.losses, rel=0.2)


def test_scft_that_was_killed_goes_on_with_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, steps, file = tuned(tmp_path, SHORT, dropout=0.1), iter(range(99)), tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        tuned(tmp_path, SHORT, dropout=0.1, checkpoint=file, stop=lambda: next(steps) >= 6)
    assert tuned(tmp_path, SHORT, dropout=0.1, checkpoint=file).losses == pytest.approx(whole.losses, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------- 8 bits


@eight_bits
def test_a_product_in_8_bits_is_that_of_the_rounded_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    # rows and outputs of very different sizes: a scale that belongs to another row shows
    states_TI = torch.randn(48, 64, generator=generator) * torch.logspace(-2, 2, 48)[:, None]
    weight_OI = torch.randn(32, 64, generator=generator) * torch.logspace(-1, 1, 32)[:, None]
    eighth_TI, scale_T1 = fp8.quantized(states_TI)
    weight8_OI, scale_O1 = fp8.quantized(weight_OI)
    wanted = (eighth_TI.float() * scale_T1) @ (weight8_OI.float() * scale_O1).T
    found = fp8.product(states_TI.to(DEVICE), weight8_OI.to(DEVICE), scale_O1.T.contiguous().to(DEVICE)).float().cpu()
    error = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(error.max()) < 0.02


@eight_bits
def test_a_map_in_8_bits_and_its_gradient_are_near_the_exact_ones() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48).requires_grad_(False).to(DEVICE)
    results = []
    for maps in (linear, fp8.Fp8Linear(linear, trained_through=True)):
        states = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        out = maps(states)
        (out.float() ** 2).sum().backward()
        assert states.grad is not None
        results.append((out.detach().float(), states.grad))
    for exact, near in zip(*results, strict=True):
        assert float((exact - near).norm() / exact.norm()) < 0.06


@eight_bits
@pytest.mark.parametrize("compiled", [False, True])
def test_embeddings_in_8_bits_agree_with_those_in_16(tmp_path: Path, compiled: bool) -> None:
    encoder = made(tmp_path)
    source = some_prompts(encoder)
    exact = embed(encoder, source)
    fp8.convert(encoder.model)
    assert sum(isinstance(module, fp8.Fp8Linear) for module in encoder.model.modules()) == 14
    if compiled:
        compile_layers(encoder)
    found, overlap = fp8.agreement(torch.from_numpy(exact), torch.from_numpy(embed(encoder, source)), 5)
    assert found > 0.98 and overlap > 0.5
    assert found < 1 - 1e-7, "nothing was rounded to 8 bits"


@eight_bits
@pytest.mark.parametrize("compile", [False, True])
def test_scft_in_8_bits_learns_as_in_16(tmp_path: Path, compile: bool) -> None:
    exact, near = (tuned(tmp_path, changed(compile=compile, fp8=turned)).losses for turned in (False, True))
    assert near[:3] == pytest.approx(exact[:3], rel=0.15)
    assert near == pytest.approx(exact, rel=0.35)
    assert np.mean(near[-3:]) < np.mean(near[:3])
