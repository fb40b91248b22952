"""Who is badly served: users none of whose held-out events is among the ten best, by what is known of them.

Read from what `evaluate` kept of every held-out event; users are numbers there, and none is told of here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from jobs.lake import artifacts
from jobs.lake.nights import Night
from jobs.lake.outcomes import read_outcomes

MODEL = "llmemb"
"""The model that the evaluation judged."""
GROUPS = {
    "overall": "All users",
    "short": "Short histories",
    "long": "Long histories (a fifth)",
    "head": "Looking for popular items",
    "tail": "Looking for rare items",
    "cold": "Looking for items without events",
    "repeat": "Coming back to an item",
    "new": "Looking for something new to them",
    "weak_length": "Fewest events (a fifth)",
    "weak_popularity": "Rarest items in their histories (a fifth)",
    "weak_sparsity": "Fewest different items (a fifth)",
    "weak_validation": "Worst rank on validation (a fifth)",
}
"""Slices of the evaluation, in words; the last four are told by what was known before."""
MEASURE = "weak."


@dataclass(frozen=True, kw_only=True)
class Group:
    """Users with a held-out event of one slice."""

    slice: str
    users: int
    weak: float
    """Share of them that had no hit in that slice."""
    ndcg: float
    """Mean over the users."""


def groups(lake: Path, night: Night) -> tuple[Group, ...]:
    """Every group that has users; none where nothing was evaluated, or what it kept is gone."""
    identity = str(night.result("evaluate").get("outcomes_id") or "none")
    try:
        found = read_outcomes(artifacts.find(lake, "outcomes", identity))
        ndcg_C = found.ndcg_KC[found.models.index(MODEL)]
        slices = dict(zip(found.slices, found.slices_SC, strict=True))
    except (OSError, ValueError, KeyError, SafetensorError):
        return ()
    made = (group(name, found.user_C[slices[name]], ndcg_C[slices[name]]) for name in GROUPS if name in slices)
    return tuple(one for one in made if one.users)


def group(name: str, user_C: npt.NDArray[np.int64], ndcg_C: npt.NDArray[np.float64]) -> Group:
    """One group, from the cases of its slice."""
    _, place_C, count_U = np.unique(user_C, return_inverse=True, return_counts=True)
    mean_U = np.bincount(place_C, weights=ndcg_C, minlength=len(count_U)) / np.maximum(count_U, 1)
    if not len(mean_U):
        return Group(slice=name, users=0, weak=0.0, ndcg=0.0)
    return Group(slice=name, users=len(mean_U), weak=float((mean_U == 0).mean()), ndcg=float(mean_U.mean()))


def measures(found: tuple[Group, ...]) -> dict[str, float]:
    """Name -> share of weak users, for the history of later nights."""
    return {f"{MEASURE}{one.slice}": round(one.weak, 6) for one in found}
