"""How an encoder is fine-tuned: the settings of SCFT (METHOD §1) and of what else it can learn from (§6, §8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

WEIGHTS = ("contrast_weight", "cluster_weight", "teacher_weight", "user_weight", "title_weight")
"""Settings that weigh losses."""


@dataclass(frozen=True, kw_only=True)
class Scft:
    """How an encoder is fine-tuned (METHOD §1)."""

    steps: int = 0
    """Steps at most; 0 keeps the base model as it is (zero-shot): no tuning measured here gave a recommender more."""
    batch: int = 512
    """Items of a step over all GPUs: each one must be told from all others."""
    ratio: float = 0.4
    """Share of an item's attributes that a view drops, on average; never all."""
    temperature: float = 0.05
    """Temperature of the loss's softmax over cosines: a lower one looks more at the items that are hardest to tell apart."""
    learn_temperature: bool = False
    """Trains the temperature too, from `temperature` on."""
    learning_rate: float = 2e-4
    """Learning rate of AdamW, at its highest."""
    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises; then it falls along a cosine to a tenth."""
    weight_decay: float = 0.01
    """How strongly AdamW draws weights to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    tokens: int = 0
    """Tokens of a micro-batch on one GPU; 0 takes what fits into memory. Smaller ones cost time, and change no number."""
    compile: bool = True
    """On CUDA, compiles the model's layers. It takes about half a minute at the start, and pays in all but short trainings."""
    fp8: bool = False
    """Multiplies with the frozen weights in 8 bits (NVIDIA GPUs of compute capability 8.9 or later). The gates judge without."""
    validate_every: int = 250
    """Steps between validations (and checkpoints)."""
    patience: int = 4
    """Validations without a better rank before training stops."""
    validation_items: int = 1000
    """Items kept out of training, at most. Validation searches their views in the catalogue."""
    candidates: int = 10_000
    """Items of the catalogue that validation searches through, at most."""
    cluster_weight: float = 0.0
    """Weight of a second loss: predict from an item's text its cluster among the teacher's vectors (P2Rec, 2406.00333)."""
    contrast_weight: float = 1.0
    """Weight of the loss over views and pairs; 0 leaves it out."""
    teacher_weight: float = 0.0
    """Weight of telling an item's vector of the teacher from its text: a ridge first, then the LLM by 1 - cosine (as DARec,
    2408.07427)."""
    user_weight: float = 0.0
    """Weight of telling from a user's titles how what they had is spread over the teacher's clusters (P2Rec)."""
    title_weight: float = 0.0
    """Weight of telling the tokens of a user's next title from the titles before; for bases that write."""
    user_share: float = 0.25
    """Users of a step beside its items, as a share of `batch`, where users' titles are learned from."""
    user_titles: int = 10
    """Newest titles of a user that are read, at most."""
    pair_share: float = 0.0
    """Share of a step that is pairs of items that users took one after the other, instead of two views of one item (as NoteLLM
    pairs notes, 2403.01744), whole. Each user weighs as much as any other."""
    pair_support: int = 1
    """Users who must have taken a pair, at least."""
    popularity: float = 1.0
    """How far pairs are freed of popularity: at 1 an item isn't pushed away for being drawn often as another's negative."""
    whiten: bool = False
    """Takes the loss on whitened embeddings, so that it can't be lowered by spreading items evenly: RAT whitens anyway."""
    whiten_every: int = 25
    """Steps after which the catalogue's moments are taken anew."""

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ValueError("batch = 1 has no negatives to learn from: give at least 2")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio = {self.ratio} must lie in [0, 1): a view never drops all attributes")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive; usual are 0.05 to 0.1")
        weights = {name: getattr(self, name) for name in WEIGHTS}
        if min(weights.values()) < 0 or (self.steps and not any(weights.values())):
            raise ValueError(f"{', '.join(f'{name} = {value}' for name, value in weights.items())}: none may be below 0, which "
                             "leaves a loss out, and not all 0")  # fmt: skip
        if not 0 < self.user_share <= 1 or self.user_titles < 1:
            raise ValueError(f"user_share = {self.user_share} must lie in (0, 1], user_titles be at least 1")
        if not 0 <= self.pair_share <= 1:
            raise ValueError(f"pair_share = {self.pair_share} must lie in [0, 1]; 0 leaves the users out")
        if self.pair_support < 1 or self.whiten_every < 1 or not 0 <= self.popularity <= 1:
            raise ValueError("pair_support and whiten_every must be at least 1, popularity a share in [0, 1]")
        self.check_course()
        if self.steps and not self.contrast_weight and (self.pair_share or self.whiten):
            name = "pair_share" if self.pair_share else "whiten"
            raise ValueError(
                f"{name} shapes the loss over views and pairs, which contrast_weight = 0 leaves out: set one of them back"
            )

    def check_course(self) -> None:
        """Raises ValueError for numbers with which no training comes to an end, or to anything."""
        least = {"steps": 0, "tokens": 0, "validate_every": 1, "patience": 1, "validation_items": 1, "candidates": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least {low}")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0: with it nothing is learned")
        if not (0 <= self.warm_up <= 1 and 0 <= self.weight_decay < math.inf):
            raise ValueError(f"warm_up = {self.warm_up} must be a share in [0, 1], weight_decay = {self.weight_decay} at least 0")

    @property
    def reads_users(self) -> bool:
        """Whether users' titles are learned from."""
        return bool(self.steps and (self.user_weight or self.title_weight))

    @property
    def reads_teacher(self) -> bool:
        """Whether a teacher's clusters or vectors are learned from."""
        return bool(self.steps and (self.cluster_weight or self.teacher_weight or self.user_weight))

    @property
    def from_users(self) -> bool:
        """Whether anything is learned from users, by themselves or by a teacher."""
        return bool(self.steps and self.pair_share and self.contrast_weight) or self.reads_users or self.reads_teacher
