"""One linear map with LoRA weights, as PEFT's layer computes it and faster. A module apart: PEFT takes seconds to import.

Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from models.text.low_rank import Down, Up


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer with one adapter. It gives the same numbers as PEFT, computed by `Down` and `Up`."""

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """(…, I) -> (…, O)."""
        if self.disable_adapters or self.merged:
            plain: Tensor = super().forward(x, *args, **options)
            return plain
        (name,) = self.active_adapters
        result = self.base_layer(x)
        down_RI = self.lora_A[name].weight.to(result.dtype)
        # outputs side by side in memory, as `narrow_product` reads them
        up_RO = self.lora_B[name].weight.T.to(result.dtype, memory_format=torch.contiguous_format)
        states_TI = self.lora_dropout[name](x.to(result.dtype)).flatten(0, -2)
        low_TR = Down.apply(states_TI, down_RI) * self.scaling[name]  # type: ignore[no-untyped-call]
        added: Tensor = result + Up.apply(low_TR, up_RO).view_as(result)  # type: ignore[no-untyped-call]
        return added
