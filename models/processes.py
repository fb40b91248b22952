"""Several processes that train one model under `torchrun`: they join, agree on decisions, and sum their gradients."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist


def join() -> tuple[int, int]:
    """Joins the group that `torchrun` announces -> (rank, number of processes); (0, 1) without `torchrun`.

    CPU tensors go by gloo, so that processes can agree on something without waiting for their GPUs.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_rank(), dist.get_world_size()


def same_everywhere(text: str, device: torch.device) -> str:
    """Each process's ASCII text -> the first process's, in all of them. The texts must have the same length."""
    if not dist.is_initialized():
        return text
    sent = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8, device=device)
    dist.broadcast(sent, 0)
    return bytes(sent.tolist()).decode("ascii")


def any_process(flag: bool) -> bool:
    """Each process's flag -> whether it is true in any of them: the same answer in all."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([int(flag)])
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags[0])


def from_first(make: Callable[[], bytes]) -> bytes:
    """Runs `make` in the first process alone -> its bytes, in all processes. Where it raises, all of them raise."""
    if not dist.is_initialized():
        return make()
    made, failure = b"", None
    if dist.get_rank() == 0:
        try:
            made = make()
        except Exception as error:
            failure = error
    size = torch.tensor([-1 if failure else len(made)])
    dist.broadcast(size, 0)
    if failure:
        raise failure
    if size[0] < 0:
        raise RuntimeError("the first process failed: its log says why")
    if not size[0]:
        return b""
    sent = torch.frombuffer(bytearray(made), dtype=torch.uint8) if made else torch.empty(int(size[0]), dtype=torch.uint8)
    dist.broadcast(sent, 0)
    return sent.numpy().tobytes()


def gather_to_first(rows: torch.Tensor, counts: list[int]) -> torch.Tensor | None:
    """Each process's rows on the CPU -> in the first process all rows, in the order of the ranks; None in the others.

    `counts` are the rows of each process, known to all.
    """
    if not dist.is_initialized():
        return rows
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if dist.get_rank() == 0 else None
    dist.gather(padded, parts, 0)
    return None if parts is None else torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Sums the parameters' gradients over processes, in one message."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, torch.split(flat, [gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# ------------------------------------------------------------------------------------------------------- one step
