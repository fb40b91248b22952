"""How a recommender is trained: the settings that `pretrain` and `rat` share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.behaviour.losses import LOSSES


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recommender is trained."""

    epochs: int = 200
    """At most; training stops earlier when validation stops improving."""
    patience: int = 20
    """Epochs without a better validation NDCG@10 before training stops."""
    validate_every: int = 1
    """Epochs between validations (and checkpoints)."""
    validation_users: int = 50_000
    """At most so many validation cases, spread evenly over the users."""
    batch: int = 128
    """Rows of a step, over all GPUs together."""
    windows: Literal["last", "all"] = "last"
    """Rows of a user: the last max_len events, or as many windows as cover the whole history."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """How strongly AdamW draws weights to zero."""
    loss: str = "sampled"
    """`full`: the softmax over all candidates. Over sampled negatives: `sampled`, a softmax with their correction; `gbce`,
    gSASRec's; `bce`, SASRec's own."""
    cosine: float = 0.0
    """Temperature of a softmax over cosines, .05 to .1: vectors of users and items then have length one. 0 takes dot products as
    they are."""
    negatives: int = 256
    """Negatives of `sampled` and `gbce`; `bce` takes one."""
    negatives_per: Literal["batch", "position"] = "batch"
    """`batch` draws one set for all positions (fast), `position` a set for each; `bce` always draws for each."""
    logit_adjustment: float = 0.0
    """In training, scores are raised by this times the log of the item's share of the train events (Menon et al., ICLR 2021,
    eq. 10). Served scores are not: above 0, what is learned leans to the tail. 1 removes popularity whole."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto` is bf16 on CUDA and fp32 on CPU; item scores are fp32 always."""
    graph: bool = True
    """On one CUDA device, replays whole steps as CUDA graphs."""
    compile: bool = False
    """Compiles the sequence encoder with torch.compile: worth its minute of start in long trainings on CUDA."""

    def __post_init__(self) -> None:
        for name in ("epochs", "validate_every", "validation_users", "batch", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it must be at least 1")
        if self.loss != "full" and self.loss not in LOSSES:
            raise ValueError(f"training.loss is {self.loss!r}: there are full, {', '.join(LOSSES)}")
        if self.cosine < 0:
            raise ValueError(f"training.cosine is {self.cosine}: it is a temperature; write 0 for dot products")
        if self.patience < self.validate_every:
            raise ValueError(f"training.patience {self.patience} is below validate_every {self.validate_every}: "
                             "training would stop before its first validation")  # fmt: skip
