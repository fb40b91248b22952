"""Trains a recommender: data resident on the device, no Python per sample, best weights kept, the same code on CPU and GPUs.

Under `torchrun` every process takes its share of each batch and gradients are summed. On CUDA whole steps are replayed as graphs.

Shapes: R training rows, B rows of a batch, L positions, P positions with a label, S negatives, M candidate items,
V items + 1 (row 0 is padding), D width, C validation cases.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import Histories, train_counts, training_rows
from models.behaviour.llm_esr import Distiller
from models.behaviour.progress import Progress, Trained, make_validation, rounded, validate
from models.behaviour.rat_step import Aligner as Aligner
from models.behaviour.rat_step import Task, cloze_share, step_loss
from models.behaviour.recommender import Recommender
from models.behaviour.training_config import Training as Training
from models.processes import join, sum_gradients

Log = Callable[[dict[str, float], int], None]
WARM_UP = 3
"""Steps run one by one before a CUDA graph is recorded: libraries choose their kernels and buffers in them."""


class Stepper:
    """Takes optimiser steps; on CUDA, records a step for each shape once as a CUDA graph and replays it."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer, graph: bool) -> None:
        self.task, self.optimizer, self.graph = task, optimizer, graph
        self.parameters = [parameter for parameter in task.recommender.parameters() if parameter.requires_grad]
        self.loss = torch.zeros((), device=task.candidates_M.device)
        """Sum of the losses since it was last set to zero."""
        self.seen: dict[tuple[int, int], int] = {}
        self.graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle() if graph else None

    def __call__(self, row_B: Tensor, width: int, capacity: int) -> None:
        """One step on the rows row_B."""
        shape = (width, capacity)
        if not self.graph:
            return self.step(row_B, *shape)
        self.seen[shape] = self.seen.get(shape, 0) + 1
        if self.seen[shape] <= WARM_UP:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.step(row_B, *shape)
            return torch.cuda.current_stream().wait_stream(stream)
        if shape not in self.graphs:
            self.record(row_B, shape)
        graph, static_B = self.graphs[shape]
        static_B.copy_(row_B)
        return graph.replay()

    def record(self, row_B: Tensor, shape: tuple[int, int]) -> None:
        """Records a step of one shape; nothing is computed by it."""
        graph, static_B = torch.cuda.CUDAGraph(), row_B.clone()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(static_B, *shape)
        self.graphs[shape] = graph, static_B

    def step(self, row_B: Tensor, width: int, capacity: int) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = step_loss(self.task, row_B, width, capacity)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.task.processes > 1:
            sum_gradients(self.parameters)
        self.optimizer.step()
        self.loss += loss.detach()


# ----------------------------------------------------------------------------------------------------------- epochs


def batches(
    length_R: Tensor, config: Training, epoch_seed: int, rank: int, processes: int, device: torch.device
) -> Iterator[tuple[Tensor, int, int]]:
    """Rows of each step in a fresh order, on the device, with the longest row's and the total number of labels.

    Both are known on the CPU from the rows' lengths, so that no step waits for the device. Index len(length_R) is the empty row.
    """
    order_R = torch.randperm(len(length_R), generator=torch.Generator().manual_seed(epoch_seed))
    filled_SB = F.pad(order_R, (0, -len(order_R) % config.batch), value=len(length_R)).view(-1, config.batch)[:, rank::processes]
    length_SB = F.pad(length_R, (0, 1))[filled_SB]
    return zip(filled_SB.to(device), length_SB.amax(1).clamp_min(1).tolist(), length_SB.sum(1).clamp_min(1).tolist(), strict=True)


def train(
    recommender: Recommender,
    events: Histories,
    config: Training,
    *,
    max_len: int,
    seed: int,
    log: Log,
    candidates_M: Tensor | None = None,
    aligner: Aligner | None = None,
    distiller: Distiller | None = None,
    checkpoint: Path | None = None,
    unseen: bool = False,
    validate_on: Histories | None = None,
) -> Trained:
    """Trains in place, on the device of `events`, and leaves the weights of the best epoch.

    candidates_M, ascending item indices, are the negatives and the only validation targets; default all items. `unseen` validates
    among items that the user has not had; `validate_on` gives the validation events where `events` has none. A file `checkpoint`
    is resumed from and kept up to date. Reseeds generators. Raises ValueError for nothing to train on, or a loss not finite.
    """
    rank, processes = join()
    among_M = torch.arange(1, events.catalogue + 1, device=events.items_N.device) if candidates_M is None else candidates_M
    task, length_R = make_task(recommender, events, config, max_len, among_M, aligner, processes, distiller)
    validation = make_validation(validate_on or events, among_M, config.validation_users, max_len, unseen)
    stepper = make_stepper(task)
    progress = resumed(recommender, stepper, distiller, checkpoint)
    seconds: list[float] = []
    while progress.epoch < config.epochs and progress.epoch - progress.best_epoch < config.patience:
        began = time.perf_counter()
        figures = one_epoch(stepper, length_R, progress.epoch, seed, rank, max_len)
        if (progress.epoch + 1) % config.validate_every == 0 or progress.epoch + 1 == config.epochs:
            figures |= validate(recommender, validation, task.autocast)
        progress.add(figures)
        seconds += [time.perf_counter() - began]
        if rank == 0:
            log(figures | {"seconds": seconds[-1]}, progress.epoch)
            if checkpoint is not None and "ndcg" in figures:
                progress.save(checkpoint)
    return progress.finish(median(seconds) if seconds else 0.0)


def resumed(recommender: Recommender, stepper: Stepper, distiller: Distiller | None, checkpoint: Path | None) -> Progress:
    """The training's state: of the checkpoint where there is one; the same in all processes."""
    progress = Progress(recommender, stepper.optimizer, distiller.state() if distiller is not None else {})
    if checkpoint is not None and checkpoint.exists():
        progress.load(checkpoint)
    if stepper.task.processes > 1:
        for value in recommender.state_dict().values():
            dist.broadcast(value, 0)
    return progress


def make_stepper(task: Task) -> Stepper:
    """What takes the task's steps, with its optimiser."""
    config, cuda = task.config, task.candidates_M.device.type == "cuda"
    graph = config.graph and cuda and task.processes == 1
    optimizer = torch.optim.AdamW(
        [parameter for parameter in task.recommender.parameters() if parameter.requires_grad],
        lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=cuda, capturable=graph,
    )  # fmt: skip
    return Stepper(task, optimizer, graph)


def make_task(
    recommender: Recommender,
    events: Histories,
    config: Training,
    max_len: int,
    candidates_M: Tensor,
    aligner: Aligner | None,
    processes: int,
    distiller: Distiller | None = None,
) -> tuple[Task, Tensor]:
    """The task, and on the CPU the number of labels of each row."""
    if config.batch % processes:
        raise ValueError(f"batch {config.batch} does not divide over {processes} processes: choose a multiple")
    recommender.to(events.items_N.device)
    users_R, ends_R = training_rows(events, max_len, config.windows)
    if not len(users_R):
        raise ValueError("no user has two train events: nothing to train on; extract a longer history or move the split")
    device = events.items_N.device
    half = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
    task = Task(
        recommender=recommender,
        sequence=torch.compile(recommender.sequence) if config.compile else recommender.sequence,
        events=events,
        users_R=F.pad(users_R, (0, 1)),
        ends_R=F.pad(ends_R, (0, 1)),
        candidates_M=candidates_M,
        prior_V=config.logit_adjustment * (train_counts(events).clamp_min(1) / max(1, int(events.train_end_U.sum()))).log(),
        aligner=aligner,
        distiller=distiller,
        config=config,
        # the cache of casted weights would outlive a recorded step
        autocast=(lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=False)) if half else nullcontext,
        processes=processes,
    )
    return task, (ends_R - 1).clamp_max(max_len).cpu()


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Lets float32 products of steps run on tensor cores (TF32). Validation and serving stay exact: they compare close scores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def one_epoch(stepper: Stepper, length_R: Tensor, epoch: int, seed: int, rank: int, max_len: int) -> dict[str, float]:
    """One pass over all rows, in an order of its own. Raises ValueError for a loss that is not finite."""
    with tensor_cores() if stepper.loss.device.type == "cuda" else nullcontext():
        figures = run_epoch(stepper, length_R, seed * 1_000_003 + epoch, rank, stepper.task.processes, max_len)
    if not math.isfinite(figures["loss"]):
        raise ValueError(f"loss is {figures['loss']} after epoch {epoch}: lower learning_rate, or use precision fp32")
    return figures


def run_epoch(stepper: Stepper, length_R: Tensor, epoch_seed: int, rank: int, processes: int, max_len: int) -> dict[str, float]:
    """One pass over all rows; reads the loss from the device once, at the end."""
    torch.manual_seed(epoch_seed * processes + rank)
    config, device = stepper.task.config, stepper.loss.device
    stepper.task.recommender.train()
    stepper.loss.zero_()
    steps = 0
    # a masked encoder also hides the oldest event: one label more than there are next items
    extra = 1 if cloze_share(stepper.task) else 0
    for row_B, width, labels in batches(length_R, config, epoch_seed, rank, processes, device):
        width = rounded(width + extra, max_len)
        capacity = rounded(labels + extra * len(row_B), len(row_B) * width)
        stepper(row_B, width, capacity)
        steps += 1
    if processes > 1:
        dist.all_reduce(stepper.loss)
    return {"loss": float(stepper.loss) / steps}
