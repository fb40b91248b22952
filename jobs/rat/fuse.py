"""A recommender just trained, its teacher and its texts -> a recommender of parts, kept; and what the parts are worth."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from jobs.progress import EVERY_S
from jobs.rat import rotation
from jobs.rat.rotation import Goal, Rotation
from jobs.run import as_json
from models.behaviour.artifact import save_fused, save_recommender
from models.behaviour.assembly import Fusion, Material, assemble, centres
from models.behaviour.fused import Part
from models.behaviour.recommender import Recommender

log = logging.getLogger(__name__)
TRAINED = ("llmemb", "collaborative")
"""Parts whose basis is another one after each training, and so are turned; the llmemb part's turn is told."""


@dataclass(frozen=True, kw_only=True)
class Fused:
    """The parts of a recommender, as the night tells of them."""

    weights: dict[str, float] = field(default_factory=dict)
    """Of each part, in standard deviations of its scores; 0 for a part that validation had no use for."""
    widths: dict[str, int] = field(default_factory=dict)
    """Columns of each part in the vectors."""
    gates: tuple[float, ...] = ()
    """Factors of the text part's vectors, by train events: none, 1 to 4, 5 to 19, 20 and more."""
    centre: dict[str, float] = field(default_factory=dict)
    """Share of the mean user vector that was taken from a part's users."""
    chosen: dict[str, float] = field(default_factory=dict)
    """Chosen for single parts: events of shrinking, fades."""
    counted: str = ""
    """The table of the counting part that did best on validation."""
    ndcg: dict[str, float] = field(default_factory=dict)
    """NDCG@10 on validation cases, overall and by the target's group."""
    alone: dict[str, float] = field(default_factory=dict)
    """The goal of the search for each part alone."""
    gains: dict[str, float] = field(default_factory=dict)
    """NDCG@10 that the text part added to the others, and shuffled and Gaussian texts in its place: those should add nothing."""
    curve: tuple[dict[str, object], ...] = ()
    """The steps of the search."""
    cases: int = 0
    note: str = ""


def keep(staged: Path, fusion: Fusion, given: Material, goal: Goal | Rotation, meta: dict[str, object]) -> tuple[Rotation, Fused]:
    """Finds parts and weights, turns the trained parts, and writes the artifact into `staged`."""
    if fusion.parts == ("llmemb",):
        return keep_alone(staged, given, goal, meta), Fused(
            weights={"llmemb": 1.0}, widths={"llmemb": given.llmemb.backbone.width}
        )
    assembled = assemble(fusion, given)
    turns, told = turned(assembled.parts, given, goal)
    if turns:
        meta = meta | {"rotation": as_json(told)}
    save_fused(
        staged, assembled.parts, assembled.found.weights, item_ids=given.item_ids, counts_V=given.counts_V,
        whitening=given.whitening, turns=turns, centres=centres(assembled.found.weights.centre, assembled.mean_users, turns),
        meta=meta,
    )  # fmt: skip
    found = assembled.found
    fused = Fused(
        weights=found.relative, widths={part.name: part.backbone.width for part in assembled.parts}, gates=found.weights.gates,
        centre=dict(found.weights.centre), chosen=assembled.chosen, ndcg=found.ndcg, alone=found.alone, gains=assembled.gains,
        counted=assembled.counted, curve=found.curve, cases=found.cases, note=found.note,
    )  # fmt: skip
    return told, fused


def counter() -> Callable[[], None]:
    """Says every few seconds how many weights were tried: the search takes minutes, and nobody knows how many it will be."""
    tries, last = 0, time.monotonic()

    def tried() -> None:
        nonlocal tries, last
        tries += 1
        if time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            log.info("parts: %d weights tried on the validation cases", tries)

    return tried


def keep_alone(staged: Path, given: Material, goal: Goal | Rotation, meta: dict[str, object]) -> Rotation:
    """LLMEmb as published: one part, one sequence encoder."""
    part = given.llmemb
    turn_DD, told = rotation.turn(goal, "llmemb", rows(given, goal, part))
    if turn_DD is not None:
        meta = meta | {"rotation": as_json(told)}
    save_recommender(
        staged, Recommender(part.items, part.sequence), item_ids=given.item_ids, backbone=part.backbone, items=part.config,
        whitening=given.whitening, turn_DD=turn_DD, meta=meta,
    )  # fmt: skip
    return told


def turned(parts: Sequence[Part], given: Material, goal: Goal | Rotation) -> tuple[dict[str, Tensor], Rotation]:
    """turn_DD of each trained part towards the same part of the space that served, and how near the main one came."""
    turns: dict[str, Tensor] = {}
    told: Rotation | None = None
    kept = {part.name: part for part in parts}
    for name in TRAINED:
        if name in kept:
            turn_DD, one = rotation.turn(goal, name, rows(given, goal, kept[name]))
            told = told or one
            if turn_DD is not None:
                turns[name] = turn_DD
    return turns, told or Rotation(note="no part is trained: nothing to turn")


def rows(given: Material, goal: Goal | Rotation, part: Part) -> Tensor:
    """new_ND of a part, of the goal's items."""
    if isinstance(goal, Rotation):
        return torch.zeros(0, 0)
    device = given.white_NK.device
    row_N = torch.from_numpy(goal.row_N).to(device)
    with torch.no_grad():
        return part.loaded(given.item_ids, given.whitening, device).from_white(given.white_NK[row_N - 1], row_N)


def in_words(fused: Fused) -> Iterator[str]:
    """Lines for a person."""
    yield "parts: " + ", ".join(f"{name} {weight:.2f}" for name, weight in fused.weights.items())
    if fused.note:
        yield fused.note
    if fused.gains:
        yield "NDCG@10 on validation that the text part adds: " + ", ".join(
            f"{name} {gain:+.4f}" for name, gain in fused.gains.items()
        )
