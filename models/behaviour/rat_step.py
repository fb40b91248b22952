"""One step's loss: next or masked items, against all candidates or sampled ones; RAT's alignment; LLM-ESR's distillation.

Shapes: R training rows, B rows of a batch, W events of a window, L positions, P positions with a label, S negatives,
M candidate items, V items + 1 (row 0 is padding), D width, K events of a batch, N items of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from models.behaviour.data import Histories, window
from models.behaviour.llm_esr import Distiller
from models.behaviour.losses import LOSSES, alignment, full_softmax
from models.behaviour.progress import LOGITS
from models.behaviour.recommender import Recommender
from models.behaviour.training_config import Training

NEWEST_ALONE = 0.5
"""Share of the rows of masked training in which only the newest item is hidden."""


@runtime_checkable
class Masked(Protocol):
    """A sequence encoder that is trained behind masks, as BERT4Rec is; all others predict the next item."""

    mask_share: float
    """Share of a row's items that are hidden."""


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
    sequence = task.recommender.sequence
    return sequence.mask_share if isinstance(sequence, Masked) else 0.0


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
    loss = LOSSES[config.loss]
    count = 1 if loss.one_each else config.negatives
    if config.negatives_per == "batch" and not loss.one_each:
        negative_1S = candidates_M[torch.randint(len(candidates_M), (1, count), device=label_P.device)]
        logit_PS = hidden_PD @ look_up(negative_1S[0]).float().T
    else:
        negative_1S = candidates_M[torch.randint(len(candidates_M), (len(label_P), count), device=label_P.device)]
        logit_PS = torch.einsum("pd,psd->ps", hidden_PD, look_up(negative_1S).float())
    logit_PS = logit_PS.masked_fill(negative_1S == label_P[:, None], -torch.inf)
    return loss.of(positive_P, logit_PS, len(candidates_M))


def adjusted(prior_V: Tensor, look_up: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Vectors with one dimension more, the item's prior: against a hidden state that ends in 1 it is added to the score."""
    return lambda items: torch.cat([look_up(items).float(), prior_V[items].unsqueeze(-1)], dim=-1)


def full(hidden_PD: Tensor, table_MD: Tensor, label_P: Tensor) -> Tensor:
    """loss_P of the full softmax; scores past `LOGITS` are made in chunks, and made again for the gradient."""
    label_P = label_P.clamp_max(len(table_MD) - 1)
    chunk = max(1, LOGITS // len(table_MD))
    if chunk >= len(hidden_PD):
        return full_softmax(hidden_PD, table_MD, label_P)
    parts = zip(torch.split(hidden_PD, chunk), torch.split(label_P, chunk), strict=True)
    return torch.cat([recompute(full_softmax, hidden, table_MD, label, use_reentrant=False) for hidden, label in parts])


def align(aligner: Aligner, events_BW: Tensor, look_up: Callable[[Tensor], Tensor], most: int) -> Tensor:
    """alpha times the alignment loss over a batch's unique items, `most` at most, found in static shapes."""
    ordered_K = (batch_items(events_BW, len(aligner.teacher_VD)) if dist.is_initialized() else events_BW.flatten()).sort().values
    first_K = torch.cat([ordered_K[:1] != 0, ordered_K[1:] != ordered_K[:-1]])
    draw_K = torch.rand(ordered_K.shape, device=ordered_K.device) * first_K
    if dist.is_initialized():
        dist.broadcast(draw_K, 0)
    chance_N, place_N = draw_K.topk(min(aligner.items, most, len(draw_K)))
    item_N = ordered_K[place_N] * (chance_N > 0)
    adapted_ND = look_up(item_N).float()
    text_N = None if aligner.text_V is None else aligner.text_V[item_N]
    loss = alignment(adapted_ND, aligner.teacher_VD[item_N], aligner.weight_V[item_N], aligner.temperature, text_N)
    return aligner.alpha * loss


def batch_items(events_BW: Tensor, rows: int) -> Tensor:
    """item_V: the items of all processes' batches, 0 for the others: one alignment over the whole batch, however it is split."""
    met_V = torch.zeros(rows, device=events_BW.device)
    met_V[events_BW.flatten()] = 1
    dist.all_reduce(met_V, dist.ReduceOp.MAX)
    return torch.arange(rows, device=events_BW.device) * (met_V > 0)
