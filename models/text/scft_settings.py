"""How an encoder is fine-tuned: the settings of SCFT (METHOD §1) and of what else it can learn from (§6, §8)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scft:
    """How an encoder is fine-tuned (METHOD §1)."""

    steps: int = 4000
    """Steps at most; 0 keeps the base model as it is (zero-shot)."""
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
    """On CUDA, compiles the model's layers. It takes a minute or two at the start, and pays in all but short trainings."""
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
        if self.cluster_weight < 0:
            raise ValueError(f"cluster_weight = {self.cluster_weight} must be at least 0, which leaves the clusters out")
        if not 0 <= self.pair_share <= 1:
            raise ValueError(f"pair_share = {self.pair_share} must lie in [0, 1]; 0 leaves the users out")
        if self.pair_support < 1 or self.whiten_every < 1 or not 0 <= self.popularity <= 1:
            raise ValueError("pair_support and whiten_every must be at least 1, popularity a share in [0, 1]")
