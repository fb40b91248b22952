"""What is judged, and how finely; what comes out: the figures that `promote` decides on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jobs.run import InputError, Run

CHALLENGER = "llmemb"
NAMES = ("popularity", "repeat_markov_popularity", "tfidf_text", "id_only", CHALLENGER, "champion", "reference")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is judged, and how finely."""

    run: Run
    recommender: str = "latest"
    """The challenger: `latest` (of the newest `rat` run), an alias of the registry, or a recommender's id."""
    baselines: dict[str, str] = field(default_factory=dict)
    """More recommenders for the table, NAME = ID: a zero-shot text model, LLM-ESR, other backbones."""
    part: Literal["valid", "test"] = "test"
    """The held-out part: each user's last event in it is to be foretold from all before it."""
    events_per_user: int = 0
    """Newest held-out events of a user that the gates of `promote` judge; 0 takes all. They are ranked beside the table's one."""
    exclude_seen: bool | None = None
    """Ranks among items that the user has not touched yet; a repeat can still be the target. Left out, it is as serving:
    `run.exclude_seen`. The other ranking stands in the table too."""
    unseen: bool | None = None
    """The old name of `exclude_seen`."""
    k: int = 10
    """Places of a list that HR and NDCG look at."""
    negatives: int = 100
    """Items that each case is ranked among in the sampled ranking, which is there for comparison with papers only."""
    resamples: int = 1000
    """Draws of the bootstrap over users."""
    min_users: int = 30
    """A slice of fewer users gets no interval: it can't tell."""
    paper_tail: int = 4
    """Slice `paper_tail`, LLMEmb's own rule: items with fewer events, held-out ones counted; for comparison only."""
    users_per_chunk: int = 4096
    """Users ranked at once, at most."""
    leak_bound: float = 0.5
    """Share of the variance of log test popularity that raw embeddings may foretell; above it, a field leaks."""

    def __post_init__(self) -> None:
        if min(self.k, self.negatives, self.users_per_chunk) < 1 or self.resamples < 2 or self.events_per_user < 0:
            raise InputError(
                "evaluate: k, negatives and users_per_chunk must be at least 1, resamples at least 2, events_per_user at least 0"
            )
        if taken := set(self.baselines) & set(NAMES):
            raise InputError(f"evaluate.baselines.{min(taken)}: the table has a model of that name; choose another")


def unseen_only(config: Config) -> bool:
    """Whether the ranking that counts leaves out what a user has had."""
    asked = config.exclude_seen if config.exclude_seen is not None else config.unseen
    return config.run.exclude_seen if asked is None else asked


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The challenger's NDCG less another model's, over the same users."""

    against: str
    slice: str
    value: float | None
    low: float | None
    """Lower end of the 95 % interval; none where the slice is too small for one."""
    high: float | None
    detectable: float | None
    """The smallest difference that the slice could have shown (5 % level, two-sided, power 80 %)."""
    reference: float | None
    """The other model's NDCG."""
    n: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures that `promote` decides on."""

    recommender_id: str
    encoder_id: str
    champion_id: str
    """The recommender that serves, or that served until this one took over; empty on the first night."""
    reference_id: str
    """The fixed reference, which stays while champions come and go; empty where there is none, or where it is the challenger."""
    values: dict[str, dict[str, dict[str, float | None]]]
    """By model, slice, metric."""
    differences: tuple[Difference, ...]
    """To every other model, by slice."""
    users: dict[str, int]
    """Of each slice."""
    leak: dict[str, float]
    """How well raw embeddings foretell log test popularity, cross-validated: r2, spearman, items."""
    leaking: bool
    """Whether r2 is above `leak_bound`."""
    outcomes_id: str
    """Artifact with every model's NDCG of every held-out event: what the gates judge."""
    negatives_id: str
    """Artifact with the negatives of the sampled ranking."""
    ranking_seconds: float
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
