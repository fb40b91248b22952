"""A generation: pointer, index, recommender and attributes that belong together, loaded whole and never changed.

Shapes: N items, D width, B histories, L positions (newest last, LEFT-padded), K found.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from feature_repo.index import Foreign, Index
from feature_repo.nearest import Matrix, Rows
from feature_repo.reader import Pointer
from feature_repo.serving import artifacts
from feature_repo.serving.settings import Settings
from models.behaviour.artifact import load_recommender

POPULATE_READ = 22
"""Linux's MADV_POPULATE_READ: maps pages before a request needs them."""
STEP = 1 << 19
"""Bytes mapped at once; the interpreter is held meanwhile."""
MASKS = 64
"""Filters whose items are remembered."""
BIT = npt.NDArray[np.bool_]


class Unfit(ValueError):
    """A request that this generation can't answer; the message says what to ask instead."""


class Encoder(Protocol):
    """What serving needs of a recommender; see `models.behaviour.recommender.LoadedRecommender`."""

    def encode(self, emb_BLD: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
        """user_BD of histories given as item vectors."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """What answers requests: it is taken once a request, so no answer mixes two."""

    pointer: Pointer
    index: Index
    recommender: Encoder | None
    """None where the pointer names none, and so users can't be encoded."""
    max_len: int
    """Newest events of a history that are read."""
    parts: tuple[tuple[str, int, int], ...]
    """(name, first column, column after the last) of each part of the vectors; none where the recommender has one part."""
    popular_N: npt.NDArray[np.uint32]
    """Rows by recent events, most first."""
    withheld: frozenset[str] = frozenset()
    """Ids that were forgotten since the index was built."""
    withheld_rows: frozenset[int] = frozenset()

    def without(self, item_ids: Sequence[str]) -> Generation:
        """The same without some more items; itself where it withholds them already."""
        if self.withheld.issuperset(item_ids):
            return self
        withheld = self.withheld | set(item_ids)
        rows = self.index.rows_of(sorted(withheld))
        return dataclasses.replace(self, withheld=withheld, withheld_rows=frozenset(int(row) for row in rows if row >= 0))

    def rows_of(self, item_ids: Sequence[str]) -> Rows:
        """Row of each id, -1 where this generation does not serve it."""
        row_N = self.index.rows_of(item_ids)
        if self.withheld_rows:
            row_N[np.isin(row_N, list(self.withheld_rows))] = -1
        return row_N

    def encode(self, histories: Sequence[Rows]) -> Matrix:
        """user_BD float32 of histories given as rows, oldest first, each with at least one."""
        assert self.recommender is not None
        length = min(self.max_len, max(len(row_L) for row_L in histories))
        emb_BLD = np.zeros((len(histories), length, self.index.vector_ND.shape[1]), np.float32)
        valid_BL = np.zeros((len(histories), length), np.bool_)
        for number, row_L in enumerate(histories):
            newest_L = row_L[-length:]
            emb_BLD[number, length - len(newest_L) :] = self.index.vector_ND[newest_L]
            valid_BL[number, length - len(newest_L) :] = True
        with torch.inference_mode():
            user_BD = self.recommender.encode(torch.from_numpy(emb_BLD), torch.from_numpy(valid_BL))
            answer: Matrix = user_BD.float().numpy()
        return answer

    def shares(self, query_D: Matrix, row_K: Rows) -> list[dict[str, float]]:
        """What each part brings to the score of each row; together they are the score."""
        item_KD = np.asarray(self.index.vector_ND[row_K])
        columns = {name: item_KD[:, start:stop] @ query_D[start:stop] for name, start, stop in self.parts}
        return [{name: round(float(score_K[at]), 6) for name, score_K in columns.items()} for at in range(len(row_K))]

    @functools.cached_property
    def mask(self) -> Any:
        """mask_N of items that have, for each attribute of a filter, one of its values."""

        @functools.lru_cache(MASKS)
        def made(filters: tuple[tuple[str, tuple[str, ...]], ...]) -> BIT:
            mask_N = np.ones(len(self.index), np.bool_)
            for name, values in filters:
                try:
                    mask_N &= self.index.having(name, values)
                except KeyError:
                    raise Unfit(
                        f"no item has an attribute {name[:100]!r}: take one that /vectors with `attributes` shows"
                    ) from None
            return mask_N

        return made


def load(settings: Settings, pointer: Pointer) -> Generation:
    """A generation with everything checked and warm, without touching any that serves.

    Raises Absent, Foreign, ValueError.
    """
    index = artifacts.open_index(settings, pointer)
    recommender: Any = None
    if pointer.recommender_id:
        recommender = load_recommender(artifacts.recommender_folder(settings, pointer.recommender_id))
        if recommender.width != pointer.width:
            raise Foreign(f"recommender {pointer.recommender_id} is {recommender.width} wide, its space {pointer.width}")
    recent_N = index.items["recent"].to_numpy()
    made = Generation(
        pointer=pointer,
        index=index,
        recommender=recommender,
        max_len=recommender.backbone.max_len if recommender else 1,
        parts=parts_of(recommender, pointer.width),
        popular_N=np.argsort(-recent_N, kind="stable").astype(np.uint32),
    ).without(pointer.withheld)
    warm(made, settings)
    return made


def parts_of(recommender: Any, width: int) -> tuple[tuple[str, int, int], ...]:
    """Name and columns of each part that a recommender tells of. Raises Foreign where they are not the width side by side."""
    found = []
    for part in getattr(recommender, "parts", None) or ():
        known: Mapping[str, Any] = part if isinstance(part, Mapping) else {n: getattr(part, n) for n in ("name", "start", "stop")}
        found.append((str(known["name"]), int(known["start"]), int(known["stop"])))
    if found and [stop for _, _, stop in found] != [start for _, start, _ in found[1:]] + [width]:
        raise Foreign(f"the recommender's parts {found} do not lie side by side in vectors of width {width}")
    return tuple(found)


def warm(made: Generation, settings: Settings) -> None:
    """Maps what requests will touch, and runs a few, so that none waits for the disk. Slowly: what serves goes first."""
    pages = made.index.pages
    for start in range(0, len(pages), STEP):
        try:
            pages.madvise(POPULATE_READ, start, min(STEP, len(pages) - start))
        except OSError:  # a kernel before 5.14: pages come as they are touched
            break
        time.sleep(0)
    rows = np.linspace(0, len(made.index) - 1, 16).astype(np.int64)
    for row in rows:
        query_QD = np.asarray(made.index.vector_ND[row : row + 1])
        if exact_is_cheap(made, settings):
            made.index.exact(query_QD, 10)
        else:
            made.index.approximate(query_QD, 10, settings.breadth)
        if made.recommender is not None and not np.isfinite(made.encode([rows])).all():
            raise Foreign(f"recommender {made.pointer.recommender_id} makes vectors that are not finite")
        time.sleep(0.001)


def exact_is_cheap(made: Generation, settings: Settings) -> bool:
    """Whether a search goes over all items."""
    return made.index.vector_ND.size <= settings.exact_numbers or not made.index.about["approximate"]
