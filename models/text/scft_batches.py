"""What each step of SCFT learns from: its items, their partners, and two views of each.

Step s draws its items and views from (seed, s) alone. So a resumed training needs no saved random state, and processes draw the
same batch without talking to each other.

Shapes: B items of a step, P pairs of items, I items of the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.text.prompts import Ints, Prompts, Texts, prompts
from models.text.users import in_passes
from models.text.views import views


class PairSettings(Protocol):
    """What batches need of a training's settings (models.text.scft.Scft has them)."""

    @property
    def batch(self) -> int:
        """Items of a step over all processes."""

    @property
    def ratio(self) -> float:
        """Share of an item's attributes that a view drops."""

    @property
    def pair_support(self) -> int:
        """Users who must have taken a pair, at least."""

    @property
    def pair_share(self) -> float:
        """Share of a batch that is pairs."""

    @property
    def popularity(self) -> float:
        """How far pairs are freed of popularity."""


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
class Pairs:
    """Items that users took one after the other, in the order in which they took them."""

    pair_P2: Ints
    user_P: Ints
    """Whose each pair is."""


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
    """Share of a batch that is pairs that users took, instead of two views of one item."""

    def draw(self, step: int) -> Drawn:
        """A step's number -> its batch. Items come in endless shuffled passes, so all batches have the same size.

        The last ones of a batch are pairs that users took, where there are any: `pair_share` of it.
        """
        items = in_passes(self.items, step, self.size, [self.seed, 1])
        pairs = round(self.pair_share * self.size) if self.partners else 0
        alone = items[: self.size - pairs]
        both = np.repeat(alone, 2)
        rows, keys = views(self.texts, both, self.ratio, self.limit, np.random.default_rng([self.seed, 2, step]))
        if not self.partners or not pairs:
            return Drawn(step, alone, alone, rows, keys)
        # what users took is read as `embed` will read it: whole, its attributes in their order
        pair_B2 = self.partners.draw(pairs, np.random.default_rng([self.seed, 5, step]))
        whole, _ = prompts(self.texts, pair_B2.ravel(), self.limit)
        rows = Prompts(np.concatenate([rows.token_T, whole.token_T]), np.concatenate([rows.length_B, whole.length_B]))
        keys = np.concatenate([keys, -1 - self.texts.text_I[pair_B2.ravel()]])
        first, second = (np.concatenate([alone, column]) for column in pair_B2.T)
        return Drawn(step, first, second, rows, keys)


class Partners:
    """Pairs of items that users took one after the other; each user weighs as much as any other, all their pairs together.

    Training takes one item of those with equal texts, the first: in pairs it stands for all of them. Pairs of equal texts, pairs
    with an item that is not trained on, and pairs that fewer than `support` users took are left out.
    """

    def __init__(self, pair_P2: Ints, items: Ints, text_I: Ints, user_P: Ints | None = None, support: int = 1) -> None:
        catalogue = len(text_I)
        user_P = np.arange(len(pair_P2)) if user_P is None else user_P
        _, first, number_I = np.unique(text_I, return_index=True, return_inverse=True)
        pair_P2 = first[number_I][pair_P2]
        trained_I = np.zeros(catalogue, dtype=bool)
        trained_I[items] = True
        kept_P = (pair_P2[:, 0] != pair_P2[:, 1]) & trained_I[pair_P2].all(axis=1)
        pair_P2, user_P = pair_P2[kept_P], user_P[kept_P]
        if support > 1:
            by_user = np.unique(np.column_stack([pair_P2, user_P]), axis=0)
            _, row_Q, count = np.unique(by_user[:, :2], axis=0, return_inverse=True, return_counts=True)
            enough = {tuple(pair) for pair in by_user[count[row_Q.ravel()] >= support][:, :2].tolist()}
            kept_P = np.fromiter((tuple(pair) in enough for pair in pair_P2.tolist()), bool, len(pair_P2))
            pair_P2, user_P = pair_P2[kept_P], user_P[kept_P]
        self.pair_P2 = pair_P2
        _, of_P, count_U = np.unique(user_P, return_inverse=True, return_counts=True)
        self.weight_P = 1 / count_U[of_P.ravel()]
        self.until_P = self.weight_P.cumsum()

    def __len__(self) -> int:
        return len(self.pair_P2)

    def draw(self, count: int, random: np.random.Generator) -> Ints:
        """pair_B2: what was taken first, and what came next; a user is drawn, then one of their pairs."""
        places = np.searchsorted(self.until_P, random.random(count) * self.until_P[-1], side="right")
        pair_B2: Ints = self.pair_P2[np.minimum(places, len(self) - 1)]
        return pair_B2

    def share_of(self, catalogue: int) -> NDArray[np.float64]:
        """How often each item is what came next, as a share of all draws."""
        share_I: NDArray[np.float64] = np.bincount(self.pair_P2[:, 1], self.weight_P, catalogue) / self.weight_P.sum()
        return share_I


def batches_of(
    texts: Texts, items: Ints, pairs: Pairs | None, config: PairSettings, limit: int, seed: int, world: int
) -> Batches:
    """Items to train on, and pairs -> what draws the batches that `world` processes share.

    Raises ValueError for a batch that they cannot share, or where no pair is left.
    """
    size = min(config.batch, len(items)) // world * world
    if size < 2 or (config.batch % world and config.batch <= len(items)):
        raise ValueError(f"batch = {config.batch} cannot be shared by {world} processes: give a multiple of {world}")
    partners = None
    if pairs is not None and config.pair_share:
        partners = Partners(pairs.pair_P2, items, texts.text_I, pairs.user_P, config.pair_support)
        if not len(partners):
            raise ValueError(f"no pair of items to train on was taken by {config.pair_support} users: lower pair_support, or set "
                             "pair_share to 0")  # fmt: skip
    return Batches(
        texts=texts,
        items=items,
        size=size,
        ratio=config.ratio,
        limit=limit,
        seed=seed,
        partners=partners,
        pair_share=config.pair_share,
    )


def often(batches: Batches, catalogue: int, settings: PairSettings) -> NDArray[np.float32] | None:
    """often_I: the logarithm of how often an item is the second of a pair, times settings.popularity; None without pairs."""
    if batches.partners is None or not settings.pair_share:
        return None
    alone = np.zeros(catalogue)
    alone[batches.items] = 1 / len(batches.items)
    share_I = settings.pair_share * batches.partners.share_of(catalogue) + (1 - settings.pair_share) * alone
    # an item that is never drawn is no negative: its value is never read, but must be finite
    return (settings.popularity * np.log(np.maximum(share_I, 1 / (1000 * catalogue)))).astype(np.float32)


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
