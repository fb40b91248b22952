"""Histories as flat arrays on a device: training rows, evaluation cases and item groups, without Python per sample.

Shapes: U users, N events, V items + 1 (row 0 is padding), R training rows, C evaluation cases, B rows of a batch, L positions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

GROUPS = ("cold", "tail", "head")
COLD, TAIL, HEAD = range(3)
HEAD_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Histories:
    """All users' events, oldest first; user u owns events [offsets_U1[u], offsets_U1[u + 1]).

    Positions and ends count inside a user's own history: [0, train_end) train, [train_end, valid_end) validate, the rest test.
    """

    offsets_U1: Tensor
    items_N: Tensor
    """Item index 1..catalogue; 0 is padding and never stands here."""
    timestamps_N: Tensor
    train_end_U: Tensor
    valid_end_U: Tensor
    catalogue: int
    """Number of items V - 1, with or without events."""

    @property
    def length_U(self) -> Tensor:
        """Events of each user."""
        return self.offsets_U1.diff()

    @property
    def user_N(self) -> Tensor:
        """The user of each event."""
        return torch.arange(len(self.train_end_U), device=self.items_N.device).repeat_interleave(self.length_U)

    @property
    def position_N(self) -> Tensor:
        """Each event's position in its user's history."""
        return torch.arange(len(self.items_N), device=self.items_N.device) - self.offsets_U1[self.user_N]

    @property
    def in_train_N(self) -> Tensor:
        """Whether each event is a train row."""
        return self.position_N < self.train_end_U[self.user_N]

    def to(self, device: torch.device | str) -> Histories:
        """The same histories on another device."""
        names = ("offsets_U1", "items_N", "timestamps_N", "train_end_U", "valid_end_U")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return dataclasses.replace(self, **moved)


def histories(
    *,
    offsets: Sequence[int] | Tensor,
    items: Sequence[int] | Tensor,
    timestamps: Sequence[int] | Tensor,
    train_end: Sequence[int] | Tensor,
    valid_end: Sequence[int] | Tensor,
    catalogue: int,
) -> Histories:
    """Checked histories from flat arrays (lists, NumPy or tensors).

    Raises ValueError for an id out of 1..catalogue, lengths that disagree, or a split outside a history.
    """
    flat = [torch.as_tensor(value, dtype=torch.int64) for value in (offsets, items, timestamps, train_end, valid_end)]
    made = Histories(
        offsets_U1=flat[0], items_N=flat[1], timestamps_N=flat[2], train_end_U=flat[3], valid_end_U=flat[4], catalogue=catalogue
    )
    length_U = made.length_U
    if len(made.offsets_U1) != len(made.train_end_U) + 1 or len(made.train_end_U) != len(made.valid_end_U):
        raise ValueError(f"{len(made.train_end_U)} users need as many splits and one offset more: got {len(made.offsets_U1)}")
    if len(made.items_N) != len(made.timestamps_N) or int(length_U.sum()) != len(made.items_N) or bool((length_U < 0).any()):
        raise ValueError(f"offsets, {len(made.items_N)} items and {len(made.timestamps_N)} timestamps do not fit together")
    if len(made.items_N) and (int(made.items_N.min()) < 1 or int(made.items_N.max()) > catalogue):
        raise ValueError(
            f"item index {int(made.items_N.min())}..{int(made.items_N.max())} is out of 1..{catalogue}: "
            "every item of the logs must be in the catalogue"
        )
    ends_ordered = (made.train_end_U >= 0) & (made.train_end_U <= made.valid_end_U) & (made.valid_end_U <= length_U)
    if not bool(ends_ordered.all()):
        raise ValueError("a split lies outside its history: 0 <= train_end <= valid_end <= length must hold")
    return made


def leave_one_out(all_events: Histories) -> Histories:
    """The papers' split: last event tests, the one before validates; users with under 3 events only train."""
    length_U = all_events.length_U
    enough_U = length_U >= 3
    return dataclasses.replace(
        all_events,
        train_end_U=torch.where(enough_U, length_U - 2, length_U),
        valid_end_U=torch.where(enough_U, length_U - 1, length_U),
    )


def window(events: Histories, users_B: Tensor, ends_B: Tensor, width: int) -> Tensor:
    """items_BL: each user's last `width` events before position `ends_B`, newest last, LEFT-padded with 0."""
    position_BL = ends_B[:, None] + torch.arange(-width, 0, device=ends_B.device)
    index_BL = events.offsets_U1[users_B][:, None] + position_BL.clamp_min(0)
    return events.items_N[index_BL.clamp_max(len(events.items_N) - 1)] * (position_BL >= 0)


def inputs_before(events: Histories, users_B: Tensor, position_B: Tensor, max_len: int) -> Tensor:
    """input_BL: what each user did before the event at `position_B`, LEFT-padded with 0, newest last."""
    return window(events, users_B, position_B, max_len)


def targets(events: Histories, users_B: Tensor, position_B: Tensor) -> Tensor:
    """target_B: the item at each user's `position_B`."""
    return events.items_N[events.offsets_U1[users_B] + position_B]


def cases(events: Histories, part: Literal["valid", "test"], *, every: bool = False) -> tuple[Tensor, Tensor]:
    """users_C and position_C of the last event of a part, or of `every` one; its input is all before it.

    Users without an event in the part, or with nothing before it, give no case.
    """
    start_U, end_U = {
        "valid": (events.train_end_U, events.valid_end_U),
        "test": (events.valid_end_U, events.length_U),
    }[part]
    if every:
        position_N, user_N = events.position_N, events.user_N
        inside_N = (position_N >= start_U[user_N].clamp_min(1)) & (position_N < end_U[user_N])
        return user_N[inside_N], position_N[inside_N]
    users_C = ((end_U > start_U) & (end_U >= 2)).nonzero().flatten()
    return users_C, end_U[users_C] - 1


def training_rows(events: Histories, max_len: int, windows: Literal["last", "all"] = "last") -> tuple[Tensor, Tensor]:
    """users_R and ends_R: each row trains on the up to max_len + 1 events before its end.

    `last`: one row a user. `all`: as many rows as it takes for every train event to be a label once.
    Users with fewer than two train events have nothing to predict and give no row.
    """
    users_R = (events.train_end_U >= 2).nonzero().flatten()
    ends_R = events.train_end_U[users_R]
    if windows == "last":
        return users_R, ends_R
    count_R = (ends_R - 1 + max_len - 1) // max_len
    first_R = count_R.cumsum(0) - count_R
    step = torch.arange(int(count_R.sum()), device=ends_R.device) - first_R.repeat_interleave(count_R)
    return users_R.repeat_interleave(count_R), ends_R.repeat_interleave(count_R) - step * max_len


def train_counts(events: Histories) -> Tensor:
    """counts_V: interactions of each item in train rows; test and validation rows never count."""
    return torch.bincount(events.items_N[events.in_train_N], minlength=events.catalogue + 1)


def followers(events: Histories) -> Tensor:
    """index_P: the train events that follow another item in their user's history; that other is the event before."""
    # the last event of a user is followed by another's first
    follows_P = events.in_train_N[1:] & (events.position_N[1:] > 0) & (events.items_N[1:] != events.items_N[:-1])
    return follows_P.nonzero().flatten() + 1


def neighbours(events: Histories) -> Tensor:
    """pair_P2: the items of every two events that follow one another in a user's train rows, unless they are the same."""
    index_P = followers(events)
    return torch.stack([events.items_N[index_P - 1], events.items_N[index_P]], dim=1)


def item_groups(counts_V: Tensor, head_share: float = HEAD_SHARE) -> Tensor:
    """group_V by train interactions alone: COLD has none; HEAD is the most popular fifth of the others; TAIL the rest.

    The field's 80/20 rule over items; ties at the border go to the lower index. The padding row gets -1.
    """
    group_V = torch.where(counts_V > 0, TAIL, COLD)
    warm = int((counts_V[1:] > 0).sum())
    ranked_V = counts_V[1:].argsort(descending=True, stable=True) + 1
    group_V[ranked_V[: round(warm * head_share)]] = HEAD
    group_V[0] = -1
    return group_V


def held_out(item_ids: Sequence[str], share: float, seed: int) -> Tensor:
    """held_V: a share of the items, drawn by a hash of id and seed, so that every job draws the same. Padding is never held."""
    bound = int(share * 2**64)
    drawn = [int.from_bytes(hashlib.sha256(f"{seed}\n{item_id}".encode()).digest()[:8]) < bound for item_id in item_ids]
    return torch.tensor([False, *drawn])


def without_items(events: Histories, held_V: Tensor) -> Histories:
    """The histories as if nobody had touched the held items before the end of train; later events stay."""
    dropped_N = held_V.to(events.items_N.device)[events.items_N] & events.in_train_N
    dropped_U = torch.bincount(events.user_N[dropped_N], minlength=len(events.train_end_U))
    offsets_U1 = torch.cat([events.offsets_U1[:1], (events.length_U - dropped_U).cumsum(0)])
    return Histories(
        offsets_U1=offsets_U1,
        items_N=events.items_N[~dropped_N],
        timestamps_N=events.timestamps_N[~dropped_N],
        train_end_U=events.train_end_U - dropped_U,
        valid_end_U=events.valid_end_U - dropped_U,
        catalogue=events.catalogue,
    )
