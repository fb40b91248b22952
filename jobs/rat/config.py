"""How LLM embeddings are bent to the logs; what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jobs.rat import fuse
from jobs.rat.rotation import Rotation
from jobs.run import InputError, Run
from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training


@dataclass(frozen=True, kw_only=True)
class Config:
    """How LLM embeddings are bent to the logs."""

    run: Run
    encoder: str = "latest"
    """An encoder's id, or `latest`: that of the newest `scft` run."""
    teacher: str = "latest"
    """A teacher's id, `latest`: that of the newest `pretrain` run, or `none`: no alignment."""
    backbone: Backbone = field(default_factory=Backbone)
    """Must be the teacher's: vectors of another kind of SRS are no target."""
    training: Training = field(default_factory=lambda: Training(cosine=0.07))
    fusion: Fusion = field(default_factory=Fusion)
    """The parts of the recommender, and what validation may choose about them."""
    whitened_width: int = 1536
    """Directions kept by whitening, at most; the items' own rank bounds it too, and so does an eighth of their number: whitened
    to as many directions as there are items, all texts lie equally far apart."""
    adapter: Literal["mlp", "residual", "null_space", "codes", "llm_esr"] = "mlp"
    """`mlp`: vectors from text alone; `residual`: the same plus a learned ID part; `null_space`: frozen text, a learned ID part
    added in its weakest directions (AlphaFuse); `codes`: a learned vector for each entry of books of the text, which an item's
    codes name (MoC); `llm_esr`: that baseline, for `evaluate.baselines`, without alignment."""
    hidden: int = 256
    """Hidden width of the `mlp` and `residual` adapters, and of LLM-ESR's."""
    drop_ids: float = 0.3
    """Probability that training drops an ID part of `residual`, so that text carries on its own."""
    distil: float = 0.1
    """Weight of LLM-ESR's self-distillation."""
    like_users: int = 10
    """How many users of the most similar histories a user learns from in self-distillation."""
    text_width: int = 32
    """Columns that `null_space` leaves to text alone; the ID part is added in the others. Half of the width, as published."""
    item_codes: Codes = field(default_factory=Codes)
    """Books of the `codes` adapter, made in training; they stay with the recommender and code new items."""
    alpha: float = 0.01
    """Weight of the alignment loss."""
    temperature: float = 0.1
    """Temperature of the alignment's InfoNCE."""
    popularity_prior: float = 5.0
    """An item with n train events aligns with weight n / (n + prior): a tail item's ID vector is mostly noise."""
    cold_share: float = 0.0
    """Share of the items whose train events are left out, so that `evaluate` can rank them as cold; 0 in production. Must be
    the teacher's, which else has seen them."""
    rotate_to: str = "champion"
    """Turns all vectors, users' too, so that items lie near their vectors in another space; no score and no ranking changes.
    `champion`: that of an earlier date; a recommender's id; or `none`. Without a space of the same width there is no turn."""

    stage: Literal["gated", "refit"] = "gated"
    """`gated` trains on the train rows, to be judged by the gates; `refit` trains the champion of this date again on all events,
    as it was trained, and that serves from then on. The nights' own schedule sets it."""
    refit: bool = True
    """Whether a champion is trained again on all events. Off, what serves never saw the newest events, those it was judged by."""
    refit_loss: float = 0.1
    """How far, as a share, the loss of that training may lie above the judged training's at the same epoch."""

    def __post_init__(self) -> None:
        if self.refit_loss < 0:
            raise InputError(
                f"rat.refit_loss {self.refit_loss} must be at least 0: it is the share by which a loss may be higher"
            )
        if not 0 <= self.cold_share < 1:
            raise InputError(f"rat.cold_share {self.cold_share} is not in [0, 1): it is a share of the items")
        if not 0 <= self.drop_ids < 1:
            raise InputError(f"rat.drop_ids {self.drop_ids} is not in [0, 1): it is a probability")
        if self.temperature <= 0 or self.alpha < 0 or self.popularity_prior < 0:
            raise InputError("rat.temperature must be above 0, rat.alpha and rat.popularity_prior at least 0")

    @property
    def manifest(self) -> str:
        """A training on all events stands beside the one that was judged: `latest` means that."""
        return "rat" if self.stage == "gated" else "rat-refit"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The recommender and how good it became."""

    recommender_id: str
    encoder_id: str
    teacher_id: str
    explained_variance: float
    """Share of the embeddings' variance that whitening kept."""
    whitened_width: int
    epochs: int
    best_epoch: int
    validation_ndcg: float
    """NDCG@10 of the best epoch, full ranking, over the last validation event of each user."""
    validation_recall: float
    seconds_per_epoch: float
    device: str
    model_version: str | None
    """In the registry, where there is one."""
    history: tuple[dict[str, float], ...]
    """Of each epoch: loss, and ndcg and recall where it was validated."""
    rotation: Rotation
    """How near a turn brought the vectors to those of the space that served."""
    fused: fuse.Fused
    """The parts, their weights, and what text and its controls were worth."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
