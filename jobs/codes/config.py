"""Which vectors become codes, by which books; what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.run import InputError, Run
from models.behaviour.codes import Codes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which vectors become codes, by which books."""

    run: Run
    source: Literal["item_embeddings", "llm_embeddings"] = "item_embeddings"
    """Vectors of the space that `recommender` makes, or embeddings of its encoder: codes of those outlive a new recommender."""
    recommender: str = "champion"
    """`champion`, `latest`, `previous`, or a recommender's id."""
    books: str = "latest"
    """Books to code new items by: an id, or `latest`: those of the newest run. Without any, they are made."""
    refit: bool = False
    """Makes new books: all codes change, and consumers must learn them anew."""
    training: Codes = field(default_factory=Codes)
    """Read where books are made; they stay as they are from then on."""
    controls: bool = True
    """At a refit, measures product quantisation and residual k-means of as many bits beside the books (by faiss)."""
    category: str = ""
    """Attribute whose first value is a category, for what codes tell of it; empty takes the one with the fewest values."""
    figures_items: int = 20_000
    """Items among which neighbours are looked for in the report, at most."""
    publish: bool = True
    """Writes codes online beside the vectors of the space that serves."""
    chunk_rows: int = 4_096
    """Items written online at once."""
    pass_items: int = 500_000
    """Vectors held at once."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""

    def __post_init__(self) -> None:
        if min(self.chunk_rows, self.pass_items) < 1 or self.figures_items < 2:
            raise InputError("codes: chunk_rows and pass_items must be at least 1, figures_items at least 2")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The codes written."""

    books_id: str
    """Version of the books: codes of two versions can't be compared."""
    source: str
    """What the books are of: `space ID` or `encoder ID`."""
    refit: bool
    """Whether the books are new."""
    books: int
    entries: int
    new: int
    """Items that had no codes of these books."""
    changed: int
    """Items coded anew since their text changed."""
    kept: int
    """Items whose codes stayed bit by bit."""
    report: dict[str, Any]
    """Of these codes: usage by book, collisions, recall of neighbours; at a refit also moved codes and the controls."""
    published: int
    """Rows written online."""
    fit_seconds: float
    code_seconds: float
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
