"""What `explain` answers: the links of the chain, the neighbours, and what the LLM read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["verified", "broken", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """One step of the chain."""

    step: str
    identity: str
    """Id of an artifact, or the table's partition."""
    digest: str
    """As computed now from the bytes; empty where there are none to read."""
    verdict: Verdict
    """`verified`: the bytes are those that were recorded; `unknown`: nothing was recorded, or it is gone."""
    text: str
    depth: int
    """How far from the vector."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An item near by."""

    item_id: str
    title: str
    score: float
    """Dot product."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The chain of an item's vector. A broken chain is no result: it ends the job with status 3."""

    item_id: str
    title: str
    space_id: str
    recommender_id: str
    encoder_id: str
    serves_ds: str
    links: tuple[Link, ...]
    """From the vector back to the source."""
    unchecked: int
    """Links of which nothing was recorded."""
    text: str
    """What the LLM read; empty where the encoder or the item's text is gone."""
    vector: list[float]
    """The first numbers of the online vector."""
    norm: float
    neighbours: tuple[Neighbour, ...]
    neighbours_before: tuple[Neighbour, ...]
    """In the space that served before; empty where there is none, or it was collected."""
    kept_neighbours: int
    """How many are in both lists."""
    seconds: float
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
