"""LoRA beside frozen linear maps, written so that compiled training spends little on it.

Rank R is so small that a product with it is cheaper as R multiply-adds inside the neighbouring kernel than as a matrix product of
its own, and dropout's mask so cheap to make from a seed that nobody needs to keep it.

Shapes: T tokens, I inputs, O outputs, R rank, L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

UNROLLED = 16
"""Ranks up to this are multiplied out in compiled code."""
COMPILER: dict[str, Any] = {"unroll_reductions_threshold": UNROLLED + 1}
"""What the compiler must be told for it."""
LAYER = 374761393
"""An odd number that spreads the layers' seeds over 32 bits."""


def narrow(left_TR: Tensor, right_RO: Tensor) -> Tensor:
    """left_TR @ right_RO; in compiled code as R multiply-adds that fuse with what reads the result."""
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
        return narrow(grads[0], down_RI), grads[0].T @ states_TI


class Up(torch.autograd.Function):
    """low_TR, up_RO -> low_TR up_RO."""

    @staticmethod
    def forward(ctx: Any, low_TR: Tensor, up_RO: Tensor) -> Tensor:
        """out_TO."""
        ctx.save_for_backward(low_TR, up_RO)
        return narrow(low_TR, up_RO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of both."""
        low_TR, up_RO = ctx.saved_tensors
        return grads[0] @ up_RO.T, low_TR.T @ grads[0]


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA over a linear map, with one adapter: the same numbers, made by `Down` and `Up`."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(…, I) -> (…, O)."""
        if self.disable_adapters or self.merged:
            plain: Tensor = super().forward(x, *args, **options)
            return plain
        (name,) = self.active_adapters
        result = self.base_layer(x)
        down_RI = self.lora_A[name].weight.to(result.dtype)
        # outputs side by side in memory, as `narrow` reads them
        up_RO = self.lora_B[name].weight.T.to(result.dtype, memory_format=torch.contiguous_format)
        states_TI = self.lora_dropout[name](x.to(result.dtype)).flatten(0, -2)
        low_TR = Down.apply(states_TI, down_RI) * self.scaling[name]  # type: ignore[no-untyped-call]
        added: Tensor = result + Up.apply(low_TR, up_RO).view_as(result)  # type: ignore[no-untyped-call]
        return added


# --------------------------------------------------------------------------------------------------------------- dropout


class SeededDropout(nn.Module):
    """Dropout whose mask is a hash of a seed, the row and the column.

    Maps that read the same states drop the same of them, so compiled code makes the mask once for all, and once more for the
    gradient instead of keeping it.
    """

    seed: Tensor

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.bound = p, int(p * 2**32) - 2**31
        self.register_buffer("seed", seed, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """The states in evaluation; in training a share p of them is 0 and the others are 1 / (1 - p) times as large."""
        if not self.training:
            return states
        states_TI = states.flatten(0, -2)
        row_T, column_I = (torch.arange(n, dtype=torch.int32, device=states.device) for n in states_TI.shape)
        noise_TI = mixed(mixed(row_T + self.seed)[:, None] ^ mixed(column_I))
        return torch.where(noise_TI >= self.bound, states_TI * (1 / (1 - self.p)), 0.0).view_as(states)


def mixed(number: Tensor) -> Tensor:
    """int32 numbers whose high bits depend on every bit of those given."""
    number = number * -1640531535
    return (number ^ (number >> 15)) * 668265263


class Seeds:
    """The seeds of all dropout of a model's LoRA weights, a different one in each layer."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.offset_L = torch.arange(len(layers), dtype=torch.int32, device=device) * LAYER
        self.seed_L = self.offset_L.clone()
        for layer, seed in zip(layers, self.seed_L, strict=True):
            for module in layer.modules():
                if isinstance(module, LoraLinear):
                    for name, dropout in module.lora_dropout.items():
                        if isinstance(dropout, nn.Dropout):
                            module.lora_dropout[name] = SeededDropout(dropout.p, seed)

    def set(self, seed: int) -> None:
        """Takes 32 bits as the seed of what comes."""
        torch.add(self.offset_L, seed - 2**31, out=self.seed_L)
