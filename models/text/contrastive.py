"""SCFT's loss over the batch of all processes, and its gradient at the memory of one micro-batch.

Shapes: B items of the whole batch, E width, M items of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(a_BE: Tensor, b_BE: Tensor, scale: Tensor, alike_BB: Tensor) -> Tensor:
    """Symmetric InfoNCE on cosine similarity: view b of an item among all items' views b, and the other way round.

    scale is 1 / temperature. alike_BB marks pairs that are no negatives of each other (texts that read the same); the
    diagonal is the positive whatever it says. METHOD §1; van den Oord et al. 2018.
    """
    logits_BB = scale * F.normalize(a_BE, dim=1) @ F.normalize(b_BE, dim=1).T
    itself_BB = torch.eye(len(a_BE), dtype=torch.bool, device=a_BE.device)
    logits_BB = logits_BB.masked_fill(alike_BB & ~itself_BB, float("-inf"))
    label_B = torch.arange(len(a_BE), device=a_BE.device)
    return (F.cross_entropy(logits_BB, label_B) + F.cross_entropy(logits_BB.T, label_B)) / 2


def alike(text_B: Tensor, partner_B: Tensor, a_B: Tensor, b_B: Tensor) -> Tensor:
    """alike_BB: a row's and a column's item, or their partners, read the same, or one the other's; or the views' keys a and b."""
    same_BB = (text_B[:, None] == text_B) | (partner_B[:, None] == partner_B) | (text_B[:, None] == partner_B)
    return same_BB | (a_B[:, None] == b_B)


def gathered(own_ME: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; each has the same number."""
    if not dist.is_initialized():
        return own_ME
    rows = [torch.empty_like(own_ME) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own_ME.contiguous())
    return torch.cat(rows)


def backward(forwards: Sequence[Callable[[], Tensor]], loss_of: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """Puts the gradient of the loss over the whole batch into the parameters; returns what tells the loss.

    `forwards` embed this process's micro-batches (each gives the same embeddings whenever it is called); `loss_of` takes all
    processes' embeddings, in the order of the ranks. One micro-batch keeps its graph. With more, embeddings are computed
    without one, then again a micro-batch at a time, and their gradients are passed down: the gradient is the same to the
    last term, the memory that of one micro-batch (GradCache, Gao et al. 2021, arXiv 2101.06983).
    """
    if len(forwards) == 1:
        own_BE = forwards[0]()
    else:
        with torch.no_grad():
            own_BE = torch.cat([forward() for forward in forwards])
    all_BE = gathered(own_BE.detach()).requires_grad_()
    loss = loss_of(all_BE)
    told = on_its_way(loss.detach())
    torch.autograd.backward(loss)
    assert all_BE.grad is not None
    rank = dist.get_rank() if dist.is_initialized() else 0
    grad_BE = all_BE.grad[rank * len(own_BE) : (rank + 1) * len(own_BE)]
    if len(forwards) == 1:
        torch.autograd.backward(own_BE, grad_BE)
    else:
        start = 0
        for forward in forwards:
            emb_ME = forward()
            torch.autograd.backward(emb_ME, grad_BE[start : start + len(emb_ME)])
            start += len(emb_ME)
    return told


def on_its_way(value: Tensor) -> Callable[[], float]:
    """What tells a number as soon as it is there, without waiting for the work that a GPU was given after it."""
    if value.device.type != "cuda":
        return lambda: float(value)
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def tell() -> float:
        arrived.synchronize()
        return float(host)

    return tell
