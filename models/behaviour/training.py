"""Trains a recommender: data resident on the device, no Python per sample, best weights kept, the same code on CPU and GPUs.

Under `torchrun` every process takes its share of each batch and gradients are summed. On CUDA whole steps are replayed as graphs.

Shapes: R training rows, B rows of a batch, L positions, P positions with a label, S negatives, M candidate items,
V items + 1 (row 0 is padding), D width, C validation cases.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from models.behaviour import losses
from models.behaviour.data import Histories, train_counts, training_rows, window
from models.behaviour.llm_esr import Distiller
from models.behaviour.progress import LOGITS, Progress, Trained, make_validation, rounded, validate
from models.behaviour.recommender import Recommender
from models.processes import join, sum_gradients

Log = Callable[[dict[str, float], int], None]
NEWEST_ALONE = 0.5
"""Share of the rows of masked training in which only the newest item is hidden."""
WARM_UP = 3
"""Steps run one by one before a CUDA graph is recorded: libraries choose their kernels and buffers in them."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a recommender is trained."""

    epochs: int = 200
    """At most; training stops earlier when validation stops improving."""
    patience: int = 20
    """Epochs without a better validation NDCG@10 before training stops."""
    validate_every: int = 1
    """Epochs between validations (and checkpoints)."""
    validation_users: int = 50_000
    """At most so many validation cases, spread evenly over the users."""
    batch: int = 128
    """Rows of a step, over all GPUs together."""
    windows: Literal["last", "all"] = "last"
    """Rows of a user: the last max_len events, or as many windows as cover the whole history."""
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    loss: Literal["full", "sampled", "gbce", "bce"] = "sampled"
    cosine: float = 0.0
    """Temperature of a softmax over cosines, .05 to .1: vectors of users and items then have length one. 0 takes dot products as
    they are."""
    negatives: int = 256
    """Negatives of `sampled` and `gbce`; `bce` takes one."""
    negatives_per: Literal["batch", "position"] = "batch"
    """`batch` draws one set for all positions (fast), `position` a set for each; `bce` always draws for each."""
    logit_adjustment: float = 0.0
    """In training, scores are raised by this times the log of the item's share of the train events (Menon et al., ICLR 2021,
    eq. 10). Served scores are not: above 0, what is learned leans to the tail. 1 removes popularity whole."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto` is bf16 on CUDA and fp32 on CPU; item scores are fp32 always."""
    graph: bool = True
    """On one CUDA device, replays whole steps as CUDA graphs."""
    compile: bool = False
    """Compiles the sequence encoder with torch.compile: worth its minute of start in long trainings on CUDA."""

    def __post_init__(self) -> None:
        for name in ("epochs", "validate_every", "validation_users", "batch", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}: it must be at least 1")
        if self.cosine < 0:
            raise ValueError(f"training.cosine is {self.cosine}: it is a temperature; write 0 for dot products")
        if self.patience < self.validate_every:
            raise ValueError(f"training.patience {self.patience} is below validate_every {self.validate_every}: "
                             "training would stop before its first validation")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Aligner:
    """RAT's alignment to the teacher: its table, each item's weight by train popularity, and the share in the loss."""

    teacher_VD: Tensor
    weight_V: Tensor
    alpha: float
    temperature: float
    items: int = 2048
    """Unique items of a batch that are aligned, at most; drawn at random where there are more."""
    text_V: Tensor | None = None
    """A number for each different text: items of the same text are not negatives of each other."""


# ------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that a step needs, resident on the device."""

    recommender: Recommender
    sequence: Callable[..., Tensor]
    """The recommender's sequence encoder, compiled where asked for."""
    events: Histories
    users_R: Tensor
    ends_R: Tensor
    """The last row has no events: odd last batches are filled up with it."""
    candidates_M: Tensor
    prior_V: Tensor
    """What logit adjustment adds to scores in training."""
    aligner: Aligner | None
    distiller: Distiller | None
    config: Training
    autocast: Callable[[], AbstractContextManager[Any]]
    processes: int


def step_loss(task: Task, row_B: Tensor, width: int, capacity: int) -> Tensor:
    """Mean loss over a batch's labels; `width` bounds the rows' lengths and `capacity` the number of labels."""
    with task.autocast():
        events_BW = window(task.events, task.users_R[row_B], task.ends_R[row_B], width + 1)
        look_up = vectors(task, events_BW.numel())
        hidden_BLD, label_BL = cloze(task, events_BW, look_up) if cloze_share(task) else shifted(task, events_BW, look_up)
    # the labels first, in static shapes: most positions of a padded batch have none
    place_P = (label_BL.flatten() == 0).to(torch.uint8).argsort(stable=True)[:capacity]
    label_P = label_BL.flatten()[place_P]
    weight_P = (label_P != 0).float()
    count = weight_P.sum()
    if task.processes > 1:
        dist.all_reduce(count)
    with torch.autocast(events_BW.device.type, enabled=False):
        loss_P = recommendation(task, hidden_BLD.flatten(0, 1).index_select(0, place_P).float(), label_P, look_up)
        loss = (loss_P * weight_P).sum() / count.clamp_min(1)
        if task.aligner is not None:
            # a batch has at most as many different items as events: a label or a row's first each
            most = (capacity + len(row_B)) * task.processes
            loss = loss + align(task.aligner, events_BW, look_up, most) / task.processes
        if task.distiller is not None:
            user_BD = hidden_BLD[:, -1].float()
            loss = loss + task.distiller(task.users_R[row_B], task.ends_R[row_B], user_BD) / task.processes
    return loss


def vectors(task: Task, lookups: int) -> Callable[[Tensor], Tensor]:
    """Item indices -> vectors in float32; made once for all items where a step looks up as many, or all are candidates.

    Float32 whatever the batch, or a model would depend on how many items a step looked up.
    """
    recommender, kind = task.recommender, task.candidates_M.device.type
    if task.config.loss != "full" and lookups < recommender.items.rows:

        def look_up(items: Tensor) -> Tensor:
            with torch.autocast(kind, enabled=False):
                return recommender.items(items)

        return look_up
    with torch.autocast(kind, enabled=False):
        table_VD = recommender.item_table()
    return lambda items: F.embedding(items, table_VD, padding_idx=0)


def cloze_share(task: Task) -> float:
    """Share of items that the encoder wants masked in training; 0 for encoders that predict the next item."""
    share: float = task.recommender.sequence.mask_share  # type: ignore[assignment]
    return share


def shifted(task: Task, events_BW: Tensor, look_up: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """hidden_BLD and label_BL of next-item training: each position's label is the event after it."""
    input_BL = events_BW[:, :-1]
    hidden_BLD = task.sequence(look_up(input_BL), input_BL != 0)
    return hidden_BLD, events_BW[:, 1:] * (input_BL != 0)


def cloze(task: Task, events_BW: Tensor, look_up: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """hidden_BLD and label_BL of masked training: a share of the items is behind masks, in a part of the rows the newest alone.

    The latter is what serving asks for (Sun et al., section 3.6).
    """
    input_BL = events_BW[:, 1:]
    valid_BL = input_BL != 0
    draw_BL = torch.rand(input_BL.shape, device=input_BL.device)
    masked_BL = (draw_BL < cloze_share(task)) & (torch.rand_like(draw_BL[:, :1]) < 1 - NEWEST_ALONE)
    newest_BL = torch.zeros_like(masked_BL)
    newest_BL[:, -1] = ~masked_BL.any(1)
    masked_BL = (masked_BL | newest_BL) & valid_BL
    return task.sequence(look_up(input_BL), valid_BL, masked_BL), input_BL * masked_BL


def recommendation(task: Task, hidden_PD: Tensor, label_P: Tensor, look_up: Callable[[Tensor], Tensor]) -> Tensor:
    """loss_P of the configured loss. Candidates are what may be recommended against: never an item held out as cold."""
    config, candidates_M = task.config, task.candidates_M
    if config.cosine:
        hidden_PD = F.normalize(hidden_PD, dim=1) / config.cosine
    if config.logit_adjustment:
        hidden_PD, look_up = F.pad(hidden_PD, (0, 1), value=1.0), adjusted(task.prior_V, look_up)
    if config.loss == "full":
        return full(hidden_PD, look_up(candidates_M).float(), torch.searchsorted(candidates_M, label_P))
    positive_P = (hidden_PD * look_up(label_P).float()).sum(1)
    count = 1 if config.loss == "bce" else config.negatives
    if config.negatives_per == "batch" and config.loss != "bce":
        negative_1S = candidates_M[torch.randint(len(candidates_M), (1, count), device=label_P.device)]
        logit_PS = hidden_PD @ look_up(negative_1S[0]).float().T
    else:
        negative_1S = candidates_M[torch.randint(len(candidates_M), (len(label_P), count), device=label_P.device)]
        logit_PS = torch.einsum("pd,psd->ps", hidden_PD, look_up(negative_1S).float())
    logit_PS = logit_PS.masked_fill(negative_1S == label_P[:, None], -torch.inf)
    if config.loss == "sampled":
        return losses.sampled_softmax(positive_P, logit_PS, len(candidates_M))
    return losses.bce(positive_P, logit_PS) if config.loss == "bce" else losses.gbce(positive_P, logit_PS, len(candidates_M))


def adjusted(prior_V: Tensor, look_up: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Vectors with one dimension more, the item's prior: against a hidden state that ends in 1 it is added to the score."""
    return lambda items: torch.cat([look_up(items).float(), prior_V[items].unsqueeze(-1)], dim=-1)


def full(hidden_PD: Tensor, table_MD: Tensor, label_P: Tensor) -> Tensor:
    """loss_P of the full softmax; scores past `LOGITS` are made in chunks, and made again for the gradient."""
    label_P = label_P.clamp_max(len(table_MD) - 1)
    chunk = max(1, LOGITS // len(table_MD))
    if chunk >= len(hidden_PD):
        return losses.full_softmax(hidden_PD, table_MD, label_P)
    parts = zip(torch.split(hidden_PD, chunk), torch.split(label_P, chunk), strict=True)
    return torch.cat([recompute(losses.full_softmax, hidden, table_MD, label, use_reentrant=False) for hidden, label in parts])


def align(aligner: Aligner, events_BW: Tensor, look_up: Callable[[Tensor], Tensor], most: int) -> Tensor:
    """alpha times the alignment loss over a batch's unique items, `most` at most, found in static shapes."""
    ordered_K = (met_by_all(events_BW, len(aligner.teacher_VD)) if dist.is_initialized() else events_BW.flatten()).sort().values
    first_K = torch.cat([ordered_K[:1] != 0, ordered_K[1:] != ordered_K[:-1]])
    draw_K = torch.rand(ordered_K.shape, device=ordered_K.device) * first_K
    if dist.is_initialized():
        dist.broadcast(draw_K, 0)
    chance_N, place_N = draw_K.topk(min(aligner.items, most, len(draw_K)))
    item_N = ordered_K[place_N] * (chance_N > 0)
    adapted_ND = look_up(item_N).float()
    text_N = None if aligner.text_V is None else aligner.text_V[item_N]
    loss = losses.alignment(adapted_ND, aligner.teacher_VD[item_N], aligner.weight_V[item_N], aligner.temperature, text_N)
    return aligner.alpha * loss


def met_by_all(events_BW: Tensor, rows: int) -> Tensor:
    """item_V: the items of all processes' batches, 0 for the others: one alignment over the whole batch, however it is split."""
    met_V = torch.zeros(rows, device=events_BW.device)
    met_V[events_BW.flatten()] = 1
    dist.all_reduce(met_V, dist.ReduceOp.MAX)
    return torch.arange(rows, device=events_BW.device) * (met_V > 0)


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

    candidates_M, ascending item indices, are the negatives and the only validation targets; default all items. `unseen`
    validates among items that the user has not had, as serving ranks. `validate_on` gives the validation events where `events`
    has none, being trained on whole. A file at
    `checkpoint` is resumed from, and kept up to date after each validation. Reseeds torch's global generators at each epoch.
    Raises ValueError for nothing to train or validate on, a loss that is not finite, or a batch that does not divide.
    """
    rank, processes = join()
    if config.batch % processes:
        raise ValueError(f"batch {config.batch} does not divide over {processes} processes: choose a multiple")
    device = events.items_N.device
    recommender.to(device)
    if candidates_M is None:
        candidates_M = torch.arange(1, events.catalogue + 1, device=device)
    task, length_R = make_task(recommender, events, config, max_len, candidates_M, aligner, processes, distiller)
    validation = make_validation(validate_on or events, candidates_M, config.validation_users, max_len, unseen)
    graph = config.graph and device.type == "cuda" and processes == 1
    optimizer = torch.optim.AdamW(
        [parameter for parameter in recommender.parameters() if parameter.requires_grad],
        lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay,
        fused=device.type == "cuda", capturable=graph,
    )  # fmt: skip
    stepper = Stepper(task, optimizer, graph)
    progress = Progress(recommender, optimizer, distiller.state() if distiller is not None else {})
    if checkpoint is not None and checkpoint.exists():
        progress.load(checkpoint)
    if processes > 1:
        for value in recommender.state_dict().values():
            dist.broadcast(value, 0)
    seconds: list[float] = []
    while progress.epoch < config.epochs and progress.epoch - progress.best_epoch < config.patience:
        began = time.perf_counter()
        figures = run_epoch(stepper, length_R, seed * 1_000_003 + progress.epoch, rank, processes, max_len)
        if not math.isfinite(figures["loss"]):
            raise ValueError(
                f"loss is {figures['loss']} after epoch {progress.epoch}: lower learning_rate, or use precision fp32"
            )
        if (progress.epoch + 1) % config.validate_every == 0 or progress.epoch + 1 == config.epochs:
            figures |= validate(recommender, validation, task.autocast)
        progress.add(figures)
        seconds.append(time.perf_counter() - began)
        if rank == 0:
            log(figures | {"seconds": seconds[-1]}, progress.epoch)
            if checkpoint is not None and "ndcg" in figures:
                progress.save(checkpoint)
    return progress.finish(sorted(seconds)[len(seconds) // 2] if seconds else 0.0)


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
