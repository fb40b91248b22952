"""Fits a training step into a device's memory: first recomputes layers, then takes smaller micro-batches. The numbers stay."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute

from models.text.base_model import layers_of
from models.text.encoder import Encoder
from models.text.low_rank import COMPILER
from models.text.prompts import Ints, Prompts

T = TypeVar("T")
RUNGS = 16
"""How coarsely shapes are rounded up (see `pack`): filler costs a thirty-second of a step on average."""


class Memory:
    """How a step fits into the device: which layers are recomputed in the backward pass, and the size of micro-batches.

    Starts from an estimate. If memory is still too small, it first recomputes more layers (a third more time for all of them),
    and then halves the micro-batches (one more forward pass).
    """

    def __init__(self, encoder: Encoder, *, tokens: int, compiled: bool) -> None:
        self.device = encoder.device
        stack = layers_of(encoder.model)
        self.layers = len(stack)
        self.fixed = tokens
        self.recomputed = 0
        self.halvings = 0
        self.compiled = compiled and self.device.type == "cuda"
        self.whole, self.kept = bytes_per_token(encoder, self.compiled)
        if self.compiled:
            encoder.round_shapes(RUNGS)
        for number, layer in enumerate(stack):
            # one compiled layer serves all, as they share their code, and any shape
            forward = torch.compile(layer.forward, dynamic=True, options=COMPILER) if self.compiled else layer.forward
            layer.forward = partial(self.run_layer, number, forward)

    def run_layer(self, number: int, forward: Callable[..., Any], *states: Any, **options: Any) -> Any:
        """A layer's forward pass. It is done again in the backward pass where the memory is needed."""
        if number == 0 and states and self.compiled and torch.is_grad_enabled():
            # as the other layers' inputs do: else the first layer would be compiled as a second program
            states[0].requires_grad_()
        if number < self.recomputed and torch.is_grad_enabled():
            return recompute(forward, *states, use_reentrant=False, **options)
        return forward(*states, **options)

    def free_bytes(self) -> float:
        """Bytes that activations may take."""
        if self.device.type != "cuda":
            return math.inf
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return 0.85 * (free - torch.cuda.memory_allocated(self.device))

    def split(self, rows: Prompts, each: int = 2) -> list[Ints]:
        """A step's rows -> those of each micro-batch, `each` together. Sets how many layers to recompute, too."""
        room, total = self.free_bytes(), int(rows.length_B.sum())
        most = self.fixed or (total if math.isinf(room) else int(room / (self.layers * self.kept + self.whole)))
        most = max(1, most // 2**self.halvings)
        groups = len(rows.length_B) // each
        parts = min(groups, -(-total // most))
        largest = -(-total // parts)
        if not math.isinf(room):
            spare = room - largest * self.layers * self.whole
            self.recomputed = max(self.recomputed, min(self.layers, math.ceil(-spare / (largest * (self.whole - self.kept)))))
        ends = np.linspace(0, groups, parts + 1).astype(int)
        return [np.arange(each * start, each * end) for start, end in pairwise(ends)]

    def run_fitting(self, attempt: Callable[[], T]) -> T:
        """Runs a step's gradient. After each time that memory was too small, tries again with less."""
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError:
                if dist.is_initialized() or self.halvings > 6:
                    raise
                torch.cuda.empty_cache()
                if self.recomputed < self.layers:
                    self.recomputed = min(self.layers, self.recomputed + -(-self.layers // 4))
                else:
                    self.halvings += 1


def bytes_per_token(encoder: Encoder, compiled: bool) -> tuple[float, float]:
    """Bytes a token that a layer keeps for the backward pass, and those that it keeps where it is recomputed.

    Counted on a Llama layer with LoRA on all maps, in 16-bit states of the model's width and of the inner width. Compiled code
    keeps less: it computes norms, gates and most of dropout again.
    """
    config = encoder.config
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    wide, inside = (9.5, 3.6) if compiled else (18.5, 4.6)
    return 2.0 * (wide * width + inside * inner), 2.0 * width
