"""SCFT's loss over the batch of all processes, and its gradient in the memory of one micro-batch.

Shapes: B items of the whole batch, E width, M items of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(a_BE: Tensor, b_BE: Tensor, scale: Tensor, same_BB: Tensor, often_B: Tensor | None = None) -> Tensor:
    """Views a and b of B items -> the loss: symmetric InfoNCE on cosine similarity.

    Each view a must find its item's view b among all views b, and the other way round. `scale` is 1 / temperature. `same_BB`
    marks pairs that must not count as negatives of each other; the diagonal is always the positive.
    METHOD §1; van den Oord et al. 2018.

    With `often_B`, b is what came after a, and only a looks for b: `often_B` says how often b comes as a negative (its
    logarithm), and is taken off, so that what is popular isn't pushed away for being drawn often (Yi et al. 2019, §3).
    """
    logits_BB = scale * F.normalize(a_BE, dim=1) @ F.normalize(b_BE, dim=1).T
    itself_BB = torch.eye(len(a_BE), dtype=torch.bool, device=a_BE.device)
    logits_BB = logits_BB.masked_fill(same_BB & ~itself_BB, float("-inf"))
    label_B = torch.arange(len(a_BE), device=a_BE.device)
    if often_B is not None:
        return F.cross_entropy(logits_BB - often_B, label_B)
    return (F.cross_entropy(logits_BB, label_B) + F.cross_entropy(logits_BB.T, label_B)) / 2


def same_text_mask(text_B: Tensor, partner_B: Tensor, a_B: Tensor, b_B: Tensor) -> Tensor:
    """Texts of items and of their partners, keys of views a and b -> same_BB: the pairs that are no negatives of each other.

    Two items have equal texts, or partners with equal texts, or one is the other's partner, or their views have equal keys.
    """
    same_BB = (text_B[:, None] == text_B) | (partner_B[:, None] == partner_B) | (text_B[:, None] == partner_B)
    return same_BB | (a_B[:, None] == b_B)


def gather_rows(own_ME: Tensor) -> Tensor:
    """A process's rows -> those of all processes, in the order of their ranks. Each has the same number of rows."""
    if not dist.is_initialized():
        return own_ME
    rows = [torch.empty_like(own_ME) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own_ME.contiguous())
    return torch.cat(rows)


def backward(forwards: Sequence[Callable[[], Tensor]], loss_of: Callable[[Tensor], Tensor]) -> Callable[[], float]:
    """Adds the gradient of the loss over the whole batch to the parameters; returns a function that reads the loss.

    `forwards` embed this process's micro-batches, and give the same embeddings at each call. `loss_of` takes the embeddings of
    all processes, in the order of the ranks. With one micro-batch, the graph is kept. With more, the embeddings are computed
    first without a graph, then again one micro-batch after the other, and each gets its part of the gradient: the gradient is
    the same, and the memory is that of one micro-batch (GradCache, Gao et al. 2021, arXiv 2101.06983).
    """
    if len(forwards) == 1:
        own_BE = forwards[0]()
    else:
        with torch.no_grad():
            own_BE = torch.cat([forward() for forward in forwards])
    all_BE = gather_rows(own_BE.detach()).requires_grad_()
    loss = loss_of(all_BE)
    read_loss = read_later(loss.detach())
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
    return read_loss


def read_later(value: Tensor) -> Callable[[], float]:
    """A number on a device -> a function that reads it, and does not wait for work that the GPU was given later."""
    if value.device.type != "cuda":
        return lambda: float(value)
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()

    def read() -> float:
        arrived.synchronize()
        return float(host)

    return read
