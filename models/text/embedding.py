"""Prompts or raw items -> embeddings, in steps that keep the device busy.

Shapes: B prompts, E model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from models.processes import gather_to_first
from models.text.base_model import layers_of
from models.text.encoder import Encoder
from models.text.packing import SMALLEST, Step, batches, round_down
from models.text.prompts import Attributes, Ints, Prompts, prompts, take


def token_budget(encoder: Encoder) -> int:
    """Tokens of a step that keep the device busy. On a GPU fewer for wider models, which need more memory a token."""
    if encoder.device.type != "cuda":
        return 4096
    return max(8192, 2**27 // encoder.spec.width)


@torch.inference_mode()
def embed(
    encoder: Encoder, source: Prompts, *, budget: int = 0, log: Callable[[int, int], None] | None = None
) -> NDArray[np.float32]:
    """Prompts -> emb_BE float32, in the same order; calls `log(prompts, tokens)` after each step.

    `budget` is the tokens of a step, 0 for what suits the device. A step that does not fit into GPU memory is halved; raises
    torch.OutOfMemoryError only where a single prompt does not fit.
    """
    emb_BE = np.empty((len(source.length_B), encoder.spec.width), dtype=np.float32)
    waiting: list[tuple[Ints, Tensor]] = []
    # a GPU works on while the host goes on: an embedding is fetched once the next step has been sent
    behind = 0 if encoder.device.type == "cpu" else 1

    def fetch(left: int) -> None:
        while len(waiting) > left:
            rows, emb = waiting.pop(0)
            emb_BE[rows] = emb.cpu().numpy()
            if log:
                log(len(rows), int(source.length_B[rows].sum()))

    for step in embedded_steps(encoder, source, budget or token_budget(encoder)):
        waiting.append(step)
        fetch(behind)
    fetch(0)
    return emb_BE


def embed_together(
    encoder: Encoder, source: Prompts, *, budget: int = 0, log: Callable[[int, int], None] | None = None
) -> NDArray[np.float32] | None:
    """Prompts -> emb_BE float32 in the first process, None in the others. Each process embeds its share.

    As `embed` where there is one process; `log` gets this process's share. All processes must call it with the same prompts.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    # neighbours by length go to different processes, so that all have as much to do
    order = np.argsort(-source.length_B, kind="stable")
    shares = [order[start::world] for start in range(world)]
    own = torch.from_numpy(embed(encoder, take(source, shares[rank]), budget=budget, log=log))
    found = gather_to_first(own, [len(share) for share in shares])
    if found is None:
        return None
    emb_BE = np.empty(tuple(found.shape), dtype=np.float32)
    emb_BE[np.concatenate(shares)] = found.numpy()
    return emb_BE


def embedded_steps(encoder: Encoder, source: Prompts, budget: int) -> Iterator[tuple[Ints, Tensor]]:
    """Prompts -> rows and embeddings of each step. The next step is packed and sent while the device computes."""
    # filled up, a step is no larger than its budget: what is rounded up beyond it costs time and memory for nothing
    room = round_down(budget, SMALLEST, encoder.fill) if encoder.fill else budget
    todo = deque(batches(source.length_B, room - (len(encoder.head) if encoder.shared else 0), encoder.overhead))
    ahead: Future[Step] | None = None

    def packed(rows: Ints) -> Step:
        return encoder.step(take(source, rows))

    with ThreadPoolExecutor(1) as aside:
        while todo:
            rows = todo.popleft()
            # the first step too is packed aside: compiled code takes tensors made in inference mode, as here, for another kind
            step = (ahead or aside.submit(packed, rows)).result()
            ahead = aside.submit(packed, todo[0]) if todo else None
            try:
                emb = encoder(step)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
                torch.cuda.empty_cache()
                todo.extendleft([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
                ahead = None
                continue
            yield rows, emb


def embed_items(encoder: Encoder, items: Iterable[Attributes], *, budget: int = 0) -> NDArray[np.float32]:
    """Items' attributes -> emb_BE float32."""
    texts = encoder.tokenize(items)
    whole, _ = prompts(texts, np.arange(len(texts)), encoder.limit)
    return embed(encoder, whole, budget=budget)


def check_packing(encoder: Encoder, source: Prompts, tolerance: float = 0.999) -> float:
    """Embeds three prompts together and each alone -> the smallest cosine between both. An item must not see its neighbours.

    Raises ValueError where it is below `tolerance`: this model mixes packed prompts, as state space models do.
    """
    rows = np.argsort(source.length_B, kind="stable")[[0, len(source.length_B) // 2, -1]]
    together = embed(encoder, take(source, rows))
    alone = np.concatenate([embed(encoder, take(source, rows[place : place + 1])) for place in range(len(rows))])
    norms = np.linalg.norm(together, axis=1) * np.linalg.norm(alone, axis=1)
    cosine = float(((together * alone).sum(1) / np.maximum(norms, 1e-12)).min())
    if not cosine >= tolerance:
        raise ValueError(f"embeddings depend on the prompts beside them (cosine {cosine:.4f}): this base model cannot be packed")
    return cosine


def compile_layers(encoder: Encoder) -> None:
    """Compiles the model's layers, all as one program. Steps then get filler, so that few shapes occur."""
    encoder.round_shapes()
    for layer in layers_of(encoder.model):
        layer.compile()
