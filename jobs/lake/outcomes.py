"""What `evaluate` kept of every held-out event (artifact `outcomes`), as arrays; users are numbers there.

Shapes: K models, S slices, C cases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jobs.lake import artifacts


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """Every model's NDCG of every held-out event."""

    models: list[str]
    slices: list[str]
    user_C: np.ndarray[Any, np.dtype[np.int64]]
    slices_SC: np.ndarray[Any, np.dtype[np.bool_]]
    ndcg_KC: np.ndarray[Any, np.dtype[np.float64]]


def read_outcomes(folder: Path) -> Outcomes:
    """The outcomes in an artifact's folder. Raises OSError, ValueError, KeyError or SafetensorError for damaged files."""
    names = json.loads((folder / "outcomes.json").read_text())
    found = load_file(folder / "outcomes.safetensors")
    return Outcomes(
        models=names["models"],
        slices=names["slices"],
        user_C=found["user_C"].astype(np.int64),
        slices_SC=found["slices_SC"].astype(bool),
        ndcg_KC=found["ndcg_KC"].astype(np.float64),
    )


def keep_outcomes(lake: Path, found: Outcomes, metric: str) -> str:
    """Keeps outcomes as an artifact, equal ones once -> its id."""
    staged = artifacts.stage(lake, "outcomes")
    tensors = {
        "user_C": found.user_C.astype(np.int32),
        "slices_SC": np.ascontiguousarray(found.slices_SC),
        "ndcg_KC": np.ascontiguousarray(found.ndcg_KC.astype(np.float32)),
    }
    save_file(tensors, staged / "outcomes.safetensors")
    names = {"models": found.models, "slices": found.slices, "metric": metric}
    (staged / "outcomes.json").write_text(json.dumps(names, sort_keys=True))
    return artifacts.keep(lake, "outcomes", staged)
