"""Counts of a run of `embed`, what it costs, and how far it is."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from jobs.progress import Progress

log = logging.getLogger("jobs.embed")


@dataclass(kw_only=True)
class Tally:
    """Counts of a run, and its progress."""

    price: float
    total: int
    """Texts of the shard, about: equal texts are embedded once."""
    embedded: int = 0
    resumed: int = 0
    known: int = 0
    cut: int = 0
    empty: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last: float = field(default_factory=time.monotonic)
    gate: tuple[float, float] | None = None
    """Cosine and neighbour overlap of 8 bits with bf16."""
    shown: Progress | None = None

    def cost(self) -> float | None:
        """Price of a million items at this run's speed."""
        return self.seconds / 3600 * self.price / self.embedded * 1e6 if self.embedded else None

    def start(self) -> None:
        """Says what there is to embed, as far as it is known; the clock of a part begins."""
        self.last = time.monotonic()
        if self.shown is None:
            self.shown = Progress(log, "embedding", max(self.total - self.known - self.resumed, 1))
            self.shown.start()

    def step(self, items: int, tokens: int) -> None:
        """Takes a step's counts and says where the run stands."""
        now = time.monotonic()
        self.embedded, self.tokens = self.embedded + items, self.tokens + tokens
        self.seconds, self.last = self.seconds + now - self.last, now
        if self.shown is not None:
            speed = self.tokens / max(self.seconds, 1e-9)
            self.shown.add(items, f"{speed:,.0f} tokens/s  {self.cost() or 0:,.2f} per million items")

    def close(self) -> None:
        """Takes the progress bar away."""
        if self.shown is not None:
            self.shown.close()
