"""Measures batch embedding against sentence-transformers and the device's matrix rate, on equal token ids; prints one JSON line.

python tests/benchmarks/bench_embed.py --model 7b                     one GPU, LLaMA-7B's architecture with random weights
python tests/benchmarks/bench_embed.py --model smollm2 --prompts 16384
python tests/benchmarks/bench_embed.py --model 7b --processes 2 --variants compiled      one process a GPU, each its share
python tests/benchmarks/bench_embed.py --model smollm2 --device cpu --prompts 64 --variants padded,packed,prefix

Needs torch, transformers, peft and safetensors; sentence-transformers where it is to be compared. Medians of three passes after
a warm-up; `prefix` variants share the first 20 tokens, so they compute that many fewer for every prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.text import fp8
from models.text.attention import ATTENTION, register_attention
from models.text.base_model import layers_of
from models.text.embedding import compile_layers, embed
from models.text.encoder import Encoder, Spec
from models.text.prompts import FieldPolicy, Prompts, spans

PREFIX = 20
SIZES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "vocab_size": 32000},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000},
}  # fmt: skip
DEFAULT = "matrix,sentence_transformers,packed,prefix,compiled,compiled_prefix,fp8,fp8_prefix"


class Words:
    """Stands for a tokenizer: the domain sentence has as many tokens as are to be shared."""

    bos_token_id = cls_token_id = None

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [7] * self.prefix if text else []}


def lengths(count: int) -> np.ndarray:
    """Lognormal lengths, 84 tokens on average, 25 to 400."""
    drawn = np.random.default_rng(0).lognormal(4.3, 0.5, count)
    return np.clip(drawn * 84 / drawn.mean(), 25, 400).astype(np.int64)


def some_prompts(count: int, vocabulary: int) -> Prompts:
    """Prompts whose first PREFIX tokens are the same."""
    length_B = lengths(count)
    token_T = np.random.default_rng(1).integers(10, vocabulary, int(length_B.sum())).astype(np.int32)
    starts = length_B.cumsum() - length_B
    token_T[starts[:, None] + np.arange(PREFIX)] = 7
    return Prompts(token_T, length_B)


def without_prefix(source: Prompts) -> Prompts:
    """The prompts behind their shared tokens."""
    starts = source.length_B.cumsum() - source.length_B
    return Prompts(source.token_T[spans(starts + PREFIX, source.length_B - PREFIX)], source.length_B - PREFIX)


def build(size: str, device: torch.device) -> Any:
    """The architecture with random weights, made on the device."""
    register_attention()
    with device:
        config = LlamaConfig(max_position_embeddings=2048, **SIZES[size])
        return AutoModel.from_config(config, attn_implementation=ATTENTION, dtype=torch.bfloat16).to(device).eval()


def encoder_of(model: Any, prefix: int) -> Encoder:
    """An encoder that reads `prefix` shared tokens before every prompt."""
    spec = Spec(base="random", base_sha256="", tokenizer_sha256="", policy=FieldPolicy(), lora=None, pooling="mean", layers=0,
                max_tokens=2048, width=model.config.hidden_size)  # fmt: skip
    return Encoder(model, Words(prefix), spec).eval()


def seconds(work: Callable[[], object], device: torch.device, passes: int) -> float:
    """Median time of a pass, after one that doesn't count."""
    taken = []
    for _ in range(passes + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def matrix_rate(device: torch.device) -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 bf16 product (1024 on a CPU)."""
    side, times = (8192, 30) if device.type == "cuda" else (1024, 3)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

    def work() -> None:
        for _ in range(times):
            a @ b

    return times * 2 * side**3 / seconds(work, device, 3) / 1e12


# -------------------------------------------------------------------------------------------------------------- variants


class Ids(nn.Module):
    """Gives sentence-transformers token ids for its texts, and the model's states for the ids."""

    def __init__(self, model: Any, source: Prompts) -> None:
        super().__init__()
        self.model = model
        starts = source.length_B.cumsum() - source.length_B
        ends = zip(starts.tolist(), source.length_B.tolist(), strict=True)
        self.rows = [torch.from_numpy(source.token_T[start : start + length].astype(np.int64)) for start, length in ends]

    def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Padded to the longest, as its tokenizers do."""
        rows = [self.rows[int(text)] for text in inputs]
        there = [torch.ones(len(row), dtype=torch.int64) for row in rows]
        return {name: nn.utils.rnn.pad_sequence(part, batch_first=True)
                for name, part in (("input_ids", rows), ("attention_mask", there))}  # fmt: skip

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Mean over the tokens."""
        states = self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"], use_cache=False)
        there = features["attention_mask"][..., None].to(states.last_hidden_state.dtype)
        pooled = (states.last_hidden_state * there).sum(1) / there.sum(1)
        return {**features, "sentence_embedding": pooled.float()}


def sentence_transformers(model: Any, source: Prompts, device: torch.device, how: set[str]) -> Callable[[], object]:
    """sentence-transformers' own encode: sorted by length, padded, batches of 32 or what `how` says, compiled if it says so."""
    from sentence_transformers import SentenceTransformer

    model.set_attn_implementation("sdpa")
    states = torch.compile(model, dynamic=True) if "compiled" in how else model
    library = SentenceTransformer(modules=[Ids(states, source)], device=str(device))
    texts = [str(row).ljust(4 * int(length)) for row, length in enumerate(source.length_B)]
    batch = next((int(word) for word in how if word.isdigit()), 32)
    return lambda: library.encode(texts, batch_size=batch, show_progress_bar=False)


def padded(model: Any, source: Prompts, device: torch.device, batch: int = 32) -> Callable[[], object]:
    """A loop over padded batches in the order given."""
    model.set_attn_implementation("sdpa")
    ids = Ids(model, source)

    @torch.inference_mode()
    def work() -> None:
        for start in range(0, len(ids.rows), batch):
            features = ids.preprocess([str(row) for row in range(start, min(start + batch, len(ids.rows)))])
            ids({name: value.to(device) for name, value in features.items()})["sentence_embedding"].cpu()

    return work


def ours(model: Any, source: Prompts, prefix: int, budget: int) -> Callable[[], object]:
    """Packed steps; with `prefix`, the shared tokens computed once a step."""
    model.set_attn_implementation(ATTENTION)
    encoder = encoder_of(model, prefix)
    if hasattr(model, "rounded"):
        encoder.round_shapes()
    rest = without_prefix(source) if prefix else source
    return lambda: embed(encoder, rest, budget=budget)


def compiled(model: Any) -> None:
    """Compiles the layers, once for all variants."""
    if not hasattr(model, "rounded"):
        compile_layers(encoder_of(model, 0))
        model.rounded = True


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """tokens/s of each variant, counting every prompt's tokens whether they were computed or shared."""
    device = torch.device(arguments.device)
    model = build(arguments.model, device)
    source = some_prompts(arguments.prompts, SIZES[arguments.model]["vocab_size"])
    if arguments.processes > 1:
        source = Prompts(*take_share(source, arguments.process, arguments.processes))
    tokens = int(source.length_B.sum())
    weights = sum(module.weight.numel() for module in layers_of(model).modules() if isinstance(module, nn.Linear))
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "torch": torch.__version__,
        "model": arguments.model, "prompts": len(source.length_B), "tokens": tokens, "shared": PREFIX * len(source.length_B),
        "variable_attention": encoder_of(model, 0).variable,
    }  # fmt: skip
    for name in arguments.variants.split(","):
        started = time.perf_counter()
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            if name == "matrix":
                result["matrix_tflops"] = round(matrix_rate(device), 1)
                continue
            taken = seconds(variant(name, model, source, device, arguments.budget), device, arguments.passes)
            found = {"seconds": round(taken, 4), "tokens_per_s": round(tokens / taken)}
            if "matrix_tflops" in result:
                computed = tokens - (result["shared"] if "prefix" in name else 0)
                found["matrix_share"] = round(2 * weights * computed / taken / 1e12 / result["matrix_tflops"], 3)
            if device.type == "cuda":
                found["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 1)
            result[name] = found | {"with_warm_up_s": round(time.perf_counter() - started, 1)}
        except Exception as error:
            result[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(f"{name}: {result.get(name)}", file=sys.stderr, flush=True)
    return result


def variant(name: str, model: Any, source: Prompts, device: torch.device, budget: int) -> Callable[[], object]:
    """One pass over all prompts. `fp8` turns the model's layers for good: it stands last."""
    if name.startswith("sentence_transformers"):
        return sentence_transformers(model, source, device, set(name.split("_")))
    if name in ("padded", "reference"):
        return padded(model, source, device, batch=4 if name == "reference" else 32)
    if "fp8" in name and not any(isinstance(module, fp8.Fp8Linear) for module in model.modules()):
        fp8.convert(model)
    if "fp8" in name or "compiled" in name:
        compiled(model)
    return ours(model, source, PREFIX if "prefix" in name else 0, budget)


# -------------------------------------------------------------------------------------------------------- several GPUs


def take_share(source: Prompts, process: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Every processes-th prompt."""
    rows = np.arange(process, len(source.length_B), processes)
    starts = source.length_B.cumsum() - source.length_B
    return source.token_T[spans(starts[rows], source.length_B[rows])], source.length_B[rows]


def spread(arguments: argparse.Namespace) -> dict[str, Any]:
    """The same with one process a GPU, at the same time; speeds add up."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    workers = [
        subprocess.Popen(
            [*command, "--process", str(number)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(number)},
        )
        for number in range(arguments.processes)
    ]  # fmt: skip
    results = [json.loads(worker.communicate(timeout=550)[0].splitlines()[-1]) for worker in workers]
    return {
        "processes": results,
        **{name: sum(result[name].get("tokens_per_s", 0) for result in results)
           for name in arguments.variants.split(",") if name != "matrix"},
    }  # fmt: skip


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(SIZES), default="7b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=0, help="tokens of a step; 0 suits the device")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--variants", default=DEFAULT, help="of padded,reference,sentence_transformers_128 (the batch),"
                        f"sentence_transformers_compiled,{DEFAULT}")  # fmt: skip
    parser.add_argument("--processes", type=int, default=1, help="GPUs, one process each")
    parser.add_argument("--process", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    result = spread(arguments) if arguments.processes > 1 and arguments.process < 0 else measure(arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
