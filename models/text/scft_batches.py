"""What each step of SCFT learns from: its items, their partners, and two views of each.

Step s draws its items and views from (seed, s) alone. So a resumed training needs no saved random state, and processes draw the
same batch without talking to each other.

Shapes: B items of a step, P pairs of items, I items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.text.prompts import Ints, Prompts, Texts
from models.text.views import views


@dataclass(frozen=True)
class Drawn:
    """One step's batch: items, their partners (themselves where they have none), and two views of each pair in turn."""

    step: int
    items: Ints
    partners: Ints
    rows: Prompts
    keys: Ints
    """Views with the same attributes have equal keys."""


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Draws the batch of any step."""

    texts: Texts
    items: Ints
    """Items to train on."""
    size: int
    """Items of a step."""
    ratio: float
    """Share of an item's attributes that a view drops, on average."""
    limit: int
    """Tokens of a view, at most."""
    seed: int
    partners: Partners | None = None
    pair_share: float = 0.0
    """Share of items that meet a partner's view instead of a second one of their own."""

    def draw(self, step: int) -> Drawn:
        """A step's number -> its batch. Items come in endless shuffled passes, so all batches have the same size."""
        places = np.arange(step * self.size, (step + 1) * self.size)
        passes = places // len(self.items)
        order = {number: np.random.default_rng([self.seed, 1, number]).permutation(self.items) for number in np.unique(passes)}
        items = np.asarray([order[number][place % len(self.items)] for number, place in zip(passes, places, strict=True)])
        partners = items
        if self.partners:
            partners = self.partners.draw(items, self.pair_share, np.random.default_rng([self.seed, 5, step]))
        both = np.stack([items, partners], axis=1).ravel()
        rows, keys = views(self.texts, both, self.ratio, self.limit, np.random.default_rng([self.seed, 2, step]))
        return Drawn(step, items, partners, rows, keys)


class Partners:
    """For every item the items that users took right before or after it, as often as they did.

    Training takes one item of those with equal texts, the first: in pairs it stands for all of them. Pairs of equal texts, and
    pairs with an item that is not trained on, are left out.
    """

    def __init__(self, pair_P2: Ints, items: Ints, text_I: Ints) -> None:
        catalogue = len(text_I)
        _, first, number_I = np.unique(text_I, return_index=True, return_inverse=True)
        pair_P2 = first[number_I][pair_P2]
        pair_P2 = pair_P2[pair_P2[:, 0] != pair_P2[:, 1]]
        trained_I = np.zeros(catalogue, dtype=bool)
        trained_I[items] = True
        pair_P2 = pair_P2[trained_I[pair_P2].all(axis=1)]
        one_P, self.other_P = np.concatenate([pair_P2, pair_P2[:, ::-1]]).T
        order = np.argsort(one_P, kind="stable")
        self.other_P, self.count_I = self.other_P[order], np.bincount(one_P, minlength=catalogue)
        self.start_I = self.count_I.cumsum() - self.count_I

    def draw(self, items: Ints, share: float, random: np.random.Generator) -> Ints:
        """Items -> a partner for a share of them. The others, and items without partners, get themselves."""
        place_B, drawn_B = random.random((2, len(items)))
        count_B = self.count_I[items]
        met_B = (drawn_B < share) & (count_B > 0)
        result = items.copy()
        result[met_B] = self.other_P[(self.start_I[items] + place_B * count_B).astype(np.int64)[met_B]]
        return result


def shuffle_texts(items: Sequence[Sequence[tuple[str, str]]], seed: int) -> list[list[tuple[str, str]]]:
    """Items' attributes -> a control for experiments: each attribute's values go to random items, so texts say nothing true.

    METHOD §3.
    """
    random = np.random.default_rng([seed, 4])
    result = [list(attributes) for attributes in items]
    places: dict[str, list[tuple[int, int]]] = {}
    for row, attributes in enumerate(items):
        for column, (name, _) in enumerate(attributes):
            places.setdefault(name, []).append((row, column))
    for name, where in places.items():
        for (row, column), source in zip(where, random.permutation(len(where)), strict=True):
            result[row][column] = (name, items[where[source][0]][where[source][1]][1])
    return result
