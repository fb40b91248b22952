"""How a training goes: validation on the device, the best weights so far, and the checkpoint that a killed run resumes from.

Shapes: C validation cases, B cases of a chunk, V items + 1 (row 0 is padding), D width, M candidate items.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.behaviour.data import Histories, cases, inputs_before, targets
from models.behaviour.recommender import Recommender, score
from models.checkpoint import adam_from, adam_state, read_checkpoint, write_checkpoint
from models.judge.metrics import by_rank, full_ranks

LOGITS = 2**28
"""Scores held at once: 1 GiB in float32."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training came to; the recommender itself holds the weights of the best epoch."""

    epochs: int
    best_epoch: int
    ndcg: float
    """Best validation NDCG@10, full ranking."""
    recall: float
    """Recall@10 of the same epoch."""
    seconds_per_epoch: float
    """Median over this process's epochs, validation included."""
    history: tuple[dict[str, float], ...] = field(repr=False)
    """Of each epoch: loss and, where validated, ndcg and recall."""


def rounded(value: int, most: int) -> int:
    """A value rounded up to 1, 1.5 times a power of two, at most `most`: few shapes, little padding."""
    power = 1 << max(value - 1, 1).bit_length()
    return min(most, power * 3 // 4 if value <= power * 3 // 4 else power)


def seen_mask(history_BL: Tensor, target_B: Tensor, rows: int) -> Tensor:
    """masked_BV: what the user has had (0 in a history is padding), never the target, so that a repeat can still be foretold."""
    masked_BV = torch.zeros(len(history_BL), rows, dtype=torch.bool, device=history_BL.device)
    masked_BV.scatter_(1, history_BL, True)
    masked_BV.scatter_(1, target_B[:, None], False)
    masked_BV[:, 0] = False
    return masked_BV


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What a training is validated on."""

    events: Histories
    chunks: tuple[tuple[Tensor, Tensor, int], ...]
    """(users_B, position_B, longest history): short histories with short ones, so that little of a chunk is padding."""
    max_len: int
    unseen: bool
    """Ranks among items that the user has not had, as serving does where it leaves out seen ones."""


def make_validation(
    events: Histories, candidates_M: Tensor, validation_users: int, max_len: int, unseen: bool = False
) -> Validation:
    """The last validation event of each user, in chunks. Raises ValueError where there is no case."""
    users_C, position_C = cases(events, "valid")
    known_C = torch.isin(targets(events, users_C, position_C), candidates_M)
    users_C, position_C = users_C[known_C], position_C[known_C]
    if not len(users_C):
        raise ValueError("no user has an event to validate on: extract a longer history or move the split")
    some = torch.linspace(0, len(users_C) - 1, min(len(users_C), validation_users), device=users_C.device).long()
    order = some[position_C[some].argsort(stable=True)]
    users_C, position_C = users_C[order], position_C[order]
    length_C = position_C.cpu()
    chunk = max(1, min(4096, LOGITS // (events.catalogue + 1)))
    chunks = []
    for start in range(0, len(users_C), chunk):
        users_B, position_B = users_C[start : start + chunk], position_C[start : start + chunk]
        chunks.append((users_B, position_B, int(length_C[start : start + chunk].max())))
    return Validation(events=events, chunks=tuple(chunks), max_len=max_len, unseen=unseen)


@torch.no_grad()
def validate(
    recommender: Recommender,
    validation: Validation,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, float]:
    """NDCG@10 and Recall@10 of the last validation events, ranked among all items, or all that the user has not had."""
    recommender.eval()
    events = validation.events
    table_VD = recommender.item_table().float()
    found = []
    for users_B, position_B, longest in validation.chunks:
        with autocast():
            input_BL = inputs_before(events, users_B, position_B, rounded(longest, validation.max_len))
            user_BD = recommender.encode(input_BL, table_VD)
        target_B = targets(events, users_B, position_B)
        scores_BV = score(user_BD, table_VD)
        masked_BV = None
        if validation.unseen:
            masked_BV = seen_mask(inputs_before(events, users_B, position_B, longest), target_B, len(table_VD))
            scores_BV.masked_fill_(masked_BV, -torch.inf)
        figures = by_rank(full_ranks(scores_BV, target_B, masked_BV))
        found.append(torch.stack([figures["ndcg"], figures["hr"]]))
    mean_2 = torch.cat(found, 1).mean(1)
    if dist.is_initialized():
        # all processes must stop after the same epoch
        dist.broadcast(mean_2, 0)
    ndcg, recall = mean_2.tolist()
    return {"ndcg": ndcg, "recall": recall}


class Progress:
    """Where a training stands: weights, optimiser state, best weights and figures; kept as safetensors."""

    def __init__(
        self, recommender: Recommender, optimizer: torch.optim.Optimizer, memory: Mapping[str, Tensor] | None = None
    ) -> None:
        self.recommender, self.optimizer = recommender, optimizer
        self.memory = dict(memory or {})
        """What else a training remembers from step to step, by name; restored in place."""
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best = {name: value.clone() for name, value in recommender.state_dict().items()}

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    def add(self, figures: dict[str, float]) -> None:
        """Takes an epoch's figures, and its weights where validation has never been better."""
        self.history.append(figures)
        best = self.history[self.best_epoch - 1]["ndcg"] if self.best_epoch else -1.0
        if figures.get("ndcg", -1.0) > best:
            self.best_epoch = self.epoch
            for name, value in self.recommender.state_dict().items():
                self.best[name].copy_(value)

    def finish(self, seconds: float) -> Trained:
        """Puts the best weights back and sums up."""
        self.recommender.load_state_dict(self.best)
        self.recommender.eval()
        best = self.history[self.best_epoch - 1]
        return Trained(
            epochs=self.epoch,
            best_epoch=self.best_epoch,
            ndcg=best["ndcg"],
            recall=best["recall"],
            seconds_per_epoch=seconds,
            history=tuple(self.history),
        )

    def save(self, path: Path) -> None:
        """Replaces the checkpoint at once."""
        groups = {"model": self.recommender.state_dict(), "best": self.best, "memory": self.memory,
                  "adam": adam_state(self.optimizer.state_dict()["state"])}  # fmt: skip
        write_checkpoint(path, groups, {"history": json.dumps(self.history), "best_epoch": str(self.best_epoch)})

    def load(self, path: Path) -> None:
        """Takes up a checkpoint: the next epoch runs as if nothing had happened."""
        groups, texts = read_checkpoint(path)
        self.history, self.best_epoch = json.loads(texts["history"]), int(texts["best_epoch"])
        self.recommender.load_state_dict({name: groups["model"][name] for name in self.best})
        for held, kept in ((self.best, groups["best"]), (self.memory, groups.get("memory", {}))):
            for name, value in held.items():
                value.copy_(kept[name])
        state = adam_from(groups.get("adam", {}))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
