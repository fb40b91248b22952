"""An item encoder: a transformers model with LoRA weights, or with learned suffix tokens. Packed prompts -> embeddings.

Shapes: B items, T tokens of a step, S suffix tokens of each item, E model width.
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
from models.text.lora import Lora, add_lora, load_lora, lora_state, merge_lora, update_norm
from models.text.packing import Step, pack
from models.text.prompts import Attributes, FieldPolicy, Prompts, Texts, as_policy, tokenize

Pooling = Literal["mean", "last", "mean_all"]
Attention = Literal["base", "both"]
WEIGHTS, SUFFIX, SPEC = "adapter_model.safetensors", "suffix_tokens.safetensors", "encoder.json"
LATER: Mapping[str, Any] = {"attention": "base", "suffix_tokens": 0}
"""Keys that a Spec got later, with what older artifacts mean. They are written where they say something else alone, so that the
artifact of an older recipe keeps its bytes, and with them its id."""
NO_EFFECT = 1e-5
"""LoRA weights whose update ΔW has a norm below this change nothing."""
UNMOVED = 5e-3
"""Suffix tokens that moved by less, relative to where they start, learned nothing: a base in 16 bits rounds by .002."""


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
    attention: Attention = "base"
    """As the base was trained; or both ways inside an item's text (DARec, arXiv 2408.07427)."""
    suffix_tokens: int = 0
    """Learned tokens behind an item's text, over which it is pooled (Laser, arXiv 2409.01605)."""


def of_base(spec: Spec) -> Spec:
    """A Spec -> that of the base model as it is, which reads the same prompts."""
    return dataclasses.replace(spec, lora=None, attention="base", suffix_tokens=0)


class Encoder(nn.Module):
    """Base model, LoRA weights and tokenizer, ready to embed; `forward` pools one packed step."""

    def __init__(self, model: nn.Module, tokenizer: Any, spec: Spec) -> None:
        super().__init__()
        self.model, self.tokenizer, self.spec = model, tokenizer, spec
        config = self.config
        self.causal, self.shared = is_causal(model) and spec.attention == "base", is_causal(model)
        if spec.attention == "both" and not self.shared:
            raise ValueError(f'base model {spec.base!r} attends both ways by itself: set attention to "base"')
        self.head, self.tail = head_and_tail(tokenizer, spec.policy.domain)
        self.suffix_SE = start_suffix(model, spec.suffix_tokens) if spec.suffix_tokens else None
        # only places: their embeddings are not the vocabulary's
        self.tail += (0,) * spec.suffix_tokens
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
        hidden_TE = self.states(step)
        if self.suffix_SE is not None and self.spec.pooling == "mean":
            return hidden_TE[suffix_places(step, len(self.suffix_SE))].float().mean(1)
        return pool(hidden_TE, step, self.spec.pooling)

    def states(self, step: Step) -> Tensor:
        """A step -> hidden_TE, the last states of its tokens."""
        read: dict[str, Tensor] = {"input_ids": step.token_T[None]}
        if self.suffix_SE is not None:
            words_TE = self.model.get_input_embeddings()(step.token_T)  # type: ignore[operator]
            place_BS = suffix_places(step, len(self.suffix_SE))
            learned_BSE = self.suffix_SE.to(words_TE.dtype).expand(len(place_BS), -1, -1)
            read = {"inputs_embeds": words_TE.index_put((place_BS,), learned_BSE)[None]}
        hidden_TE: Tensor = self.model(
            **read, position_ids=step.position_T[None], packing=step.packing, use_cache=False
        ).last_hidden_state[0]
        return hidden_TE

    def step(self, source: Prompts, head: tuple[int, ...] | None = None) -> Step:
        """Prompts -> a step for `forward`, on the encoder's device. `head` is read instead of the domain sentence."""
        return pack(
            source,
            self.head if head is None else head,
            self.tail,
            causal=self.causal,
            device=self.device,
            variable=self.variable,
            shared=self.shared,
            first_position=self.first_position,
            fill=self.fill,
        )

    def round_shapes(self, rungs: int = 4) -> None:
        """Prepares for compiled layers: from now on steps get filler, so that few shapes occur."""
        torch._dynamo.config.recompile_limit = 64
        # else floats, as dropout's share or a norm's epsilon, are numbers on the host, each with C++ of its own to be compiled
        torch._dynamo.config.specialize_float = True
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
        return len(self.tail) + (0 if self.shared else len(self.head))

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


def suffix_places(step: Step, count: int) -> Tensor:
    """place_BS: where a step's suffix tokens are, the last ones of each item."""
    end_B = step.prefix + step.whole_B.cumsum(0)
    return end_B[:, None] + torch.arange(-count, 0, device=end_B.device)


def start_suffix(model: nn.Module, count: int) -> nn.Parameter:
    """What suffix tokens are before they learn: words of the base's vocabulary, always the same ones. The base is frozen."""
    words_WE: Tensor = model.requires_grad_(False).get_input_embeddings().weight  # type: ignore[operator]
    drawn_S = torch.randint(len(words_WE), (count,), generator=torch.Generator().manual_seed(0))
    return nn.Parameter(words_WE[drawn_S.to(words_WE.device)].float().clone())


# ---------------------------------------------------------------------------------------------------------------- learned


def learned_state(encoder: Encoder) -> dict[str, Tensor]:
    """A copy of what training changes, on the CPU: LoRA weights by PEFT's names, or the suffix tokens."""
    if encoder.suffix_SE is None:
        return lora_state(encoder.model)
    return {"suffix_SE": encoder.suffix_SE.detach().cpu().clone()}


def load_learned(encoder: Encoder, state: Mapping[str, Tensor]) -> None:
    """Puts it into an encoder. Raises ValueError for names or shapes that are not the encoder's, or values that aren't finite."""
    if encoder.suffix_SE is None:
        load_lora(encoder.model, state)
        return
    found = state.get("suffix_SE", torch.empty(0))
    if found.shape != encoder.suffix_SE.shape or not bool(found.isfinite().all()):
        raise ValueError(f"suffix tokens are {tuple(found.shape)}, or not finite: the encoder needs "
                         f"{tuple(encoder.suffix_SE.shape)}; train them on this base")  # fmt: skip
    with torch.no_grad():
        encoder.suffix_SE.copy_(found)


# -------------------------------------------------------------------------------------------------------------- artifact


def save_encoder(path: Path, spec: Spec, learned: Mapping[str, Tensor] | None) -> None:
    """Writes an encoder's artifact into a folder: what it learned (nothing for a zero-shot encoder), and its Spec as JSON."""
    if learned is not None:
        save_file(dict(learned), path / (SUFFIX if spec.suffix_tokens else WEIGHTS))
    told = {name: value for name, value in dataclasses.asdict(spec).items() if name not in LATER or value != LATER[name]}
    (path / SPEC).write_text(json.dumps(told, indent=1, sort_keys=True))


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

    Raises ValueError where the base model or the tokenizer has another hash, or what was learned does not fit or has no effect.
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
    encoder = Encoder(model, tokenizer, spec).eval()
    if encoder.suffix_SE is not None:
        read_suffix(path, encoder, encoder.suffix_SE)
    return encoder


def read_suffix(path: Path, encoder: Encoder, suffix_SE: Tensor) -> None:
    """Puts an artifact's suffix tokens into its encoder. Raises ValueError where they are missing or learned nothing."""
    if not (path / SUFFIX).exists():
        raise ValueError(f"{path} holds no {SUFFIX}: the encoder is not whole")
    start_SE = suffix_SE.detach().clone()
    load_learned(encoder, load_file(path / SUFFIX))
    if float((suffix_SE.detach() - start_SE).norm()) < UNMOVED * float(start_SE.norm()):
        raise ValueError("suffix tokens have no effect: they did not move; train them, or set suffix_tokens to 0")
