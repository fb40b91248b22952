"""Products with LoRA's narrow matrices, fast in compiled training.

The rank R is small. A product with it costs less as R multiply-adds inside the next kernel than as a matrix product.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

UNROLLED = 16
"""Ranks up to this are multiplied out in compiled code."""
COMPILER: dict[str, Any] = {"unroll_reductions_threshold": UNROLLED + 1}
"""The compiler's options that this needs."""


def narrow_product(left_TR: Tensor, right_RO: Tensor) -> Tensor:
    """left_TR, right_RO -> left_TR @ right_RO; in compiled code as R multiply-adds that fuse with the next operation."""
    if not torch.compiler.is_compiling() or len(right_RO) > UNROLLED:
        return left_TR @ right_RO
    return (left_TR[:, :, None].float() * right_RO.float()).sum(1).to(left_TR.dtype)


class Down(torch.autograd.Function):
    """states_TI, down_RI -> states_TI down_RI^T."""

    @staticmethod
    def forward(ctx: Any, states_TI: Tensor, down_RI: Tensor) -> Tensor:
        """low_TR."""
        ctx.save_for_backward(states_TI, down_RI)
        return states_TI @ down_RI.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        states_TI, down_RI = ctx.saved_tensors
        return narrow_product(grads[0], down_RI), grads[0].T @ states_TI


class Up(torch.autograd.Function):
    """low_TR, up_RO -> low_TR up_RO."""

    @staticmethod
    def forward(ctx: Any, low_TR: Tensor, up_RO: Tensor) -> Tensor:
        """out_TO."""
        ctx.save_for_backward(low_TR, up_RO)
        return narrow_product(low_TR, up_RO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        low_TR, up_RO = ctx.saved_tensors
        return grads[0] @ up_RO.T, low_TR.T @ grads[0]
