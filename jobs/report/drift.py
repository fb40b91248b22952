"""What moves from night to night: measures of a snapshot and its vectors, and the bounds that their own history sets.

Shapes: N items sampled, D width.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import manifests, partitions
from jobs.lake.nights import Night
from jobs.lake.tables import INTERACTIONS, LEFT
from jobs.report.layers import SERVED, TEXT, Layer, Matrix, ids_of
from jobs.report.sample import Sample
from jobs.report.spaces import Spaces
from jobs.run import InputError

TEXTS = ("fill.", "text.")
"""Measures of the texts: an encoder was trained on texts like those of the nights before, so an alarm here makes it due."""
SHARES = ("fill.", "quarantine.", "coverage", "weak.")
"""Measures between 0 and 1, whose history may be all zeros."""
ENOUGH = 100
"""Texts embedded on a night, from which on their mean length is a measure."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far from its own history a measure may go."""

    nights: int = 5
    """A measure can raise an alarm once so many earlier nights have measured it."""
    spread: float = 4.0
    """Allowed distance from the history's median, in robust standard deviations (1.4826 times the median deviation)."""
    least: float = 0.01
    """Allowed distance at least, as a share of the median, or for shares as such: what never moved would else alarm at once."""

    def __post_init__(self) -> None:
        if self.nights < 2 or self.spread <= 0 or self.least < 0:
            raise InputError("report.bounds: nights must be at least 2, spread above 0, least at least 0")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure of this night against its history."""

    name: str
    value: float
    median: float | None
    """Of the nights before; none while there are too few."""
    allowed: float | None
    """Distance from the median that is no alarm."""
    nights: int
    """Nights before that measured it."""
    verdict: Literal["steady", "alarm", "too few nights"]


def judge(
    tonight: Mapping[str, float],
    before: Sequence[Mapping[str, float]],
    bounds: Bounds,
    trained: Sequence[Mapping[str, float]] | None = None,
) -> tuple[Measure, ...]:
    """Each measure against those of earlier nights that are comparable: of the same space, encoder and attribute by its name.

    `trained` are the nights since the encoder was trained: texts are judged against those alone, or a lasting change would make
    it due again on every night until the median knew of it.
    """
    since = before if trained is None else trained
    return tuple(
        judged(name, value, [night[name] for night in (since if name.startswith(TEXTS) else before) if name in night], bounds)
        for name, value in tonight.items()
    )


def judged(name: str, value: float, history: Sequence[float], bounds: Bounds) -> Measure:
    """One measure against its own history."""
    if len(history) < bounds.nights:
        return Measure(name=name, value=value, median=None, allowed=None, nights=len(history), verdict="too few nights")
    median = statistics.median(history)
    deviation = 1.4826 * statistics.median(abs(past - median) for past in history)
    allowed = max(bounds.spread * deviation, bounds.least * (1.0 if name.startswith(SHARES) else abs(median)))
    verdict: Literal["steady", "alarm"] = "alarm" if not abs(value - median) <= allowed else "steady"
    return Measure(name=name, value=value, median=median, allowed=allowed, nights=len(history), verdict=verdict)


def refresh_reason(measures: Iterable[Measure]) -> str:
    """Why the texts have moved so far that the encoder should be trained again; empty where they have not."""
    moved = [measure for measure in measures if measure.verdict == "alarm" and measure.name.startswith(TEXTS)]
    return "; ".join(f"{found.name} is {found.value:.4g}, was {found.median:.4g} ± {found.allowed:.2g}" for found in moved)


# --------------------------------------------------------------------------------------------------------------- measures


def of_extract(result: Mapping[str, Any]) -> dict[str, float]:
    """Attribute fill and quarantine shares, from the Result of `extract`."""
    found = {f"fill.{name}": float(share) for name, share in result.get("fill", {}).items()}
    for source, seen in result.get("seen", {}).items():
        counts = {why: count for why, count in result.get("quarantined", {}).items() if not why.endswith(LEFT)}
        refused = sum(count for why, count in counts.items() if why.startswith(f"{source}:"))
        if seen:
            found[f"quarantine.{source}"] = refused / seen
    return found


def of_texts(lengths: Sequence[int]) -> dict[str, float]:
    """Characters of the items' texts: what their tokens grow with."""
    return {"text.characters": float(np.mean(lengths))} if lengths else {}


def of_vectors(kind: str, vector_ND: Matrix) -> dict[str, float]:
    """Mean norm, norm of the centroid beside it, and effective rank of vectors; `kind` names what they are comparable with."""
    if len(vector_ND) < 2:
        return {}
    norm = float(np.linalg.norm(vector_ND, axis=1).mean())
    centre = float(np.linalg.norm(vector_ND.mean(0)))
    return {f"{kind}.norm": norm, f"{kind}.centroid": centre / max(norm, 1e-12), f"{kind}.rank": effective_rank(vector_ND)}


def effective_rank(vector_ND: Matrix) -> float:
    """exp of the entropy of the covariance's spectrum (Roy and Vetterli 2007): how many directions the vectors really use."""
    centred_ND = vector_ND.astype(np.float64) - vector_ND.mean(0)
    wide = centred_ND.shape[1] > len(centred_ND)
    power_D = np.linalg.eigvalsh(centred_ND @ centred_ND.T if wide else centred_ND.T @ centred_ND).clip(0)
    if not power_D.sum() > 0:
        return 1.0
    share_D = power_D[power_D > 0] / power_D.sum()
    return float(math.exp(-(share_D * np.log(share_D)).sum()))


def measured(
    night: Night, sample: Sample | None, layers: Sequence[Layer], spaces: Spaces, covered: float | None
) -> dict[str, float]:
    """Name -> value of this night; vectors' measures name their space or encoder, so that only like is compared."""
    values = of_extract(night.result("extract"))
    # of a handful of new texts the mean says nothing, and it must not make the encoder due: text.characters is of them all
    if (texts := night.total("embed", "embedded")) >= ENOUGH:
        values["embedded.tokens"] = night.total("embed", "tokens") / texts
    if sample is not None:
        values |= of_texts([sum(len(name) + len(value) for name, value in pairs) for pairs in sample.attributes])
    kinds = {TEXT: f"llm {spaces.encoder_id}", SERVED: f"served {spaces.served.partition('/')[0].removeprefix('space=')}"}
    for layer in layers:
        if layer.name in kinds:
            values |= of_vectors(kinds[layer.name], np.stack(list(layer.vectors.values())))
    if covered is not None:
        values["coverage of the logs"] = covered
    return {name: round(value, 6) for name, value in values.items()}


def covered_share(lake: Path, ds: str, spaces: Spaces, most: int) -> float | None:
    """Share of the newest logs' events whose item has a vector; None without logs or vectors, or where they can't be read."""
    if not spaces.served or not most:
        return None
    try:
        newest = partitions.latest(lake, INTERACTIONS.name, ds)
        return coverage(lake, newest, pa.array(ids_of(lake, spaces.served), pa.string()), most)
    except (InputError, OSError, ValueError):
        return None


def coverage(lake: Path, partition: str, published: pa.Array, most: int) -> float | None:
    """Share of the logs' events whose item is published; of at most about `most` events, evenly taken. None without any."""
    total = partitions.read_commit(lake, INTERACTIONS.name, partition).rows
    step = max(1, total // max(most, 1))
    seen = inside = 0
    for number, batch in enumerate(partitions.scan(lake, INTERACTIONS, partition, ("item_id",))):
        if number % step == 0:
            seen += batch.num_rows
            inside += pc.sum(pc.is_in(batch["item_id"], published)).as_py() or 0
    return inside / seen if seen else None


def earlier(lake: Path, before: Sequence[Night]) -> list[dict[str, float]]:
    """Measures of earlier nights, from the manifests of their reports; nights without one are left out."""
    found = []
    for night in before:
        try:
            values = manifests.of_date(lake, night.ds, "report")["result"]["drift"]
            found.append({str(name): float(value) for name, value in values.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found
