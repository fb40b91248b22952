"""Attention over a packed step, in transformers' interface: a padded kernel for any device, FlashAttention where it works.

Shapes: T tokens of a step, S sequences, K keys that all sequences read together, C sequences that read the shared prefix, P its
tokens, Q longest sequence, L longest sequence with its prefix, H heads, G key/value heads, D head width.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.text.packing import Packing, pack
from models.text.prompts import Prompts

varlen: Any = None
if torch.version.cuda:  # it runs on such devices alone, and takes seconds to import
    with suppress(ImportError):  # torch before 2.10
        from torch.nn.attention import varlen

ATTENTION = "packed"
"""Name of `packed_attention` among transformers' attention implementations, once `register_attention` was called."""
OPTIONS = frozenset(inspect.signature(varlen.varlen_attn).parameters if varlen else ())
"""Options that this version of torch's variable-length attention takes."""


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
    """query (1, H, T, D), key and value (1, G, T, D) -> (1, T, H, D), as transformers asks of an attention function.

    Raises ValueError for models that packed attention cannot compute: caps on scores, attention sinks, or a sliding window
    shorter than the longest prompt.
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


def register_attention() -> None:
    """Makes `packed_attention` known to transformers, before a model is made that uses it."""
    from transformers import AttentionInterface  # takes seconds: only where there is a model

    AttentionInterface.register(ATTENTION, packed_attention)


def padded_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, scale: float) -> Tensor:
    """query_THD, key_TGD, value_TGD -> out_THD. Pads for attention only: the linear layers see no padding."""
    assert packing.pad_SL is not None and packing.mask_SQL is not None and packing.unpad_T is not None
    query_SHQD = query_THD[packing.pad_SQ].transpose(1, 2)
    key_SGLD, value_SGLD = (states[packing.pad_SL].transpose(1, 2) for states in (key_TGD, value_TGD))
    grouped = query_SHQD.shape[1] != key_SGLD.shape[1]
    out_SHQD = F.scaled_dot_product_attention(
        query_SHQD, key_SGLD, value_SGLD, attn_mask=packing.mask_SQL[:, None], scale=scale, enable_gqa=grouped
    )
    return out_SHQD.transpose(1, 2).flatten(0, 1)[packing.unpad_T]


class ReadKeys(torch.autograd.Function):
    """states_TGD -> those of the keys read, states_KGD.

    The gradient goes by places: every token has one key of its own, and only the prefix's tokens have copies. Adding up by
    index would sort all keys, in another order each time. Keys that nobody reads get no gradient from the kernel, not even a
    zero; no place names them.
    """

    @staticmethod
    def forward(ctx: Any, states_TGD: Tensor, key_K: Tensor, own_T: Tensor, copy_CP: Tensor) -> Tensor:
        """states_KGD."""
        ctx.save_for_backward(own_T, copy_CP)
        return states_TGD[key_K]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of states_TGD."""
        own_T, copy_CP = ctx.saved_tensors
        prefix_PGD = grads[0][copy_CP].sum(0)
        return grads[0][own_T] + F.pad(prefix_PGD, (0, 0, 0, 0, 0, len(own_T) - len(prefix_PGD))), None, None, None


def variable_attention(query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, packing: Packing, scale: float) -> Tensor:
    """query_THD, key_TGD, value_TGD -> out_THD by FlashAttention over sequences of any length.

    A sequence has more keys than queries, as it reads the shared prefix too; causal masks count from the sequence's end.
    """
    if packing.key_K is not None:
        which = packing.key_K, packing.own_T, packing.copy_CP
        key_TGD, value_TGD = (ReadKeys.apply(states, *which) for states in (key_TGD, value_TGD))  # type: ignore[no-untyped-call]
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
    out_THD: Tensor = varlen.varlen_attn(
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
    """Whether variable-length attention gives the same as padded attention on this device. Tried once, on a small step."""
    if varlen is None or device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    generator = torch.Generator().manual_seed(0)
    small = Prompts(np.arange(12, dtype=np.int32), np.asarray([5, 1, 6]))
    query, key, value = (
        torch.randn(15, count, width, generator=generator).to(device, dtype) for count in (heads, groups, groups)
    )
    try:
        for causal, head in ((True, (7, 8, 9)), (False, (7,))):
            steps = [pack(small, head, causal=causal, device=device, variable=kind) for kind in (True, False)]
            variable, padded = (
                attend(query, key, value, step.packing, 0.3)
                for step, attend in zip(steps, (variable_attention, padded_attention), strict=True)
            )
            if not torch.allclose(variable.float(), padded.float(), atol=0.05):
                return False
    except (RuntimeError, TypeError):
        return False
    return True
