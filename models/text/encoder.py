"""An item encoder: a transformers model with LoRA weights. Packed prompts -> pooled embeddings.

Shapes: B items, T tokens of a step, E model width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.text.attention import has_variable_attention
from models.text.base_model import base_sha256, first_position, is_causal, load_base, tokenizer_sha256
from models.text.lora import Lora, add_lora, load_lora, merge_lora, update_norm
from models.text.packing import Step, pack
from models.text.prompts import Attributes, FieldPolicy, Prompts, Texts, as_policy, tokenize

Pooling = Literal["mean", "last", "mean_all"]
WEIGHTS, SPEC = "adapter_model.safetensors", "encoder.json"
NO_EFFECT = 1e-5
"""LoRA weights whose update ΔW has a norm below this change nothing."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """All that shapes an encoder's embeddings, beside its weights. It is part of the artifact."""

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
    """Whether it learned from users' histories too, not only from texts."""


class Encoder(nn.Module):
    """Base model, LoRA weights and tokenizer, ready to embed; `forward` pools one packed step."""

    def __init__(self, model: nn.Module, tokenizer: Any, spec: Spec) -> None:
        super().__init__()
        self.model, self.tokenizer, self.spec = model, tokenizer, spec
        config = self.config
        self.causal = is_causal(model)
        self.head, self.tail = head_and_tail(tokenizer, spec.policy.domain)
        self.first_position = first_position(model)
        window = min(getattr(config, "max_position_embeddings", spec.max_tokens) - self.first_position, spec.max_tokens)
        self.limit = window - len(self.head) - len(self.tail)
        if self.limit < 1:
            raise ValueError(f"the domain sentence fills max_tokens = {spec.max_tokens}: shorten it or raise max_tokens")
        self.fill = 0
        """How coarsely shapes of steps are rounded up for compiled code (see `pack`); 0 does not round."""

    @property
    def config(self) -> Any:
        """transformers' configuration of the base model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def forward(self, step: Step) -> Tensor:
        """A step -> emb_BE float32 of its items."""
        hidden_TE = self.model(
            input_ids=step.token_T[None], position_ids=step.position_T[None], packing=step.packing, use_cache=False
        ).last_hidden_state[0]
        return pool(hidden_TE, step, self.spec.pooling)

    def step(self, source: Prompts) -> Step:
        """Prompts -> a step for `forward`, on the encoder's device."""
        return pack(
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
        """Prepares for compiled layers: from now on steps get filler, so that few shapes occur."""
        torch._dynamo.config.recompile_limit = 64
        self.fill = rungs if self.variable else 0

    @property
    def variable(self) -> bool:
        """Whether the device has variable-length attention for this model."""
        config, dtype = self.config, self.dtype
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        return has_variable_attention(self.device, dtype, heads, groups, width)

    @property
    def dtype(self) -> torch.dtype:
        """The type in which attention is computed: autocast's where autocast is on."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else next(self.model.parameters()).dtype

    @property
    def overhead(self) -> int:
        """Tokens that each item costs beside those of its attributes."""
        return len(self.tail) + (0 if self.causal else len(self.head))

    def tokenize(self, items: Iterable[Attributes]) -> Texts:
        """Items' attributes -> token pieces, under the encoder's field policy."""
        return tokenize(items, self.tokenizer, self.spec.policy)


def head_and_tail(tokenizer: Any, domain: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A tokenizer and the domain sentence -> tokens before an item's attributes (special ones, the sentence), and after them."""
    special = tokenizer("", add_special_tokens=True)["input_ids"]
    opening = {tokenizer.bos_token_id, tokenizer.cls_token_id}
    head = [token for token in special[:1] if token in opening]
    sentence = tokenizer(f"{domain}\n", add_special_tokens=False)["input_ids"]
    return (*head, *sentence), tuple(special[len(head) :])


def pool(hidden_TE: Tensor, step: Step, pooling: Pooling) -> Tensor:
    """A step's states -> emb_BE float32: `mean` of attribute tokens, `last` token, or `mean_all` with the prefix."""
    if pooling == "last":
        return hidden_TE[step.prefix + step.whole_B.cumsum(0) - 1].float()
    if pooling == "mean":
        # `unsafe` skips a check of the lengths, for which the host would have to wait
        return torch.segment_reduce(hidden_TE[step.own_N].float(), "mean", lengths=step.length_B, unsafe=True)
    items_NE, prefix_PE = hidden_TE[step.prefix : step.end].float(), hidden_TE[: step.prefix].float()
    sum_BE = torch.segment_reduce(items_NE, "sum", lengths=step.whole_B, unsafe=True) + prefix_PE.sum(0)
    return sum_BE / (step.whole_B[:, None] + step.prefix)


# -------------------------------------------------------------------------------------------------------------- artifact


def save_encoder(path: Path, spec: Spec, lora: Mapping[str, Tensor] | None) -> None:
    """Writes an encoder's artifact into a folder: LoRA weights (none for a zero-shot encoder), and its Spec as JSON."""
    if lora is not None:
        save_file(dict(lora), path / WEIGHTS)
    (path / SPEC).write_text(json.dumps(dataclasses.asdict(spec), indent=1, sort_keys=True))


def read_spec(path: Path) -> Spec:
    """An artifact's folder -> its Spec. Raises ValueError where it is no encoder."""
    try:
        value = json.loads((path / SPEC).read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} holds no {SPEC}: it is no encoder") from error
    lora = None if value["lora"] is None else Lora(**value["lora"])
    return Spec(**{**value, "policy": as_policy(value["policy"]), "lora": lora})


def load_encoder(path: Path, *, device: torch.device, dtype: torch.dtype | None = None, merge: bool = True) -> Encoder:
    """An artifact's folder -> the encoder. LoRA weights are merged into the base, or beside it where `merge` is false.

    Raises ValueError where the base model or the tokenizer has another hash, or LoRA weights do not fit or have no effect.
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
