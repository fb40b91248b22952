"""Asks that came together -> the best items of each, in one pass over recommender and index.

Shapes: D width, B asks, K found, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from feature_repo.nearest import Matrix, Rows, scored
from feature_repo.serving.generation import BIT, Generation, Unfit, exact_is_cheap
from feature_repo.serving.settings import Settings

LIGHT_ASKS, LIGHT_K = 8, 100
LIGHT_HIDDEN = 200
"""Hidden rows beside which one search surely finds enough; where it does not, all items are scored."""
LIGHT_NUMBERS = 64_000_000
"""Numbers of vectors whose codes are looked at in a millisecond or two."""
LIGHT_SCORED = 4_000_000
"""Those that are multiplied in full in some more; a space without codes may have many times as many."""
Filters = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one request wants of a generation."""

    generation: Generation
    row_L: Rows
    """Rows of the history, oldest first; or of the one item whose neighbours are asked for."""
    user: bool
    """Whether `row_L` is a history to encode, else an item; without rows what is popular is meant."""
    k: int
    hidden: frozenset[int]
    """Rows that must not be answered."""
    filters: Filters = ()
    explain: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best rows of one ask, best first."""

    row_K: Rows
    score_K: Matrix
    shares: list[dict[str, float]]
    """What each part brought; empty where it was not asked for, or there is one part."""


def is_light(asks: Sequence[Ask], settings: Settings) -> bool:
    """Whether asks take so little that handing them to a thread and back would take about as long."""
    return len(asks) <= LIGHT_ASKS and all(
        not ask.filters
        and ask.k <= LIGHT_K
        and len(ask.hidden) <= LIGHT_HIDDEN
        and ask.generation.index.vector_ND.size * len(asks)
        <= (LIGHT_SCORED if exact_is_cheap(ask.generation, settings) else LIGHT_NUMBERS)
        for ask in asks
    )


def answer(asks: Sequence[Ask], settings: Settings) -> list[Found | Exception]:
    """An answer for each ask; one that fails leaves the others alone."""
    found: list[Found | Exception | None] = [None] * len(asks)
    for generation in {id(ask.generation): ask.generation for ask in asks}.values():
        mine = [number for number, ask in enumerate(asks) if ask.generation is generation]
        try:
            answers: Sequence[Found | Exception] = of_generation(generation, [asks[number] for number in mine], settings)
        except Exception as error:
            answers = [error] * len(mine)
        for number, one in zip(mine, answers, strict=True):
            found[number] = one
    return [one for one in found if one is not None]


def of_generation(made: Generation, asks: Sequence[Ask], settings: Settings) -> list[Found | Exception]:
    """As `answer`, all of one generation: histories encoded at once, and searched at once where no filter sets them apart."""
    query_BD = np.zeros((len(asks), made.index.vector_ND.shape[1]), np.float32)
    users = [number for number, ask in enumerate(asks) if ask.user and len(ask.row_L)]
    if users:
        query_BD[users] = made.encode([asks[number].row_L for number in users])
    for number, ask in enumerate(asks):
        if not ask.user:
            query_BD[number] = made.index.vector_ND[ask.row_L[-1]]
    plain = [number for number, ask in enumerate(asks) if len(ask.row_L) and not ask.filters]
    first = searched(made, query_BD[plain], [asks[number] for number in plain], settings) if plain else {}
    answers: list[Found | Exception] = []
    for number, ask in enumerate(asks):
        try:
            if not len(ask.row_L):
                answers.append(popular(made, ask))
                continue
            pair = first.get(plain.index(number)) if number in plain else None
            row_K, score_K = pair or filtered(made, query_BD[number], ask, settings)
            shares = made.shares(query_BD[number], row_K) if ask.explain and made.parts else []
            answers.append(Found(row_K=row_K, score_K=score_K, shares=shares))
        except Unfit as error:
            answers.append(error)
    return answers


def searched(made: Generation, query_BD: Matrix, asks: Sequence[Ask], settings: Settings) -> dict[int, tuple[Rows, Matrix]]:
    """(row_K, score_K) of those asks that one search of all items satisfies."""
    # hidden items lie near the user: as many more are asked for, up to the breadth that is looked at anyway
    if exact_is_cheap(made, settings):
        row_BC, _ = made.index.exact(query_BD, max(ask.k + len(ask.hidden) for ask in asks))
    else:
        most = max(scored(ask.k) + min(len(ask.hidden), settings.breadth) for ask in asks)
        row_BC = made.index.candidates(query_BD, most, settings.breadth)
    found = {}
    for number, ask in enumerate(asks):
        kept = [row for row in row_BC[number].tolist() if row not in ask.hidden and row >= 0]
        row_K = np.array(kept, np.int64)
        score_K = made.index.vector_ND[row_K] @ query_BD[number]
        order_K = np.lexsort((row_K, -score_K))[: ask.k]
        if len(order_K) >= min(ask.k, len(made.index) - len(ask.hidden)):
            found[number] = (row_K[order_K], score_K[order_K])
    return found


def filtered(made: Generation, query_D: Matrix, ask: Ask, settings: Settings) -> tuple[Rows, Matrix]:
    """(row_K, score_K) among the items that a filter leaves: exactly where these are few, or too few are found.

    Raises Unfit for an attribute that no item has.
    """
    mask_N = allowed(made, ask)
    row_N = np.flatnonzero(mask_N)
    if len(row_N) * len(query_D) > settings.exact_numbers and made.index.about["approximate"]:
        row_QK, score_QK = made.index.approximate(query_D[None], ask.k, settings.breadth, mask_N)
        if row_QK.shape[1] >= min(ask.k, len(row_N)):
            return row_QK[0], score_QK[0]
    row_QK, score_QK = made.index.among(query_D[None], row_N, ask.k)
    return row_QK[0], score_QK[0]


def allowed(made: Generation, ask: Ask) -> BIT:
    """mask_N of the items that may be answered."""
    mask_N: BIT = made.mask(ask.filters).copy()
    mask_N[list(ask.hidden)] = False
    return mask_N


def popular(made: Generation, ask: Ask) -> Found:
    """What many took of late; the score is how many events that were."""
    if ask.filters:
        mask_N = allowed(made, ask)
        row_K = made.popular_N[mask_N[made.popular_N]][: ask.k]
    else:
        row_K = made.popular_N[: ask.k + len(ask.hidden)]
        row_K = row_K[~np.isin(row_K, list(ask.hidden))][: ask.k] if ask.hidden else row_K
    recent_K = made.index.items["recent"].take(row_K).to_numpy()
    return Found(row_K=row_K.astype(np.int64), score_K=recent_K.astype(np.float32), shares=[])
