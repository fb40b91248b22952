"""The serving space's vectors, a recommender just trained -> the rotation that turns its vectors towards them.

What a model's vectors mean hangs on their basis, and each training lands in another one. A recommender's scores do not: turned
alike, items and users give the same dot products. So a refresh keeps the basis of what serves where it can, and those who
trained on the old vectors see nearly the same ones. It is a new space all the same.

Shapes: N items in both whose text did not change, D width, V items + 1 (row 0 is padding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from feature_repo.compatibility import Matrix, apart, procrustes
from jobs.lake import artifacts, partitions
from jobs.lake.tables import item_embeddings, space_of
from jobs.lake.tensors import Catalogue
from jobs.run import Run

MOST = 100_000
"""Items that a rotation is estimated from, at most; it has D x D numbers."""


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """How a recommender was turned; figures are of the vectors of the same items there and here."""

    to: str = ""
    """The recommender whose vectors were the goal; empty: not turned."""
    note: str
    """What was done, or why nothing was."""
    items: int = 0
    """Items compared."""
    distance: float | None = None
    """|new - old| / |old| before the turn."""
    residual: float | None = None
    """The same after it."""
    cosine_before: float | None = None
    """Mean cosine of an item's new and old vector before the turn."""
    cosine: float | None = None
    """The same after it."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """Vectors to turn towards."""

    to: str
    partition: str
    digest: str
    row_N: npt.NDArray[np.int64]
    """The items' indices; 0 is padding."""
    old_ND: Matrix
    spans: dict[str, tuple[int, int]]
    """Columns of each part in the old vectors."""


def find(run: Run, which: str, catalogue: Catalogue, part_width: int) -> Goal | Rotation:
    """The goal that `which` names: `champion` or a recommender's id; where there is none, the Rotation that says why.

    The goal's llmemb part must be `part_width` wide.

    What is of the same date or later is left out, so that a night that is run again after its promotion comes to the same goal.
    """
    if which == "none":
        return Rotation(note="not asked for")
    # MLflow takes seconds to load, and GPU workers may lack it
    from jobs.engines import registry

    to = before(run) if which == "champion" else which
    if not to:
        return Rotation(note=f"no champion of a date before {run.ds}: nothing serves whose basis could be kept")
    known = artifacts.about(registry.fetch(run, "recommender", to))
    width, spans = known["width"], spans_of(known)
    start, stop = spans.get("llmemb", (0, 0))
    if stop - start != part_width:
        return Rotation(
            note=f"recommender {to} is {stop - start} wide, this one {part_width}: a breaking refresh, no rotation joins them"
        )
    space = f"space={space_of(known['encoder_id'], to)}"
    dates = [name for name in partitions.committed(run.lake, "item_embeddings", space) if name < f"{space}/ds={run.ds}"]
    if not dates:
        return Rotation(
            note=f"item_embeddings/{space} has no date before {run.ds}: recommender {to} was not projected, or it is gone"
        )
    row_N, old_ND = common(run, dates[-1], width, catalogue)
    if len(row_N) < width:
        return Rotation(
            note=f"{len(row_N)} items have the same text in item_embeddings/{dates[-1]}: too few for a rotation of {width}"
        )
    digest = partitions.read_commit(run.lake, "item_embeddings", dates[-1]).digest
    return Goal(to=to, partition=dates[-1], digest=digest, row_N=row_N, old_ND=old_ND, spans=spans)


def spans_of(known: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Columns of each part, from a recommender's JSON; one that is not of parts is all `llmemb`."""
    if "parts" not in known:
        return {"llmemb": (0, known["width"])}
    stops = np.cumsum([part["backbone"]["width"] for part in known["parts"]]).tolist()
    return {part["name"]: (stop - part["backbone"]["width"], stop) for part, stop in zip(known["parts"], stops, strict=True)}


def before(run: Run) -> str:
    """The champion of an earlier date; of an alias that was trained on this date or later nothing is known yet. "" for none."""
    from jobs.engines import registry

    found = (registry.by_alias(run, alias) for alias in ("champion", "previous"))
    return next((model["recommender_id"] for model in found if model and model["ds"] < run.ds), "")


def common(run: Run, partition: str, width: int, catalogue: Catalogue) -> tuple[npt.NDArray[np.int64], Matrix]:
    """(row_N, old_ND) of items whose text is the same, at most about MOST of them, spread over the catalogue."""
    step = -(-len(catalogue.item_ids) // MOST)
    ids, hashes = pa.array(catalogue.item_ids[::step], pa.string()), catalogue.content_hashes[::step]
    rows, vectors = [np.empty(0, np.int64)], [np.empty((0, width), np.float32)]
    for batch in partitions.scan(run.lake, item_embeddings(width), partition, ("item_id", "content_hash", "embedding")):
        place = pc.index_in(batch["item_id"], value_set=ids)
        same = pc.equal(hashes.take(place), batch["content_hash"])
        rows.append(place.filter(same).to_numpy().astype(np.int64) * step + 1)
        vectors.append(batch["embedding"].filter(same).flatten().to_numpy().reshape(-1, width))
    return np.concatenate(rows), np.concatenate(vectors)


def turn(goal: Goal | Rotation, name: str, emb_ND: Tensor) -> tuple[Tensor | None, Rotation]:
    """(turn_DD, what it does) for a part's vectors of the goal's items."""
    if isinstance(goal, Rotation):
        return None, goal
    start, stop = goal.spans.get(name, (0, 0))
    width = emb_ND.shape[1]
    if stop - start != width:
        return None, Rotation(note=f"recommender {goal.to} has {stop - start} columns of {name}, this one {width}: a breaking "
                                   "refresh, no rotation joins them")  # fmt: skip
    old_ND, new_ND = goal.old_ND[:, start:stop], emb_ND.float().cpu().numpy()
    turn_DD = procrustes(old_ND, new_ND)
    (distance, cosine_before), (residual, cosine) = (figures(old_ND, some_ND) for some_ND in (new_ND, new_ND @ turn_DD))
    return torch.from_numpy(turn_DD), Rotation(
        to=goal.to,
        note=f"turned towards the vectors of recommender {goal.to} in item_embeddings/{goal.partition}",
        items=len(goal.row_N),
        distance=distance,
        residual=residual,
        cosine_before=cosine_before,
        cosine=cosine,
    )


def figures(old_ND: Matrix, new_ND: Matrix) -> tuple[float, float]:
    """Relative Frobenius error and mean cosine."""
    lengths_N = np.linalg.norm(old_ND, axis=1) * np.linalg.norm(new_ND, axis=1)
    return round(apart(old_ND, new_ND), 4), round(float(np.mean((old_ND * new_ND).sum(1) / lengths_N)), 4)


def in_words(rotation: Rotation) -> str:
    """A line for a person."""
    if rotation.residual is None:
        return rotation.note
    return (
        f"{rotation.note}, {rotation.items:,} items: distance {rotation.distance} -> {rotation.residual}, "
        f"cosine {rotation.cosine_before} -> {rotation.cosine}"
    )
