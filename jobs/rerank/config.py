"""Whose lists are re-ranked, by which LLM; what it adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.run import InputError, Run
from models.text.rerank import Distilling


@dataclass(frozen=True, kw_only=True)
class Config:
    """Whose lists are re-ranked, by which LLM."""

    run: Run
    recommender: str = "champion"
    """`champion`, `latest`, `previous`, or a recommender's id."""
    base: str = "embedded"
    """A decoder with tied embeddings: a folder, a hub name, or `embedded`."""
    domain: str = "A user took these items, the newest last; next comes:"
    """The sentence before the titles."""
    top: int = 20
    """Items of a list."""
    history: int = 10
    """Newest titles that the LLM reads."""
    users: int = 500
    """Users asked, at most, of validation and of test each."""
    distilling: Distilling = field(default_factory=Distilling)

    def __post_init__(self) -> None:
        if self.top < 2 or min(self.history, self.users) < 1:
            raise InputError("rerank: top must be at least 2, history and users at least 1")


@dataclass(frozen=True, kw_only=True)
class Result:
    """With and without the LLM."""

    recommender_id: str
    users: int
    top: int
    tokens: int
    in_list: float
    """Share of the test users whose next item is in their list: nothing can be re-ranked for the others."""
    mix: float
    """Weight of the LLM beside the recommender in `mixed`, chosen on validation; 0 leaves it out."""
    ndcg: dict[str, float]
    """NDCG@10 of the recommender's order, the plain prompt, soft tokens, those with shuffled titles, the mix, the oracle."""
    differences: dict[str, dict[str, float | None]]
    """Each less the recommender's, with the 95 % interval over users; none of too few."""
    seconds: float
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
