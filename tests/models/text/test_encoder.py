"""Encoder: the artifact gives back the embeddings it was judged by, or says why it can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.text import packing
from models.text.base_model import base_folder, base_sha256, is_causal, layers_of, load_base, tokenizer_sha256
from models.text.embedding import check_packing, compile_layers, embed, embed_items
from models.text.encoder import WEIGHTS, Encoder, load_encoder, save_encoder
from models.text.fp8 import agreement, convert, quantized
from models.text.lora import Lora, lora_state, update_norm
from models.text.prompts import FieldPolicy, prompts
from tests.models import tiny
from tests.models.tiny import CPU


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "base")


def kept(base: Path, folder: Path, *, strength: float = 0.3, **more: Any) -> tuple[Path, Encoder]:
    """An artifact whose LoRA weights do something, and the encoder it was written from."""
    encoder = tiny.encoder(base, lora=Lora(dropout=0.0), **more)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in encoder.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=strength)
    folder.mkdir()
    save_encoder(folder, encoder.spec, lora_state(encoder.model))
    return folder, encoder


def test_a_reloaded_encoder_embeds_as_the_one_that_was_saved_merged_or_not(base: Path, tmp_path: Path) -> None:
    path, encoder = kept(base, tmp_path / "artifact")
    wanted = embed_items(encoder, tiny.items(7))
    for merge in (True, False):
        loaded = load_encoder(path, device=CPU, dtype=torch.float32, merge=merge)
        assert loaded.spec == encoder.spec
        np.testing.assert_allclose(embed_items(loaded, tiny.items(7)), wanted, atol=1e-4)
    assert not np.allclose(embed_items(tiny.encoder(base), tiny.items(7)), wanted, atol=1e-2)


def test_equal_weights_leave_equal_bytes(base: Path, tmp_path: Path) -> None:
    one, two = (kept(base, tmp_path / name)[0] for name in "ab")
    assert [file.read_bytes() for file in sorted(one.iterdir())] == [file.read_bytes() for file in sorted(two.iterdir())]


def test_a_zero_shot_encoder_is_the_base_model(base: Path, tmp_path: Path) -> None:
    encoder = tiny.encoder(base)
    (tmp_path / "artifact").mkdir()
    save_encoder(tmp_path / "artifact", encoder.spec, None)
    loaded = load_encoder(tmp_path / "artifact", device=CPU, dtype=torch.float32)
    np.testing.assert_allclose(embed_items(loaded, tiny.items(3)), embed_items(encoder, tiny.items(3)), atol=1e-5)


def damaged(path: Path, change: str) -> None:
    """Breaks the artifact's LoRA weights."""
    state = load_file(path / WEIGHTS)
    first = sorted(state)[0]
    if change == "missing":
        del state[first]
    elif change == "unexpected":
        state["base_model.model.layers.9.self_attn.q_proj.lora_A.weight"] = state[first].clone()
    elif change == "shape":
        state[first] = state[first][:, :-1].contiguous()
    elif change == "nan":
        state[first] = torch.full_like(state[first], torch.nan)
    else:
        state = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in state.items()}
    save_file(state, path / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("missing", "1 keys missing"),
        ("unexpected", "1 unexpected"),
        ("shape", "the base needs"),
        ("nan", "not finite"),
        ("zero", "no effect"),
    ],
)
def test_lora_weights_that_do_not_fit_or_do_nothing_are_refused(base: Path, tmp_path: Path, change: str, why: str) -> None:
    path, _ = kept(base, tmp_path / "artifact")
    damaged(path, change)
    with pytest.raises(ValueError, match=why):
        load_encoder(path, device=CPU)


def test_an_artifact_without_its_weights_is_refused(base: Path, tmp_path: Path) -> None:
    path, _ = kept(base, tmp_path / "artifact")
    (path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="not whole"):
        load_encoder(path, device=CPU)
    with pytest.raises(ValueError, match="no encoder"):
        load_encoder(tmp_path, device=CPU)


def test_another_base_model_under_the_same_name_is_refused(base: Path, tmp_path: Path) -> None:
    path, _ = kept(base, tmp_path / "artifact")
    tiny.llama(base, seed=9)
    with pytest.raises(ValueError, match="was trained on"):
        load_encoder(path, device=CPU)


def test_another_tokenizer_of_the_same_size_is_refused(base: Path, tmp_path: Path) -> None:
    path, _ = kept(base, tmp_path / "artifact")
    tiny.tokenizer(("[CLS]", "[SEP]")).save_pretrained(base)
    with pytest.raises(ValueError, match="was trained with"):
        load_encoder(path, device=CPU)


def test_a_tokenizer_with_more_tokens_than_the_weights_have_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the weights have 200 rows"):
        load_base(str(tiny.llama(tmp_path / "small", vocabulary=200)), device=CPU)


def test_a_base_model_that_is_nowhere_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="give a path or `embedded`"):
        base_folder("nobody/nothing-of-the-kind")


def test_a_hash_is_remembered_until_the_weights_change(base: Path, tmp_path: Path) -> None:
    first = base_sha256(base)
    assert base_sha256(base) == first
    assert len(list((tmp_path / "cache" / "sha256").iterdir())) == 1
    tiny.llama(base, seed=3)
    assert base_sha256(base) != first


def test_tokenizers_differ_by_their_vocabulary_or_by_what_they_do() -> None:
    assert tokenizer_sha256(tiny.tokenizer()) == tokenizer_sha256(tiny.tokenizer())
    assert tokenizer_sha256(tiny.tokenizer()) != tokenizer_sha256(tiny.tokenizer(("[CLS]", "[SEP]")))


def test_lora_lies_on_all_seven_linear_maps_of_a_decoder_and_those_of_other_models(base: Path, tmp_path: Path) -> None:
    names = {name.split(".")[-3] for name in lora_state(tiny.encoder(base, lora=Lora()).model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    bert = lora_state(tiny.encoder(tiny.bert(tmp_path / "bert"), lora=Lora()).model)
    assert len(bert) == 2 * 2 * 6  # A and B, two layers, six maps


def test_the_norm_of_the_update_is_that_of_the_product() -> None:
    torch.manual_seed(0)
    state: dict[str, Tensor] = {"x.lora_A.weight": torch.randn(3, 7), "x.lora_B.weight": torch.randn(5, 3)}
    product = state["x.lora_B.weight"] @ state["x.lora_A.weight"]
    assert update_norm(state) == pytest.approx(float(product.norm()), rel=1e-5)


def test_fewer_layers_are_the_lower_ones(base: Path) -> None:
    model, _, _ = load_base(str(base), device=CPU, dtype=torch.float32, layers=1)
    assert len(layers_of(model)) == 1


def test_layers_that_are_left_out_are_no_news_and_weights_that_are_missing_are(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_base(str(base), device=CPU, dtype=torch.float32, layers=1)
    assert "LOAD REPORT" not in caplog.text
    weights = load_file(base / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    load_base(str(base), device=CPU, dtype=torch.float32)
    assert "LOAD REPORT" in caplog.text and "MISSING" in caplog.text


def test_more_layers_than_the_base_has_are_refused_instead_of_made_up(base: Path) -> None:
    with pytest.raises(ValueError, match="has 2 layers, not 3: the others would be random"):
        load_base(str(base), device=CPU, dtype=torch.float32, layers=3)


def test_embeddings_come_in_the_order_of_the_prompts_and_out_of_memory_halves_the_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny.encoder(base)
    whole, _ = prompts(encoder.tokenize(tiny.items(11)), np.arange(11), encoder.limit)
    wanted = embed(encoder, whole)
    forward, sizes = Encoder.forward, []

    def tight(self: Encoder, step: packing.Step) -> Tensor:
        sizes.append(len(step.length_B))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("no room")
        return forward(self, step)

    monkeypatch.setattr(Encoder, "forward", tight)
    np.testing.assert_allclose(embed(encoder, whole), wanted, atol=1e-4)
    assert sizes[0] == 11 and min(sizes) > 0


def test_a_single_prompt_that_does_not_fit_raises(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(base)

    def never(self: Encoder, step: packing.Step) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Encoder, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        embed_items(encoder, tiny.items(3))


def test_a_model_that_lets_items_see_each_other_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(base)
    whole, _ = prompts(encoder.tokenize(tiny.items(6)), np.arange(6), encoder.limit)
    assert check_packing(encoder, whole) > 0.9999
    forward = Encoder.forward

    def mixing(self: Encoder, step: packing.Step) -> Tensor:
        emb_BE = forward(self, step)
        return emb_BE + 3 * emb_BE.mean(0) * (len(emb_BE) > 1) * torch.arange(len(emb_BE))[:, None]

    monkeypatch.setattr(Encoder, "forward", mixing)
    with pytest.raises(ValueError, match="cannot be packed"):
        check_packing(encoder, whole)


def test_a_domain_sentence_that_fills_the_window_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="fills max_tokens = 16"):
        tiny.encoder(base, policy=FieldPolicy(domain="x" * 40), max_tokens=16)


def test_a_model_that_does_not_say_whether_it_is_causal_is_refused() -> None:
    with pytest.raises(ValueError, match="take a transformer"):
        is_causal(nn.Linear(2, 2))


def test_steps_of_an_embedding_are_all_of_one_kind_to_compiled_code(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(base)
    made, forward = list[bool](), encoder.forward

    def recorded(step: packing.Step) -> Tensor:
        made.append(step.token_T.is_inference())
        return forward(step)

    monkeypatch.setattr(encoder, "forward", recorded)
    texts = encoder.tokenize(tiny.items(12))
    embed(encoder, prompts(texts, np.arange(12), encoder.limit)[0], budget=40)
    assert len(made) > 2 and len(set(made)) == 1


def test_an_item_of_which_nothing_is_known_has_a_finite_embedding(base: Path) -> None:
    emb_BE = embed_items(tiny.encoder(base), [[], [("title", "Heat")]])
    assert np.isfinite(emb_BE).all() and emb_BE.any(1).all()


def test_bf16_embeddings_are_near_those_in_float32(base: Path) -> None:
    exact, half = (embed_items(tiny.encoder(base, dtype=dtype), tiny.items(5)) for dtype in (torch.float32, torch.bfloat16))
    assert agreement(torch.from_numpy(exact), torch.from_numpy(half), 2)[0] > 0.999


def test_eight_bits_give_values_back_within_a_sixteenth_and_need_a_gpu(base: Path) -> None:
    states_TI = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    eighth, scale = quantized(states_TI)
    torch.testing.assert_close(eighth.float() * scale, states_TI, rtol=1 / 16, atol=0.01)
    with pytest.raises(ValueError, match="set fp8 to false"):
        convert(tiny.encoder(base).model)


def test_agreement_of_an_encoding_with_itself_is_whole_and_with_another_is_not() -> None:
    emb_NE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    assert agreement(emb_NE, emb_NE) == (pytest.approx(1.0), 1.0)
    cosine, overlap = agreement(emb_NE, emb_NE.flip(0))
    assert abs(cosine) < 0.5 and overlap < 0.6


def test_compilation_fills_steps_only_where_attention_takes_any_length(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = tiny.encoder(base)
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    compile_layers(encoder)
    assert encoder.fill == 0
