"""8-bit linear layers for embedding: weights and states as e4m3 floats, one scale a row, found as they come.

Shapes: T tokens, I inputs, O outputs, N items, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import layers_of

LARGEST = 448.0
"""The largest e4m3 number."""


def quantized(states_TI: Tensor) -> tuple[Tensor, Tensor]:
    """states_TI as e4m3, and the scale_T1 that gives them back."""
    largest_T1 = states_TI.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)
    return (states_TI.float() * (LARGEST / largest_T1)).to(torch.float8_e4m3fn), largest_T1 / LARGEST


class Fp8Linear(nn.Module):
    """A frozen linear map in 8 bits, with bf16 results."""

    weight_OI: Tensor
    scale_1O: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI, scale_O1 = quantized(linear.weight.detach())
        self.register_buffer("weight_OI", weight_OI)
        self.register_buffer("scale_1O", scale_O1.T.contiguous())
        self.bias = linear.bias

    def forward(self, states: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        states_TI = states.flatten(0, -2)
        eighth_TI, scale_T1 = quantized(states_TI)
        out_TO: Tensor = torch._scaled_mm(
            eighth_TI, self.weight_OI.T, scale_a=scale_T1, scale_b=self.scale_1O, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        out_TO = out_TO if self.bias is None else out_TO + self.bias
        return out_TO.view(*states.shape[:-1], -1)


def convert(model: nn.Module) -> None:
    """Puts the linear maps of the model's layers into 8 bits, in place. Raises ValueError where the device has none."""
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"8-bit matrix products need an NVIDIA GPU of compute capability 8.9 or later, not {device}: set fp8 to false"
        )
    for layer in layers_of(model):
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear) and module.in_features % 16 == 0 and module.out_features % 16 == 0:
                parent, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(parent), leaf, Fp8Linear(module))


def agreement(exact_NE: Tensor, other_NE: Tensor, nearest: int = 10) -> tuple[float, float]:
    """Mean cosine between two encodings of the same items, and the mean share of the nearest neighbours that they agree on."""
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
