"""Linear layers in 8 bits, for embedding and for the frozen maps of SCFT. Weights and states are e4m3 floats, one scale a row.

Shapes: T tokens, I inputs, O outputs, N items, E width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.text.base_model import layers_of


def quantized(states_TI: Tensor) -> tuple[Tensor, Tensor]:
    """states_TI -> the same as e4m3, and scale_T1: their product is states_TI again, rounded."""
    largest = 448.0  # of e4m3; not a global name, as the compiler would treat that as a number that may change
    most_T1 = states_TI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)
    return (states_TI.float() * (largest / most_T1)).to(torch.float8_e4m3fn), most_T1 / largest


def product(states_TI: Tensor, weight_OI: Tensor, scale_1O: Tensor) -> Tensor:
    """States in bf16 or float32, a weight in 8 bits and its scale -> out_TO bf16."""
    eighth_TI, scale_T1 = quantized(states_TI)
    return torch._scaled_mm(
        eighth_TI, weight_OI.T, scale_a=scale_T1, scale_b=scale_1O, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class Product(torch.autograd.Function):
    """`product` with a frozen weight. The gradient uses the transposed weight, in 8 bits too, with its own scales."""

    @staticmethod
    def forward(ctx: Any, states_TI: Tensor, weight_OI: Tensor, scale_1O: Tensor, weight_IO: Tensor, scale_1I: Tensor) -> Tensor:
        """out_TO."""
        ctx.save_for_backward(weight_IO, scale_1I)
        return product(states_TI, weight_OI, scale_1O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the states."""
        return product(grads[0], *ctx.saved_tensors), None, None, None, None


class Fp8Linear(nn.Module):
    """A frozen linear map in 8 bits with bf16 results; `trained_through` also holds the weight that the gradient needs."""

    weight_OI: Tensor
    scale_1O: Tensor
    weight_IO: Tensor
    scale_1I: Tensor

    def __init__(self, linear: nn.Linear, *, trained_through: bool = False) -> None:
        super().__init__()
        self.trained_through, self.bias = trained_through, linear.bias
        weight_OI, scale_O1 = quantized(linear.weight.detach())
        self.register_buffer("weight_OI", weight_OI)
        self.register_buffer("scale_1O", scale_O1.T.contiguous())
        if trained_through:
            weight_IO, scale_I1 = quantized(linear.weight.detach().T.contiguous())
            self.register_buffer("weight_IO", weight_IO)
            self.register_buffer("scale_1I", scale_I1.T.contiguous())

    def forward(self, states: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        states_TI = states.flatten(0, -2)
        out_TO: Tensor
        if self.trained_through:
            frozen = self.weight_OI, self.scale_1O, self.weight_IO, self.scale_1I
            out_TO = Product.apply(states_TI, *frozen)  # type: ignore[no-untyped-call]
        else:
            out_TO = product(states_TI, self.weight_OI, self.scale_1O)
        out_TO = out_TO if self.bias is None else out_TO + self.bias
        return out_TO.view(*states.shape[:-1], -1)


def check_device(device: torch.device) -> None:
    """Raises ValueError where the device has no fast 8-bit products."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"8-bit matrix products need an NVIDIA GPU of compute capability 8.9 or later, not {device}: set fp8 to false"
        )


def convert(model: nn.Module, *, trained_through: bool = False) -> None:
    """Puts the linear maps of a model's layers into 8 bits, in place. With `trained_through` only the frozen ones: not LoRA's.

    Raises ValueError as `check_device` does.
    """
    check_device(next(model.parameters()).device)
    for layer in layers_of(model):
        for name, module in list(layer.named_modules()):
            frozen = isinstance(module, nn.Linear) and not (trained_through and module.weight.requires_grad)
            if frozen and module.in_features % 16 == 0 and module.out_features % 16 == 0:
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, Fp8Linear(module, trained_through=trained_through))


def agreement(exact_NE: Tensor, other_NE: Tensor, nearest: int = 10) -> tuple[float, float]:
    """Two embeddings of the same items -> their mean cosine, and the mean share of nearest neighbours that both agree on."""
    exact_NE, other_NE = F.normalize(exact_NE.float(), dim=1), F.normalize(other_NE.float(), dim=1)
    nearest = min(nearest, len(exact_NE) - 1)
    cosine = float((exact_NE * other_NE).sum(1).mean())
    if nearest < 1:
        return cosine, 1.0
    found = []
    for emb_NE in (exact_NE, other_NE):
        centred_NE = F.normalize(emb_NE - emb_NE.mean(0), dim=1)
        found.append((centred_NE @ centred_NE.T).fill_diagonal_(-2.0).topk(nearest).indices)
    shared_NKK = found[0][:, :, None] == found[1][:, None, :]
    return cosine, float(shared_NKK.any(2).float().mean())
