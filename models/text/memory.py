"""How a training step fits into a device: recomputed layers first, then smaller micro-batches; never other numbers."""

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

from models.text.encoder import Encoder, layers_of
from models.text.lora import COMPILER
from models.text.prompts import Prompts, take

T = TypeVar("T")
RUNGS = 16
"""Of the ladder of shapes, an octave: filler costs a thirty-second of a step on average."""


class Memory:
    """How a step fits into the device: which layers are recomputed in the backward pass, and the size of micro-batches.

    Starts from an estimate. Where it was too bold, it recomputes more layers first (a third more time for all of them), then
    halves the micro-batches (one more forward).
    """

    def __init__(self, encoder: Encoder, *, tokens: int, compiled: bool) -> None:
        self.device = encoder.device
        stack = layers_of(encoder.model)
        self.layers = len(stack)
        self.fixed = tokens
        self.recomputed = 0
        self.halvings = 0
        self.compiled = compiled and self.device.type == "cuda"
        self.whole, self.kept = stored(encoder, self.compiled)
        if self.compiled:
            encoder.round_shapes(RUNGS)
        for number, layer in enumerate(stack):
            # one compiled layer serves all, as they share their code, and any shape
            forward = torch.compile(layer.forward, dynamic=True, options=COMPILER) if self.compiled else layer.forward
            layer.forward = partial(self.run, number, forward)

    def run(self, number: int, forward: Callable[..., Any], *states: Any, **options: Any) -> Any:
        """A layer's forward, to be done again in the backward pass where its memory is needed."""
        if number == 0 and states and self.compiled and torch.is_grad_enabled():
            # as all layers' inputs do: else the first one would be a second program, compiled apart
            states[0].requires_grad_()
        if number < self.recomputed and torch.is_grad_enabled():
            return recompute(forward, *states, use_reentrant=False, **options)
        return forward(*states, **options)

    def room(self) -> float:
        """Bytes for activations."""
        if self.device.type != "cuda":
            return math.inf
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return 0.85 * (free - torch.cuda.memory_allocated(self.device))

    def split(self, rows: Prompts) -> list[Prompts]:
        """Micro-batches of whole items (two rows each), and the layers to recompute so that they fit."""
        room, total = self.room(), int(rows.length_B.sum())
        most = self.fixed or (total if math.isinf(room) else int(room / (self.layers * self.kept + self.whole)))
        most = max(1, most // 2**self.halvings)
        pairs = len(rows.length_B) // 2
        parts = min(pairs, -(-total // most))
        largest = -(-total // parts)
        if not math.isinf(room):
            spare = room - largest * self.layers * self.whole
            self.recomputed = max(self.recomputed, min(self.layers, math.ceil(-spare / (largest * (self.whole - self.kept)))))
        ends = np.linspace(0, pairs, parts + 1).astype(int)
        return [take(rows, np.arange(2 * start, 2 * end)) for start, end in pairwise(ends)]

    def fitting(self, attempt: Callable[[], T]) -> T:
        """Runs a step's gradient, more thriftily after each time that memory was too small for it."""
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


def stored(encoder: Encoder, compiled: bool) -> tuple[float, float]:
    """Bytes a token that one layer keeps for the backward pass, and those where it is recomputed.

    In 16-bit states of the model's and of the inner width, as counted on a Llama layer with LoRA on all maps; compiled code
    makes norms, gates and most of dropout again.
    """
    config = encoder.config
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    wide, inside = (9.5, 3.6) if compiled else (18.5, 4.6)
    return 2.0 * (wide * width + inside * inner), 2.0 * width
