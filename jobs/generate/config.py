"""Whose vectors' codes are written, by which model; what it achieves."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.run import InputError, Run
from models.behaviour.codes import Codes
from models.behaviour.generative import Generative


@dataclass(frozen=True, kw_only=True)
class Config:
    """Whose codes are written, by which model."""

    run: Run
    recommender: str = "champion"
    """Whose vectors `codes` has coded: `champion`, `latest`, `previous`, or a recommender's id."""
    books: str = "latest"
    """An id, or `latest`: the books of the newest `codes` run."""
    training: Generative = field(default_factory=Generative)
    user_codes: Codes = field(default_factory=lambda: Codes(books=2))
    """Books of users' vectors."""
    users: int = 20_000
    """Test users that are asked about, at most."""

    def __post_init__(self) -> None:
        if self.users < 1:
            raise InputError("generate.users must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Beside the recommender that made the vectors."""

    recommender_id: str
    books_id: str
    users: int
    words: int
    """Of the vocabulary: entries of items' and users' books, and numbers."""
    ndcg: dict[str, float]
    """NDCG@10 of the generated items, and of the recommender."""
    difference: dict[str, float | None]
    """The generated less the recommender's, with the 95 % interval over users; none of too few."""
    items_share: float
    """Share of the beams that are items: 1, as the search walks the tree of items."""
    drift: float
    """Share of items whose codes the frozen books would now make otherwise: 0."""
    seconds: float
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
