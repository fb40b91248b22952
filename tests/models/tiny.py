"""Small random models with a byte tokenizer, saved as a hub would hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from models.behaviour.recommender import Recommender, score
from models.text.base_model import base_sha256, load_base, tokenizer_sha256
from models.text.encoder import Encoder, Spec
from models.text.lora import Lora, add_lora
from models.text.prompts import FieldPolicy

CPU = torch.device("cpu")
POLICY = FieldPolicy(domain="Item:")


def tokenizer(special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a byte; with `special` the first opens and the second closes every text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, "<|end|>", *special]
    made = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named: dict[str, str] = {"eos_token": "<|end|>"}
    if special:
        named |= {"cls_token": special[0], "sep_token": special[1]}
        pairs = [(name, names.index(name)) for name in special]
        made.post_processor = processors.TemplateProcessing(single=f"{special[0]} $A {special[1]}", special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def llama(folder: Path, *, seed: int = 0, vocabulary: int = 320, **more: Any) -> Path:
    """A decoder of two layers with grouped queries, RoPE and no pad token."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                             "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip
    config = LlamaConfig(vocab_size=vocabulary, initializer_range=0.2, **(sizes | more))
    LlamaModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """A bidirectional encoder of two layers with special tokens at both ends."""
    torch.manual_seed(1)
    config = BertConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                        max_position_embeddings=256, initializer_range=0.2)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer(("[CLS]", "[SEP]")).save_pretrained(folder)
    return folder


def roberta(folder: Path) -> Path:
    """The same with positions counted from behind the padding index 1 (a quotation mark: no text here has one)."""
    torch.manual_seed(3)
    config = RobertaConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                           max_position_embeddings=258, initializer_range=0.2, pad_token_id=1)  # fmt: skip
    RobertaModel(config).save_pretrained(folder)
    tokenizer(("<s>", "</s>")).save_pretrained(folder)
    return folder


def encoder(base: Path, *, lora: Lora | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> Encoder:
    """An encoder of such a model, LoRA weights beside it where given."""
    model, words, folder = load_base(str(base), device=CPU, dtype=dtype)
    torch.manual_seed(2)
    known: dict[str, Any] = {"base": str(base), "base_sha256": base_sha256(folder), "tokenizer_sha256": tokenizer_sha256(words),
                             "policy": POLICY, "lora": lora, "pooling": "mean", "layers": 0, "max_tokens": 256,
                             "width": model.config.hidden_size}  # fmt: skip
    return Encoder(add_lora(model, lora) if lora else model, words, Spec(**(known | more))).eval()


def items(count: int) -> list[list[tuple[str, str]]]:
    """Items of three attributes, all different."""
    return [
        [("title", f"film {number * 7919}"), ("year", str(1950 + number % 50)), ("kind", "abcdefgh"[number % 8])]
        for number in range(count)
    ]


def scores_of(recommender: Recommender, input_BL: torch.Tensor) -> torch.Tensor:
    """scores_BV of all items after histories of item indices."""
    return score(recommender.encode(input_BL), recommender.item_table())
