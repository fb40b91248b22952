"""Puts many prompts into one step without padding, with the shared prefix only once.

A step's tokens are `[prefix, item, item, …]`. In causal attention the prefix's states are the same before every item, so they
are computed once, and each item's queries attend to the prefix's keys and to their own. With bidirectional attention each
item has its own copy of the prefix, unless the prefix is not to see the items.

Shapes: T tokens of a step, S sequences (the shared prefix is one), K keys that all sequences read together, C sequences that
read the prefix, P its tokens, Q longest sequence, L longest sequence with its prefix, B items, N tokens of the items' attributes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.text.prompts import Ints, Prompts, spans

SMALLEST = 256
"""Tokens, or keys, of the smallest step that is filled up."""


class Packing(NamedTuple):
    """Which keys each sequence's queries see. Made once a step, used by every layer."""

    causal: bool
    longest_q: int
    longest_k: int
    q_S1: Tensor
    """Where each sequence's queries start (int32)."""
    k_S1: Tensor
    """Where each sequence's keys start among the keys read (int32)."""
    key_K: Tensor | None
    """The token of each key read; None where the keys are the tokens. The next two are for its gradient, and None where it is."""
    own_T: Tensor | None
    """Where each token's own key is among the keys read."""
    copy_CP: Tensor | None
    """Where the copies of the shared prefix's keys are among the keys read."""
    pad_SQ: Tensor | None
    """The token of each padded query. This and the next three: only for devices without variable-length attention."""
    pad_SL: Tensor | None
    """The token of each padded key."""
    mask_SQL: Tensor | None
    """Which keys a query sees."""
    unpad_T: Tensor | None
    """Where each token is among the padded queries."""


class Step(NamedTuple):
    """One step's tokens on a device, and where its items are."""

    token_T: Tensor
    position_T: Tensor
    packing: Packing
    prefix: int
    """Tokens of the shared prefix at the start of the step; 0 where every item has its own copy."""
    own_N: Tensor
    """Where the tokens of the items' attributes are."""
    length_B: Tensor
    """How many attribute tokens each item has."""
    whole_B: Tensor
    """How many tokens each item has with its own copy of the prefix and its tail. They fill the step from `prefix` to `end`."""
    end: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each sequence and each item of a step starts, counted in tokens."""

    length_S: Ints
    start_S: Ints
    reach_S: Ints
    """How many keys of the shared prefix a sequence reads before its own."""
    start_B: Ints
    whole_B: Ints
    own_N: Ints
    """As in Step."""
    prefix: int


def pack(
    source: Prompts,
    head: tuple[int, ...],
    tail: tuple[int, ...] = (),
    *,
    causal: bool,
    device: torch.device,
    variable: bool,
    shared: bool | None = None,
    first_position: int = 0,
    fill: int = 0,
) -> Step:
    """Prompts -> a step. `head` (special tokens and domain sentence) comes before each prompt and `tail` after it.

    `variable`: whether the device has variable-length attention. `shared`: whether the head stands there once for all and sees
    no item; None says: in causal attention. `fill`, if not 0, rounds shapes up with filler tokens, so that compiled code sees few
    shapes: `fill` different sizes between each power of two and the next.
    Raises ValueError for a prompt without tokens.
    """
    if not len(source.length_B) or int(source.length_B.min()) < 1:
        raise ValueError("a prompt has no tokens: give every item at least one attribute, or leave it out")
    layout = lay_out(source.length_B, len(head), len(tail), shared=(causal if shared is None else shared) and len(head) > 0)
    length_S, reach_S = layout.length_S, layout.reach_S
    token_T = write_tokens(source, head, tail, layout)
    position_T = np.arange(len(token_T)) - np.repeat(layout.start_S, length_S) + first_position
    position_T[layout.prefix :] += layout.prefix
    end = len(token_T)
    if fill and variable:
        token_T, position_T, length_S, reach_S = add_filler(token_T, position_T, length_S, reach_S, fill)
    return Step(
        token_T=to_device(token_T, device),
        position_T=to_device(position_T, device),
        packing=plan_attention(length_S, reach_S, causal, variable, fill, device),
        prefix=layout.prefix,
        own_N=to_device(layout.own_N, device),
        length_B=to_device(source.length_B, device),
        whole_B=to_device(layout.whole_B, device),
        end=end,
    )


def lay_out(own_B: Ints, head: int, tail: int, *, shared: bool) -> Layout:
    """Tokens of each item, of the head and of the tail -> the step's layout; `shared` puts the head there once, for all."""
    before = 0 if shared else head
    whole_B = own_B + before + tail
    length_S = np.concatenate([[head], whole_B]) if shared else whole_B
    start_S = length_S.cumsum() - length_S
    start_B = start_S[1:] if shared else start_S
    reach_S = np.full(len(length_S), head) if shared else np.zeros(len(length_S), dtype=np.int64)
    if shared:
        reach_S[0] = 0
    return Layout(
        length_S=length_S,
        start_S=start_S,
        reach_S=reach_S,
        start_B=start_B,
        whole_B=whole_B,
        own_N=spans(start_B + before, own_B),
        prefix=head if shared else 0,
    )


def write_tokens(source: Prompts, head: tuple[int, ...], tail: tuple[int, ...], layout: Layout) -> Ints:
    """Prompts, head and tail -> token_T of the step, each in its place."""
    token_T = np.zeros(int(layout.length_S.sum()), dtype=np.int64)
    if layout.prefix:
        token_T[: len(head)] = head
    else:
        token_T[layout.start_B[:, None] + np.arange(len(head))] = head
    token_T[layout.own_N] = source.token_T
    tail_B = layout.start_B + layout.whole_B - len(tail)
    token_T[tail_B[:, None] + np.arange(len(tail))] = tail
    return token_T


def to_device(value: NDArray[Any], device: torch.device) -> Tensor:
    """An array -> a tensor on a device. The host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def add_filler(token_T: Ints, position_T: Ints, length_S: Ints, reach_S: Ints, rungs: int) -> tuple[Ints, Ints, Ints, Ints]:
    """A step's four arrays -> the same with filler at the end, so that the numbers of tokens and sequences are round."""
    extra = round_up(len(token_T), SMALLEST, rungs) - len(token_T)
    sequences = round_up(len(length_S) + 1, 16)
    length = np.zeros(sequences, dtype=np.int64)
    length[: len(length_S)] = length_S
    # many short filler sequences: a long one would cost attention time
    free = np.arange(len(length_S), sequences)
    length[free] = extra // len(free)
    length[free[: extra % len(free)]] += 1
    reach = np.zeros(sequences, dtype=np.int64)
    reach[: len(reach_S)] = reach_S
    zeros = np.zeros(extra, dtype=np.int64)
    return np.concatenate([token_T, zeros]), np.concatenate([position_T, zeros]), length, reach


def round_down(count: int, smallest: int, rungs: int = 4) -> int:
    """A count -> the round number of `round_up` that it reaches; the count itself where it is below them all."""
    unit: int = max(smallest // 4, 2 ** max(0, count.bit_length() - rungs.bit_length()))
    return count // unit * unit if count >= smallest else count


def round_up(count: int, smallest: int, rungs: int = 4) -> int:
    """A count -> the next round number, at least `smallest`.

    There are `rungs` round numbers between each power of two and the next, so at most a share 1 / rungs is added.
    """
    unit: int = max(smallest // 4, 2 ** max(0, (max(count, 1) - 1).bit_length() - rungs.bit_length()))
    return -(-max(count, smallest) // unit) * unit


def plan_attention(length_S: Ints, reach_S: Ints, causal: bool, variable: bool, fill: int, device: torch.device) -> Packing:
    """Lengths of sequences, and how many keys of the shared prefix each one reads -> who attends to whom."""
    key_S = length_S + reach_S
    q_S1, k_S1 = np.concatenate([[0], length_S.cumsum()]), np.concatenate([[0], key_S.cumsum()])
    longest_q, longest_k = int(length_S.max()), int(key_S.max())
    key_K = own_T = copy_CP = pad_SQ = pad_SL = mask_SQL = unpad_T = None
    if variable:
        if reach_S.any():
            key_K, own_T, copy_CP = read_keys(length_S, reach_S, fill)
        if fill:
            longest_q, longest_k = round_up(longest_q, 64), round_up(longest_k, 64)
    else:
        pad_SQ, pad_SL, mask_SQL = pad(length_S, reach_S, causal)
        unpad_T = spans(np.arange(len(length_S)) * longest_q, length_S)

    def sent(value: NDArray[Any] | None) -> Tensor | None:
        return None if value is None else to_device(value, device)

    return Packing(
        causal=causal,
        longest_q=longest_q,
        longest_k=longest_k,
        q_S1=to_device(q_S1.astype(np.int32), device),
        k_S1=to_device(k_S1.astype(np.int32), device),
        key_K=sent(key_K),
        own_T=sent(own_T),
        copy_CP=sent(copy_CP),
        pad_SQ=sent(pad_SQ),
        pad_SL=sent(pad_SL),
        mask_SQL=sent(mask_SQL),
        unpad_T=sent(unpad_T),
    )


def read_keys(length_S: Ints, reach_S: Ints, fill: int) -> tuple[Ints, Ints, Ints]:
    """key_K, own_T and copy_CP. For each sequence in turn, the keys of the prefix that it reads, then its own; filler at the end
    where asked for."""
    starts, lengths = np.zeros(2 * len(length_S), dtype=np.int64), np.zeros(2 * len(length_S), dtype=np.int64)
    starts[1::2], lengths[0::2], lengths[1::2] = length_S.cumsum() - length_S, reach_S, length_S
    key_K = spans(starts, lengths)
    start_S = (length_S + reach_S).cumsum() - length_S - reach_S
    copy_CP = start_S[reach_S > 0, None] + np.arange(reach_S.max())
    if fill:
        key_K = np.concatenate([key_K, np.zeros(round_up(len(key_K), SMALLEST) - len(key_K), dtype=np.int64)])
    return key_K, spans(start_S + reach_S, length_S), copy_CP


def pad(length_S: Ints, reach_S: Ints, causal: bool) -> tuple[Ints, Ints, NDArray[np.bool_]]:
    """pad_SQ, pad_SL and mask_SQL of a step, as Packing says. Padding repeats a sequence's last token."""
    key_S, start_S1 = length_S + reach_S, (length_S.cumsum() - length_S)[:, None]
    row, column = np.arange(int(length_S.max())), np.arange(int(key_S.max()))
    last_S1 = np.maximum(length_S[:, None] - 1, 0)
    pad_SQ = start_S1 + np.minimum(row, last_S1)
    own = column - reach_S[:, None]
    pad_SL = np.where(own < 0, column, start_S1 + np.clip(own, 0, last_S1))
    mask_SQL = np.broadcast_to((column < key_S[:, None])[:, None], (len(length_S), len(row), len(column)))
    if causal:
        mask_SQL = mask_SQL & (column <= row[:, None] + reach_S[:, None, None])
    return pad_SQ, pad_SL, mask_SQL


def batches(length_B: Ints, budget: int, extra: int) -> list[Ints]:
    """Lengths of prompts -> the rows of each step, longest first.

    A step has at most `budget` tokens and at least one prompt. `extra` is what each prompt costs beside its own tokens.
    """
    order = np.argsort(-length_B, kind="stable")
    filled_B = (length_B[order] + extra).cumsum()
    steps, start = [], 0
    while start < len(order):
        spent = filled_B[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(filled_B, spent + budget, side="right")))
        steps.append(order[start:end])
        start = end
    return steps
