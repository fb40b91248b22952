"""Runs many prompts on end through any transformers model: no padding, and the shared prefix computed once a step.

A step's tokens are `[prefix, item, item, …]`. Attention is causal, so the prefix's states are the same before every item; each
item's queries attend to the prefix's keys and its own. Where attention is bidirectional each item carries its own prefix.

Shapes: T tokens of a step, S sequences (the shared prefix is one), K keys read by all sequences together, Q longest sequence,
L longest sequence with its prefix, H heads, G key/value heads, D head width, B items, N pooled tokens, E model width.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from models.text.prompts import Ints, Prompts, spans

try:
    from torch.nn.attention import varlen
except ImportError:  # torch before 2.10
    varlen = None  # type: ignore[assignment]

Pooling = Literal["mean", "last", "mean_all"]
ATTENTION = "packed"
"""Name of `packed_attention` among transformers' attention implementations."""


class Packing(NamedTuple):
    """Which keys each sequence's queries see; made once a step, used by every layer."""

    causal: bool
    longest_q: int
    longest_k: int
    q_S1: Tensor
    """Where each sequence's queries start (int32)."""
    k_S1: Tensor
    """Where each sequence's keys start among the keys read (int32)."""
    key_K: Tensor | None
    """The token of each key read; None where the keys are the tokens."""
    pad_SQ: Tensor | None
    """The token of each padded query, and below of each padded key: for devices without variable-length attention."""
    pad_SL: Tensor | None
    mask_SQL: Tensor | None
    unpad_T: Tensor | None
    """Where each token stands among the padded queries."""


class Step(NamedTuple):
    """One step's tokens on a device, and where its items lie."""

    token_T: Tensor
    position_T: Tensor
    packing: Packing
    prefix: int
    """Tokens of the shared prefix at the start of the step; 0 where every item carries its own."""
    own_N: Tensor
    """The items' own tokens: those of their attributes."""
    length_B: Tensor
    """How many own tokens each item has."""
    whole_B: Tensor
    """How many tokens each item has with the prefix it carries and its tail; they stand on end from `prefix` to `end`."""
    end: int


# --------------------------------------------------------------------------------------------------------------- a step


def pack(
    source: Prompts,
    head: tuple[int, ...],
    tail: tuple[int, ...] = (),
    *,
    causal: bool,
    device: torch.device,
    variable: bool,
    first_position: int = 0,
    fill: int = 0,
) -> Step:
    """A step of prompts; `head` (special tokens and domain sentence) stands before each and `tail` behind each.

    `variable` says that the device has variable-length attention. `fill`, where not 0, rounds shapes up to a ladder with so
    many rungs an octave, with unused sequences of filler tokens, so that compiled code meets few shapes. Raises ValueError for
    a prompt without tokens.
    """
    if not len(source.length_B) or int(source.length_B.min()) < 1:
        raise ValueError("a prompt has no tokens: give every item at least one attribute, or leave it out")
    shared = causal and len(head) > 0
    own_B = source.length_B
    before = 0 if shared else len(head)
    length_B = own_B + before + len(tail)
    length_S = np.concatenate([[len(head)], length_B]) if shared else length_B
    start_S = length_S.cumsum() - length_S
    start_B = start_S[1:] if shared else start_S
    own_N = spans(start_B + before, own_B)
    token_T = lay(source, head, tail, start_B, own_B, own_N, int(length_S.sum()), shared)
    position_T = np.arange(len(token_T)) - np.repeat(start_S, length_S) + first_position
    reach_S = np.full(len(length_S), len(head)) if shared else np.zeros(len(length_S), dtype=np.int64)
    if shared:
        position_T[len(head) :] += len(head)
        reach_S[0] = 0
    end = len(token_T)
    if fill and variable:
        token_T, position_T, length_S, reach_S = filled(token_T, position_T, length_S, reach_S, fill)

    return Step(
        token_T=there(token_T, device),
        position_T=there(position_T, device),
        packing=attention_plan(length_S, reach_S, causal, variable, fill, device),
        prefix=len(head) if shared else 0,
        own_N=there(own_N, device),
        length_B=there(own_B, device),
        whole_B=there(length_B, device),
        end=end,
    )


def there(value: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device; the host does not wait for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(value))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def lay(
    source: Prompts,
    head: tuple[int, ...],
    tail: tuple[int, ...],
    start_B: Ints,
    own_B: Ints,
    own_N: Ints,
    total: int,
    shared: bool,
) -> Ints:
    """The step's tokens: head, attributes and tail in their places."""
    token_T = np.zeros(total, dtype=np.int64)
    if shared:
        token_T[: len(head)] = head
    else:
        token_T[start_B[:, None] + np.arange(len(head))] = head
    token_T[own_N] = source.token_T
    ends_B = start_B + own_B + (0 if shared else len(head))
    token_T[ends_B[:, None] + np.arange(len(tail))] = tail
    return token_T


def filled(token_T: Ints, position_T: Ints, length_S: Ints, reach_S: Ints, rungs: int) -> tuple[Ints, Ints, Ints, Ints]:
    """The same step with filler behind it, so that tokens and sequences are round numbers."""
    extra = ladder(len(token_T), 256, rungs) - len(token_T)
    sequences = ladder(len(length_S) + 1, 16)
    length = np.zeros(sequences, dtype=np.int64)
    length[: len(length_S)] = length_S
    # filler as many short sequences: one long one would cost attention time
    free = np.arange(len(length_S), sequences)
    length[free] = extra // len(free)
    length[free[: extra % len(free)]] += 1
    reach = np.zeros(sequences, dtype=np.int64)
    reach[: len(reach_S)] = reach_S
    zeros = np.zeros(extra, dtype=np.int64)
    return np.concatenate([token_T, zeros]), np.concatenate([position_T, zeros]), length, reach


def ladder(count: int, smallest: int, rungs: int = 4) -> int:
    """The next of as many round numbers an octave, at least `smallest`: about a share 1 / rungs more than needed, at most."""
    unit: int = max(smallest // 4, 2 ** max(0, (max(count, 1) - 1).bit_length() - rungs.bit_length()))
    return -(-max(count, smallest) // unit) * unit


def attention_plan(length_S: Ints, reach_S: Ints, causal: bool, variable: bool, fill: int, device: torch.device) -> Packing:
    """Who attends to whom; `reach_S` counts the shared prefix's keys that a sequence reads before its own."""
    key_S = length_S + reach_S
    q_S1, k_S1 = np.concatenate([[0], length_S.cumsum()]), np.concatenate([[0], key_S.cumsum()])
    longest_q, longest_k = int(length_S.max()), int(key_S.max())
    key_K = pad_SQ = pad_SL = mask_SQL = unpad_T = None
    if variable:
        if reach_S.any():
            # a run of the prefix and a run of its own for each sequence, in turn
            starts, lengths = np.zeros(2 * len(length_S), dtype=np.int64), np.zeros(2 * len(length_S), dtype=np.int64)
            starts[1::2], lengths[0::2], lengths[1::2] = q_S1[:-1], reach_S, length_S
            key_K = spans(starts, lengths)
            if fill:
                key_K = np.concatenate([key_K, np.zeros(ladder(len(key_K), 256) - len(key_K), dtype=np.int64)])
        if fill:
            longest_q, longest_k = ladder(longest_q, 64), ladder(longest_k, 64)
    else:
        row, column = np.arange(longest_q), np.arange(longest_k)
        pad_SQ = q_S1[:-1, None] + np.minimum(row, np.maximum(length_S[:, None] - 1, 0))
        own = column - reach_S[:, None]
        pad_SL = np.where(own < 0, column, q_S1[:-1, None] + np.clip(own, 0, np.maximum(length_S[:, None] - 1, 0)))
        mask_SQL = np.broadcast_to((column < key_S[:, None])[:, None], (len(length_S), longest_q, longest_k))
        if causal:
            mask_SQL = mask_SQL & (column <= row[:, None] + reach_S[:, None, None])
        unpad_T = spans(np.arange(len(length_S)) * longest_q, length_S)
    return Packing(
        causal=causal,
        longest_q=longest_q,
        longest_k=longest_k,
        q_S1=there(q_S1.astype(np.int32), device),
        k_S1=there(k_S1.astype(np.int32), device),
        key_K=None if key_K is None else there(key_K, device),
        pad_SQ=None if pad_SQ is None else there(pad_SQ, device),
        pad_SL=None if pad_SL is None else there(pad_SL, device),
        mask_SQL=None if mask_SQL is None else there(mask_SQL, device),
        unpad_T=None if unpad_T is None else there(unpad_T, device),
    )


def batches(length_B: Ints, budget: int, extra: int) -> list[Ints]:
    """Rows of each step, longest first, at most `budget` tokens a step (`extra` more stand with each item); one item at least."""
    order = np.argsort(-length_B, kind="stable")
    filled_B = (length_B[order] + extra).cumsum()
    steps, start = [], 0
    while start < len(order):
        spent = filled_B[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(filled_B, spent + budget, side="right")))
        steps.append(order[start:end])
        start = end
    return steps


# ------------------------------------------------------------------------------------------------------------- attention


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over a packed step: query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D).

    Raises ValueError for what packed attention has no kernel for: score caps, sinks, prompts longer than a sliding window.
    """
    if softcap is not None or s_aux is not None or (sliding_window or packing.longest_k) < packing.longest_k:
        raise ValueError(
            f"this base model caps scores, has attention sinks, or a window below {packing.longest_k} tokens: "
            "take another, or lower max_tokens"
        )
    query_THD, key_TGD, value_TGD = (states[0].transpose(0, 1) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing.pad_SQ is None:
        out_THD = variable_attention(query_THD, key_TGD, value_TGD, packing, scale)
    else:
        out_THD = padded_attention(query_THD, key_TGD, value_TGD, packing, scale)
    return out_THD[None], None


AttentionInterface.register(ATTENTION, packed_attention)


def padded_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, scale: float) -> Tensor:
    """Pads for attention alone: linear layers, where the time goes, still see no padding."""
    assert packing.pad_SL is not None and packing.mask_SQL is not None and packing.unpad_T is not None
    query_SHQD = query_THD[packing.pad_SQ].transpose(1, 2)
    key_SGLD, value_SGLD = (states[packing.pad_SL].transpose(1, 2) for states in (key_TGD, value_TGD))
    grouped = query_SHQD.shape[1] != key_SGLD.shape[1]
    out_SHQD = F.scaled_dot_product_attention(
        query_SHQD, key_SGLD, value_SGLD, attn_mask=packing.mask_SQL[:, None], scale=scale, enable_gqa=grouped
    )
    return out_SHQD.transpose(1, 2).flatten(0, 1)[packing.unpad_T]


OPTIONS = frozenset(inspect.signature(varlen.varlen_attn).parameters if varlen else ())


def variable_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, scale: float) -> Tensor:
    """FlashAttention over sequences of any length, keys longer than queries by the shared prefix (causal from the end)."""
    if packing.key_K is not None:
        # the kernel leaves the gradient of filler keys, which no sequence reads, unset: it must not reach a token
        read_K11 = torch.arange(len(packing.key_K), device=key_TGD.device)[:, None, None] < packing.k_S1[-1]
        key_TGD, value_TGD = (torch.where(read_K11, states[packing.key_K], 0) for states in (key_TGD, value_TGD))
    options: dict[str, Any] = {"scale": scale} if "scale" in OPTIONS else {}
    if "scale" not in OPTIONS:
        query_THD = query_THD * (scale * query_THD.shape[-1] ** 0.5)
    if "window_size" in OPTIONS:
        options["window_size"] = (-1, 0) if packing.causal else (-1, -1)
    else:
        options["is_causal"] = packing.causal
    groups = query_THD.shape[1] // key_TGD.shape[1]
    if groups > 1 and "enable_gqa" in OPTIONS:
        options["enable_gqa"] = True
    elif groups > 1:
        key_TGD, value_TGD = key_TGD.repeat_interleave(groups, 1), value_TGD.repeat_interleave(groups, 1)
    out_THD: Tensor = varlen.varlen_attn(  # type: ignore[assignment]
        query_THD.contiguous(),
        key_TGD.contiguous(),
        value_TGD.contiguous(),
        packing.q_S1,
        packing.k_S1,
        packing.longest_q,
        packing.longest_k,
        **options,
    )
    return out_THD


@cache
def has_variable_attention(device: torch.device, dtype: torch.dtype, heads: int, groups: int, width: int) -> bool:
    """Whether variable-length attention on this device gives what padded attention gives; tried once, on a small step."""
    if varlen is None or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator().manual_seed(0)
    small = Prompts(np.arange(12, dtype=np.int32), np.asarray([5, 1, 6]))
    query, key, value = (
        torch.randn(15, count, width, generator=generator).to(device, dtype) for count in (heads, groups, groups)
    )
    try:
        for causal, head in ((True, (7, 8, 9)), (False, (7,))):
            steps = [pack(small, head, causal=causal, device=device, variable=variable) for variable in (True, False)]
            there, padded = (
                attend(query, key, value, step.packing, 0.3)
                for step, attend in zip(steps, (variable_attention, padded_attention), strict=True)
            )
            if not torch.allclose(there.float(), padded.float(), atol=0.05):
                return False
    except (RuntimeError, TypeError):
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- pooling


def pool(hidden_TE: Tensor, step: Step, pooling: Pooling) -> Tensor:
    """emb_BE float32 of a step's items: `mean` over their attributes' tokens, `last` token, or `mean_all` with the prefix."""
    if pooling == "last":
        return hidden_TE[step.prefix + step.whole_B.cumsum(0) - 1].float()
    if pooling == "mean":
        # `unsafe` leaves out checks of the lengths for which the host would wait
        return torch.segment_reduce(hidden_TE[step.own_N].float(), "mean", lengths=step.length_B, unsafe=True)
    items_NE, prefix_PE = hidden_TE[step.prefix : step.end].float(), hidden_TE[: step.prefix].float()
    sum_BE = torch.segment_reduce(items_NE, "sum", lengths=step.whole_B, unsafe=True) + prefix_PE.sum(0)
    return sum_BE / (step.whole_B[:, None] + step.prefix)
