"""Dropout before LoRA weights, with a mask that is made from a seed.

The mask is cheap to make, so compiled code makes it again for the gradient and does not keep it in memory.

Shapes: T tokens, I inputs, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYER = 374761393
"""An odd number that spreads the layers' seeds over 32 bits."""


class SeededDropout(nn.Module):
    """Dropout whose mask is a hash of a seed, the row and the column.

    Maps that read the same states drop the same ones. Compiled code so makes one mask for all these maps.
    """

    seed: Tensor

    def __init__(self, p: float, seed: Tensor) -> None:
        super().__init__()
        self.p, self.bound = p, int(p * 2**32) - 2**31
        self.register_buffer("seed", seed, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """In evaluation: the states as they are. In training: a share p becomes 0, and the others grow by 1 / (1 - p)."""
        if not self.training:
            return states
        states_TI = states.flatten(0, -2)
        row_T, column_I = (torch.arange(n, dtype=torch.int32, device=states.device) for n in states_TI.shape)
        noise_TI = hash_bits(hash_bits(row_T + self.seed)[:, None] ^ hash_bits(column_I))
        return torch.where(noise_TI >= self.bound, states_TI * (1 / (1 - self.p)), 0.0).view_as(states)


def hash_bits(number: Tensor) -> Tensor:
    """int32 numbers -> int32 numbers whose high bits depend on every bit of the input."""
    number = number * -1640531535
    return (number ^ (number >> 15)) * 668265263


class Seeds:
    """Puts SeededDropout before all LoRA weights of a model and holds the seeds, another one for each layer."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.offset_L = torch.arange(len(layers), dtype=torch.int32, device=device) * LAYER
        self.seed_L = self.offset_L.clone()
        for layer, seed in zip(layers, self.seed_L, strict=True):
            for module in layer.modules():
                dropouts = getattr(module, "lora_dropout", None)
                if isinstance(dropouts, nn.ModuleDict):
                    for name, dropout in dropouts.items():
                        if isinstance(dropout, nn.Dropout):
                            dropouts[name] = SeededDropout(dropout.p, seed)

    def set(self, seed: int) -> None:
        """Sets the seed, 0 to 2^32 - 1, of the masks from now on."""
        torch.add(self.offset_L, seed - 2**31, out=self.seed_L)
