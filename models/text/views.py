"""Draws views of items: the same attributes in another order, some of them dropped (METHOD §1).

Shapes: B views.
"""

from __future__ import annotations

import numpy as np

from models.text.prompts import Ints, Prompts, Texts, count_fitting, join_pieces


def views(texts: Texts, items: Ints, ratio: float, limit: int, random: np.random.Generator) -> tuple[Prompts, Ints]:
    """Items -> one view of each, and a key of each view. Views with the same attributes have equal keys, in any order.

    A view has the item's attributes in random order. It drops a share `ratio` of them on average, and never all.
    """
    lengths = np.diff(texts.token_P1)
    chosen, keys = [], []
    for item in items.tolist():
        pieces = random.permutation(np.arange(texts.piece_I1[item], texts.piece_I1[item + 1]))
        dropped = min(int(ratio * len(pieces) + random.random()), len(pieces) - 1)
        pieces = pieces[dropped:]
        pieces = pieces[: count_fitting(lengths[pieces], limit)]
        chosen.append(pieces)
        keys.append(hash(tuple(np.sort(texts.known_P[pieces]).tolist())))
    return join_pieces(texts, chosen, limit), np.asarray(keys, dtype=np.int64)
