"""Measures SCFT steps against the reference recipe at equal views and global batch; prints one JSON line.

python tests/benchmarks/bench_scft.py --model 7b                      one GPU, LLaMA-7B's architecture with random weights
python tests/benchmarks/bench_scft.py --model 7b --variants compiled --batch 512     a batch past memory, by gradient caching
torchrun --nproc-per-node 2 tests/benchmarks/bench_scft.py --model 7b --variants compiled

`reference` is LLMEmb's recipe: PEFT's LoRA r 8 on seven maps, the domain sentence before each of two views of 64 items, padded to
the longest, attention as the library it pins has it (eager), gradient checkpointing, the batch as one. `reference_sdpa` is the
same with today's attention. `packed`, `compiled` and `fp8` are ours, `no_dropout` without LoRA's dropout. Tokens are those of the
views alone: neither padding nor the domain sentence counts. Needs torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.processes import join
from models.text.contrastive import info_nce
from models.text.encoder import Encoder, Spec
from models.text.lora import Lora, add_lora
from models.text.lora_layer import LoraLinear
from models.text.prompts import FieldPolicy, Prompts, Texts
from models.text.scft import Scft, Trainer
from models.text.views import views
from tests.benchmarks.bench_embed import SIZES, Ids, Words, build

ITEMS, PIECES, RATIO, DOMAIN = 4096, 6, 0.4, 12


def catalogue(vocabulary: int) -> Texts:
    """Items of six attributes, 92 tokens on average, so that a view has 55."""
    random = np.random.default_rng(0)
    length_P = np.clip(random.lognormal(2.5, 0.6, ITEMS * PIECES), 3, 120)
    length_P = np.maximum(3, length_P * 92 / PIECES / length_P.mean()).astype(np.int64)
    token_P1 = np.concatenate([[0], length_P.cumsum()])
    return Texts(
        token_N=random.integers(10, vocabulary, int(token_P1[-1])).astype(np.int32),
        token_P1=token_P1,
        piece_I1=np.arange(0, ITEMS * PIECES + 1, PIECES),
        known_P=np.arange(ITEMS * PIECES),
        text_I=np.arange(ITEMS),
        empty=0,
    )


def encoder_of(size: str, device: torch.device, dropout: float) -> Encoder:
    """Random weights with LoRA beside them, and a domain sentence of DOMAIN tokens."""
    model = build(size, device)
    lora = Lora(dropout=dropout)
    spec = Spec(base="random", base_sha256="", tokenizer_sha256="", policy=FieldPolicy(), lora=lora, pooling="mean", layers=0,
                max_tokens=512, width=model.config.hidden_size)  # fmt: skip
    torch.manual_seed(0)
    return Encoder(add_lora(model, lora), Words(DOMAIN), spec)


def behind(prefix: int, rows: Prompts) -> Prompts:
    """The rows, each with `prefix` tokens of the domain sentence before it."""
    starts = rows.length_B.cumsum() - rows.length_B
    return Prompts(np.insert(rows.token_T, np.repeat(starts, prefix), 7), rows.length_B + prefix)


def reference(encoder: Encoder, texts: Texts, batch: int, attention: str) -> Callable[[int], int]:
    """A step of the reference recipe; returns the tokens of its views."""
    model = encoder.model
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.__class__ = Linear  # PEFT's own
    model.get_base_model().set_attn_implementation(attention)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def step(number: int) -> int:
        items = np.arange(number * batch, (number + 1) * batch) % ITEMS
        rows, _ = views(texts, np.repeat(items, 2), RATIO, encoder.limit, np.random.default_rng([0, 2, number]))
        ids = Ids(model, behind(DOMAIN, rows))
        features = ids.preprocess([str(row) for row in range(2 * batch)])
        with torch.autocast(encoder.device.type, torch.bfloat16):
            emb_RE = ids({name: value.to(encoder.device) for name, value in features.items()})["sentence_embedding"]
        nothing = torch.zeros(batch, batch, dtype=torch.bool, device=encoder.device)
        optimizer.zero_grad()
        info_nce(emb_RE[0::2], emb_RE[1::2], torch.tensor(20.0, device=encoder.device), nothing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return int(rows.length_B.sum())

    return step


def ours(encoder: Encoder, texts: Texts, batch: int, name: str) -> tuple[Callable[[int], int], Trainer]:
    """A step of our trainer; returns the tokens of its views."""
    config = Scft(steps=1000, batch=batch, ratio=RATIO, compile=name != "packed", fp8="fp8" in name)
    trainer = Trainer(encoder, texts, np.arange(ITEMS), config, seed=0)

    def step(_: int) -> int:
        before = trainer.tokens_done
        with disable_input_dtype_casting(encoder.model):
            trainer.train_step()
        return trainer.tokens_done - before

    return step, trainer


def measure(name: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Speed of a variant's steps after the warm-up, and the memory it took."""
    encoder = encoder_of(arguments.model, device, 0.0 if name.endswith("no_dropout") else 0.1)
    texts = catalogue(SIZES[arguments.model]["vocab_size"])
    trainer = None
    if name.startswith("reference"):
        step = reference(encoder, texts, arguments.batch, "sdpa" if name.endswith("sdpa") else "eager")
    else:
        step, trainer = ours(encoder, texts, arguments.batch, name)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    first = 0.0
    for number in range(arguments.warm_up):
        step(number)
        if not number:
            synchronize(device)
            first = time.perf_counter() - started
    synchronize(device)
    # one reading over all steps: a step may overlap with the next
    clock, tokens, taken = time.perf_counter(), 0, 0
    while taken < arguments.steps and (taken < 3 or time.perf_counter() - started < arguments.limit):
        tokens += step(arguments.warm_up + taken)
        taken += 1
    synchronize(device)
    seconds = time.perf_counter() - clock
    result: dict[str, Any] = {
        "tokens_per_s": round(tokens / seconds),
        "seconds_a_step": round(seconds / taken, 4),
        "steps": taken,
        "first_step_s": round(first, 1),
        "with_warm_up_s": round(time.perf_counter() - started, 1),
    }
    if trainer:
        result |= {"recomputed_layers": trainer.memory.recomputed, "halvings": trainer.memory.halvings}
    if device.type == "cuda":
        result["peak_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 1)
    return result


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Prints one JSON line (under torchrun the first process does)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64, help="items of a step over all GPUs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--limit", type=float, default=110, help="seconds after which a variant stops early")
    parser.add_argument("--variants", default="reference,reference_sdpa,packed,compiled,fp8,fp8_no_dropout")
    arguments = parser.parse_args()
    rank, world = join()
    device = torch.device(arguments.device, rank) if arguments.device == "cuda" else torch.device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "model": arguments.model, "batch": arguments.batch, "processes": world,
    }  # fmt: skip
    for name in arguments.variants.split(","):
        try:
            result[name] = measure(name, arguments, device)
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not rank:
            print(f"{name}: {result[name]}", file=sys.stderr, flush=True)
    if not rank:
        print(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
