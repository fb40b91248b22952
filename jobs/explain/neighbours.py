"""The nearest items in a space, by exact dot products, with their titles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.explain.result import Neighbour
from jobs.lake import items
from jobs.run import InputError

if TYPE_CHECKING:
    from feature_repo.reader import Space


def nearest(lake: Path, space: Space | None, item_id: str, count: int) -> list[tuple[str, float]]:
    """(id, score) of the nearest other items of a space, best first; none where it or its index is gone, or lacks the item."""
    from jobs.engines import online

    if space is None or count < 1:
        return []
    try:
        built = online.open_index(lake, space)
        row = built.item_ids.index(item_id)
    except (InputError, ValueError):
        return []
    row_QK, score_QK = built.exact(np.asarray(built.vector_ND[row : row + 1]), count + 1)
    pairs = [(built.item_ids[at], float(score)) for at, score in zip(row_QK[0], score_QK[0], strict=True) if at != row]
    return pairs[:count]


def titles(lake: Path, ds: str, item_ids: Sequence[str]) -> dict[str, str]:
    """A name for each item; its id where the catalogue can't be read, which the chain tells of."""
    try:
        return items.titles(lake, ds, item_ids)
    except (OSError, ValueError):
        return dict(zip(item_ids, item_ids, strict=True))


def with_titles(pairs: Sequence[tuple[str, float]], names: dict[str, str]) -> tuple[Neighbour, ...]:
    """Neighbours with their titles."""
    return tuple(Neighbour(item_id=item_id, title=names[item_id], score=round(score, 5)) for item_id, score in pairs)
