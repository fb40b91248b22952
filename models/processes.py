"""Several processes that train one model under `torchrun`: joined, agreed, their gradients summed."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join() -> tuple[int, int]:
    """(rank, processes), joining the group that `torchrun` announces; (0, 1) without it."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def same_everywhere(text: str, device: torch.device) -> str:
    """The first process's ASCII text, in every process. All of them must hold a text of the same length."""
    if not dist.is_initialized():
        return text
    sent = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8, device=device)
    dist.broadcast(sent, 0)
    return bytes(sent.tolist()).decode("ascii")


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sums gradients over processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# ------------------------------------------------------------------------------------------------------- one step
