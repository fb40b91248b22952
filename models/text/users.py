"""Users as prompts: the titles of what they had, and where asked for, the title of what they had next.

Step s draws its users from (seed, s) alone, as its items.

Shapes: B users of a step, U users, N events, I items of the catalogue, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models.text.encoder import Encoder, head_and_tail
from models.text.prompts import LONGEST_TOKEN, Ints, Prompts, encode_phrases, take

SENTENCE = "A user had these items, one after the other:"
"""Stands before every user's titles."""
LEAST = 16
"""Tokens of a user's titles that a prompt must have room for."""


def prompt_of(encoder: Encoder) -> tuple[tuple[int, ...], int]:
    """An encoder -> the tokens before a user's titles, and how many may come after them."""
    head = head_and_tail(encoder.tokenizer, SENTENCE)[0]
    return head, encoder.limit + len(encoder.head) - len(head)


@dataclass(frozen=True, kw_only=True)
class Users:
    """What users had in their train rows: user u the items item_N[start_U1[u]:start_U1[u+1]], oldest first."""

    item_N: Ints
    start_U1: Ints
    titles: Prompts
    """Tokens of each item's title, a separator at the end; none where it has no title."""

    def histogram(self, user: int, cluster_I: Ints) -> NDArray[np.float32]:
        """share_K: how a user's items are spread over the clusters; all 0 where no item has one."""
        own = cluster_I[self.item_N[self.start_U1[user] : self.start_U1[user + 1]]]
        count_K = np.bincount(own[own >= 0], minlength=int(cluster_I.max(initial=0)) + 1).astype(np.float32)
        share_K: NDArray[np.float32] = count_K / max(float(count_K.sum()), 1.0)
        return share_K


def users_of(encoder: Encoder, item_N: Ints, user_N: Ints, titles: Sequence[str]) -> Users:
    """Events (a user's together, oldest first; items as rows of the catalogue), and all items' titles -> users to learn from.

    Events of items without a title, and users with fewer than two others, are left out. Raises ValueError where none is left.
    """
    policy = encoder.spec.policy
    room = prompt_of(encoder)[1]
    if room < LEAST:
        raise ValueError(
            f"max_tokens = {encoder.spec.max_tokens} leaves {room} tokens for a user's titles: give {LEAST - room} more"
        )
    cap = min(policy.caps.get("title", policy.cap), room // 2)  # two of them fit into a prompt
    # a separator between two titles must not be part of one
    texts = [" ".join(title[: cap * LONGEST_TOKEN].replace(";", ".").split()) for title in titles]
    titled = [f"{text};" for text in texts if text]
    encoded = encode_phrases(titled, [cap] * len(titled), encoder.tokenizer)
    length_I = np.zeros(len(texts), dtype=np.int64)
    length_I[[bool(text) for text in texts]] = [len(ids) for ids in encoded]
    token_T = np.asarray([token for ids in encoded for token in ids], dtype=np.int32)
    titled_N = length_I[item_N] > 0
    item_N, user_N = item_N[titled_N], user_N[titled_N]
    _, of_N, count_U = np.unique(user_N, return_inverse=True, return_counts=True)
    kept_N = count_U[of_N.ravel()] > 1
    if not kept_N.any():
        raise ValueError("no user had two items with titles in the train rows: set user_weight and title_weight to 0")
    start_U1 = np.concatenate([[0], count_U[count_U > 1].cumsum()])
    return Users(item_N=item_N[kept_N], start_U1=start_U1, titles=Prompts(token_T, length_I))


class UserSettings(Protocol):
    """What users' prompts need of a training's settings (models.text.scft.Scft has them)."""

    @property
    def user_share(self) -> float:
        """Users of a step, as a share of its items."""

    @property
    def user_titles(self) -> int:
        """Titles that are read, at most."""

    @property
    def title_weight(self) -> float:
        """Whether the next title is to be told."""


@dataclass(frozen=True)
class DrawnUsers:
    """Some users' prompts."""

    rows: Prompts
    """Titles, then the next one's where it is to be told."""
    context_B: Ints
    """Tokens of each prompt that are read; the others are to be told."""
    share_BK: NDArray[np.float32]
    """How each user's items are spread over the clusters; K is 0 where nobody asks."""

    def some(self, rows: Ints) -> DrawnUsers:
        """Those of some rows."""
        return DrawnUsers(take(self.rows, rows), self.context_B[rows], self.share_BK[rows])


@dataclass(frozen=True, kw_only=True)
class UserPrompts:
    """Draws the users of any step."""

    users: Users
    size: int
    """Users of a step."""
    newest: int
    """Titles that are read, at most."""
    limit: int
    """Tokens of a prompt, at most."""
    seed: int
    following: bool
    """Whether a title is to be told: then a prompt ends before a random event of the user instead of after the last."""
    cluster_I: Ints | None = None

    def draw(self, step: int) -> DrawnUsers:
        """A step's number -> its users. They come in endless shuffled passes."""
        drawn_B = in_passes(np.arange(len(self.users.start_U1) - 1), step, self.size, [self.seed, 9])
        random_B = np.random.default_rng([self.seed, 10, step]).random(self.size)
        read, told = [], []
        for user, draw in zip(drawn_B.tolist(), random_B.tolist(), strict=True):
            own = self.users.item_N[self.users.start_U1[user] : self.users.start_U1[user + 1]]
            end = 1 + int(draw * (len(own) - 1)) if self.following else len(own)
            told.append(own[end : end + 1])
            read.append(self.fitting(own[max(0, end - self.newest) : end], told[-1]))
        rows = take(self.users.titles, np.concatenate([part for both in zip(read, told, strict=True) for part in both]))
        ends = np.cumsum([0, *(len(part) for both in zip(read, told, strict=True) for part in both)])
        total = np.concatenate([[0], rows.length_B.cumsum()])[ends]
        context_B, told_B = np.diff(total)[0::2], np.diff(total)[1::2]
        shares = [self.users.histogram(user, self.cluster_I) for user in drawn_B.tolist()] if self.cluster_I is not None else []
        share_BK = np.stack(shares) if shares else np.zeros((self.size, 0), dtype=np.float32)
        return DrawnUsers(Prompts(rows.token_T, context_B + told_B), context_B, share_BK)

    def fitting(self, items: Ints, told: Ints) -> Ints:
        """The newest of the items whose titles fit into the limit with what is to be told; at least one."""
        length = self.users.titles.length_B
        room = self.limit - int(length[told].sum())
        return items[len(items) - max(1, int((length[items][::-1].cumsum() <= room).sum())) :]


def user_prompts(
    users: Users, config: UserSettings, batch: int, limit: int, seed: int, world: int, cluster_I: Ints | None
) -> UserPrompts:
    """What draws the users beside a step's items, as many for each of `world` processes."""
    return UserPrompts(
        users=users,
        size=max(1, round(config.user_share * batch / world)) * world,
        newest=config.user_titles,
        limit=limit,
        seed=seed,
        following=config.title_weight > 0,
        cluster_I=cluster_I,
    )


def in_passes(population: Ints, step: int, size: int, key: list[int]) -> Ints:
    """A step's members of a population, which come in endless passes, each shuffled by the key and its number."""
    places = np.arange(step * size, (step + 1) * size)
    passes = places // len(population)
    order = {number: np.random.default_rng([*key, number]).permutation(population) for number in np.unique(passes)}
    return np.asarray([order[number][place % len(population)] for number, place in zip(passes, places, strict=True)])
