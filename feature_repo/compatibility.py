"""How far a refresh moves the space that serves: neighbours lost by group, and what a rotation can't explain.

Shapes: N items in both snapshots whose text did not change, D width, Q queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float32]
NEIGHBOURS = 10
QUERIES = 1_000
"""Items of each group whose neighbours are compared."""
BLOCK = 256
ALIGNABLE = 0.1
"""A distance or residual up to this share: the new space is the old one, or it turned."""


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """A refresh against what serves."""

    kind: str
    """`first`, `same space`, `aligned` (nearly equal as they are), `alignable` (a rotation explains it) or `breaking`."""
    distance: float
    """|new - old| / |old|, as they are."""
    residual: float
    """What the best rotation of the new ones leaves of it; 0 in the same space, unmoved. Both are 1 for another width."""
    churn: dict[str, float]
    """Share of the ten nearest neighbours that changed, by group of items, though no text did."""
    items: int
    """Items that were compared."""


def compare(old_ND: Matrix, new_ND: Matrix, groups: Sequence[str], *, same: bool) -> Compatibility:
    """Compares vectors of the same items, unchanged in text, in two snapshots; row n is one item in both."""
    if not len(old_ND):
        return Compatibility(kind="same space" if same else "breaking", distance=1.0, residual=1.0, churn={}, items=0)
    distance = residual = 1.0
    if old_ND.shape[1] == new_ND.shape[1]:
        distance, residual = apart(old_ND, new_ND), apart(old_ND, new_ND @ procrustes(old_ND, new_ND))
    explained = "aligned" if distance <= ALIGNABLE else "alignable" if residual <= ALIGNABLE else "breaking"
    return Compatibility(
        kind="same space" if same else explained,
        distance=round(distance, 4),
        residual=round(residual, 4),
        churn=churn(old_ND, new_ND, groups),
        items=len(old_ND),
    )


def procrustes(old_ND: Matrix, new_ND: Matrix) -> Matrix:
    """turn_DD: the rotation or reflection with new_ND @ turn_DD nearest to old_ND (Schönemann 1966)."""
    left_DD, _, right_DD = np.linalg.svd(new_ND.astype(np.float64).T @ old_ND.astype(np.float64))
    turn_DD: Matrix = (left_DD @ right_DD).astype(np.float32)
    return turn_DD


def apart(old_ND: Matrix, new_ND: Matrix) -> float:
    """|new - old| / |old|, the relative Frobenius error."""
    return float(np.linalg.norm(new_ND - old_ND) / np.linalg.norm(old_ND))


def churn(old_ND: Matrix, new_ND: Matrix, groups: Sequence[str]) -> dict[str, float]:
    """Share of each item's nearest neighbours, by cosine, that are others now; a mean for each group."""
    group_N = np.asarray(groups)
    lost = {}
    for group in sorted(set(groups)):
        (row_Q,) = np.nonzero(group_N == group)
        row_Q = row_Q[:: max(1, len(row_Q) // QUERIES)]
        before_QK, after_QK = neighbours(old_ND, row_Q), neighbours(new_ND, row_Q)
        kept = [
            len(np.intersect1d(before, after)) / max(1, len(before)) for before, after in zip(before_QK, after_QK, strict=True)
        ]
        lost[group] = round(1 - float(np.mean(kept)), 4) if before_QK.shape[1] else 0.0
    return lost


def neighbours(emb_ND: Matrix, row_Q: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """row_QK of each query's nearest items by cosine, itself left out."""
    unit_ND = emb_ND / np.linalg.norm(emb_ND, axis=1, keepdims=True)
    count = min(NEIGHBOURS, len(emb_ND) - 1)
    found = [np.empty((0, count), np.int64)]
    for start in range(0, len(row_Q), BLOCK):
        row_q = row_Q[start : start + BLOCK]
        score_qN = unit_ND[row_q] @ unit_ND.T
        score_qN[np.arange(len(row_q)), row_q] = -np.inf
        found.append(np.argpartition(-score_qN, max(count - 1, 0), axis=1)[:, :count])
    return np.concatenate(found)
