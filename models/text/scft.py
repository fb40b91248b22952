"""SCFT: fine-tunes an encoder's LoRA weights, so that two views of an item get near embeddings, and views of others far ones.

A step draws its items, views and dropout from (seed, step) alone: a resumed training goes on as if nothing had happened.

Shapes: B items of a step, R rows (two views an item), E width, K clusters, P pairs of items, I items of the catalogue.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoint import adam_from, adam_state, read_checkpoint, write_checkpoint
from models.processes import any_process, from_first, sum_gradients
from models.text import fp8
from models.text.base_model import layers_of
from models.text.contrastive import backward, cluster_head, info_nce, same_text_mask
from models.text.encoder import Encoder
from models.text.lora import load_lora, lora_state
from models.text.lora_dropout import Seeds
from models.text.memory import Memory
from models.text.moments import Moments
from models.text.packing import to_device
from models.text.prompts import Ints, Prompts, Texts, take
from models.text.scft_batches import Batches, Drawn, Pairs, Partners, often
from models.text.scft_settings import Scft as Scft
from models.text.view_retrieval import Validation, autocast_like_base, evaluating, hold_out_views, validate_together

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of a training."""

    lora: dict[str, Tensor] = field(repr=False)
    """The best LoRA weights by PEFT's names."""
    steps: int
    best_step: int
    losses: tuple[float, ...]
    history: tuple[dict[str, float], ...]
    """Figures of each validation. The first are the base model's (step 0)."""
    temperature: float
    tokens_per_second: float


class Interrupted(Exception):
    """Training was told to stop and saved its state."""


# -------------------------------------------------------------------------------------------------------------- training


def fine_tune(
    encoder: Encoder,
    texts: Texts,
    config: Scft,
    *,
    seed: int,
    log: Log,
    cluster_I: Ints | None = None,
    pairs: Pairs | None = None,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    worth: Callable[[Encoder], float] | None = None,
) -> Tuned:
    """An encoder with untrained LoRA weights, and a catalogue -> the best weights, which are also left in the encoder.

    `cluster_I` is the number of each item's cluster, -1 where it has none; needed where config.cluster_weight is not 0.
    `pairs` are items that users took one after the other; needed where config.pair_share is not 0.
    `worth` says what an encoder is good for; the best weights are those of its highest value, without it those of the best mrr.
    `checkpoint` is a file. It is written at each validation and when `stop` returns true; then Interrupted is raised. Where it
    exists, training goes on from it. Under torch.distributed every process calls this with the same arguments.
    Raises ValueError for a loss that is not finite, a batch that the processes cannot share, or too few texts.
    """
    validation, items = hold_out_views(texts, config, encoder.limit, seed)
    trainer = Trainer(encoder, texts, items, config, seed, cluster_I, pairs, worth)
    # the first process decides for all: another one may not see its file
    if state := from_first(lambda: checkpoint.read_bytes() if checkpoint and checkpoint.exists() else b""):
        trainer.load(state)
    else:
        trainer.validate(validation, log)
    from peft.helpers import disable_input_dtype_casting  # takes seconds: only where something is trained

    with disable_input_dtype_casting(encoder.model):
        return run_steps(trainer, validation, log, checkpoint, stop)


def run_steps(trainer: Trainer, validation: Validation, log: Log, checkpoint: Path | None, stop: Callable[[], bool]) -> Tuned:
    """The steps that are left, with their validations and checkpoints. Raises Interrupted."""
    config, speed = trainer.config, speedometer(trainer)
    while trainer.step < config.steps and not trainer.stale():
        loss = trainer.train_step()
        log({"loss": loss, "learning_rate": trainer.rate(), "tokens_per_s": speed()}, trainer.step)
        if due := trainer.step % config.validate_every == 0 or trainer.step == config.steps:
            trainer.validate(validation, log)
        halt = any_process(stop())  # one that stopped alone would leave the others waiting
        if checkpoint and (due or halt):
            trainer.save(checkpoint)
        if halt:
            raise Interrupted(f"stopped after step {trainer.step} of {config.steps}; run again to go on from there")
    return trainer.finish(speed())


class Trainer:
    """LoRA weights, optimizer and the record of a fine-tuning."""

    def __init__(
        self,
        encoder: Encoder,
        texts: Texts,
        items: Ints,
        config: Scft,
        seed: int,
        cluster_I: Ints | None = None,
        pairs: Pairs | None = None,
        worth: Callable[[Encoder], float] | None = None,
    ) -> None:
        if config.cluster_weight and cluster_I is None:
            raise ValueError("cluster_weight needs the teacher's clusters: none were given")
        if config.pair_share and pairs is None:
            raise ValueError("pair_share needs the items that users took one after the other: none were given")
        self.encoder, self.texts, self.config, self.seed, self.worth = encoder, texts, config, seed, worth
        if config.fp8:
            fp8.convert(encoder.model, trained_through=True)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.batches = self.batches_of(items, pairs if config.pair_share else None)
        self.often_I = often(self.batches, len(texts), config)
        self.moments = Moments(encoder, texts, seed) if config.whiten else None
        self.weights = [p for p in encoder.model.parameters() if p.requires_grad]
        self.scale = torch.tensor(math.log(1 / config.temperature), device=encoder.device, requires_grad=config.learn_temperature)
        self.cluster_I = cluster_I if config.cluster_weight else None
        self.head = cluster_head(self.cluster_I, encoder.spec.width, encoder.device)
        groups: list[dict[str, Any]] = [{"params": self.weights}, {"params": [self.scale, *self.head], "weight_decay": 0.0}]
        fused = encoder.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
        self.seeds = Seeds(layers_of(encoder.model), encoder.device)
        self.ready: Drawn | None = None
        """The next step's batch."""
        self.memory = Memory(encoder, tokens=config.tokens, compiled=config.compile)
        self.losses: list[float] = []
        self.history: list[dict[str, float]] = []
        self.best, self.best_step, self.tokens_done = lora_state(encoder.model), 0, 0

    def batches_of(self, items: Ints, pairs: Pairs | None) -> Batches:
        """Items to train on, and pairs -> what draws the batches.

        Raises ValueError for a batch that processes cannot share, or where no pair is left.
        """
        config, world = self.config, self.world
        size = min(config.batch, len(items)) // world * world
        if size < 2 or (config.batch % world and config.batch <= len(items)):
            raise ValueError(f"batch = {config.batch} cannot be shared by {world} processes: give a multiple of {world}")
        partners = Partners(pairs.pair_P2, items, self.texts.text_I, pairs.user_P, config.pair_support) if pairs else None
        if partners is not None and not len(partners):
            raise ValueError(f"no pair of items to train on was taken by {config.pair_support} users: lower pair_support, or set "
                             "pair_share to 0")  # fmt: skip
        return Batches(
            texts=self.texts,
            items=items,
            size=size,
            ratio=config.ratio,
            limit=self.encoder.limit,
            seed=self.seed,
            partners=partners,
            pair_share=config.pair_share,
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def rate(self) -> float:
        """The learning rate of the next step."""
        warm = max(1, int(self.config.warm_up * self.config.steps))
        if self.step < warm:
            return self.config.learning_rate * (self.step + 1) / warm
        share = (self.step - warm) / max(1, self.config.steps - warm)
        return self.config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * min(share, 1.0))) / 2)

    def train_step(self) -> float:
        """One optimizer step; returns the loss. Raises ValueError where it is not finite."""
        drawn = self.ready if self.ready and self.ready.step == self.step else self.batches.draw(self.step)
        texts = self.texts.text_I[drawn.items], self.texts.text_I[drawn.partners]
        same_BB = same_text_mask(*(to_device(x, self.encoder.device) for x in (*texts, drawn.keys[::2], drawn.keys[1::2])))
        share = len(drawn.items) // self.world * 2
        own = take(drawn.rows, np.arange(self.rank * share, (self.rank + 1) * share))

        often_B = None if self.often_I is None else to_device(self.often_I[drawn.partners], self.encoder.device)
        if self.moments and self.step % self.config.whiten_every == 0:
            self.moments.take()

        def loss_of(all_RE: Tensor) -> Tensor:
            view_RE = self.moments.whiten(all_RE) if self.moments else all_RE
            return info_nce(view_RE[0::2], view_RE[1::2], self.scale.exp(), same_BB, often_B) + self.cluster_loss(all_RE, drawn)

        if not self.encoder.training:
            self.encoder.train()
        read_loss = self.memory.run_fitting(partial(self.gradient, own, loss_of))
        self.update()
        # the GPU still works on the gradient: the next batch is drawn meanwhile
        self.ready = self.batches.draw(self.step + 1)
        loss = read_loss()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step + 1}: lower learning_rate or raise temperature")
        self.losses.append(loss)
        self.tokens_done += int(drawn.rows.length_B.sum())
        return loss

    def cluster_loss(self, all_RE: Tensor, drawn: Drawn) -> Tensor | float:
        """The second loss of all processes' views, times its weight. Each process computes it for the whole batch."""
        if self.cluster_I is None:
            return 0.0
        both = np.stack([drawn.items, drawn.partners], axis=1).ravel()
        label_R = to_device(self.cluster_I[both], all_RE.device)
        logits_RK = self.scale.exp().detach() * F.linear(F.normalize(all_RE, dim=1), *self.head)
        loss = F.cross_entropy(logits_RK, label_R, ignore_index=-1, reduction="sum")
        return self.config.cluster_weight * loss / (label_R >= 0).sum().clamp_min(1)

    def gradient(self, own: Prompts, loss_of: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        """Computes the gradient of this process's rows, in micro-batches that fit -> a function that reads the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        forwards = [partial(self.forward, part, number) for number, part in enumerate(self.memory.split(own))]
        return backward(forwards, loss_of)

    def forward(self, rows: Prompts, number: int) -> Tensor:
        """A micro-batch -> its emb_RE. Within a step its dropout is always the same."""
        seed = int(np.random.SeedSequence([self.seed, 3, self.step, self.rank, number]).generate_state(1)[0])
        torch.manual_seed(seed)
        self.seeds.set(seed)
        with autocast_like_base(self.encoder):
            emb_RE: Tensor = self.encoder(self.encoder.step(rows))
        return emb_RE

    def update(self) -> None:
        """Sums the gradients over processes, clips them, and takes an optimizer step."""
        if self.world > 1:
            sum_gradients(self.weights)
        nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()

    def validate(self, validation: Validation, log: Log) -> None:
        """Records the figures of a validation. Keeps the weights if they are worth most so far, or without `worth` by mrr."""
        quality = validate_together(
            self.encoder, validation, lambda done, total: log({"validated": float(done), "prompts": float(total)}, self.step)
        )
        by = "mrr"
        if self.worth is not None:
            by, value = "worth", partial(self.worth, self.encoder)
            with evaluating(self.encoder):
                quality[by] = float(from_first(lambda: str(value()).encode()))
        best = max((entry[by] for entry in self.history[1:]), default=-math.inf)
        self.history.append({"step": float(self.step), **quality})
        if self.step and quality[by] > best:
            self.best, self.best_step = lora_state(self.encoder.model), self.step
        log({f"validation_{name}": value for name, value in quality.items()}, self.step)

    def stale(self) -> bool:
        """Whether the last config.patience validations brought nothing better."""
        later = [entry for entry in self.history[1:] if entry["step"] > self.best_step]
        return len(later) >= self.config.patience

    def finish(self, tokens_per_second: float) -> Tuned:
        """Puts the best weights into the encoder -> the result."""
        load_lora(self.encoder.model, self.best)
        self.encoder.eval()
        return Tuned(
            lora=self.best,
            steps=self.step,
            best_step=self.best_step,
            losses=tuple(self.losses),
            history=tuple(self.history),
            temperature=float(torch.exp(-self.scale.detach())),
            tokens_per_second=tokens_per_second,
        )

    def save(self, path: Path) -> None:
        """Replaces the checkpoint at once. Only the first process does."""
        if self.rank:
            return
        groups: dict[str, dict[Any, Tensor]] = {"lora": {**lora_state(self.encoder.model)}, "best": {**self.best}}
        groups |= {"scale": {"": self.scale.detach()}, "head": {n: value.detach() for n, value in enumerate(self.head)}}
        groups["adam"] = adam_state(self.optimizer.state_dict()["state"])
        if self.moments:
            groups["moments"] = self.moments.state()
        known = {"losses": self.losses, "history": self.history, "best_step": self.best_step, "tokens": self.tokens_done}
        write_checkpoint(path, groups, {"known": json.dumps(known)})

    def load(self, content: bytes) -> None:
        """Restores a checkpoint file's content: the next step runs as if training had never stopped."""
        groups, texts = read_checkpoint(content)
        known = json.loads(texts["known"])
        self.losses, self.history = known["losses"], known["history"]
        self.best_step, self.tokens_done = known["best_step"], known["tokens"]
        self.best = groups["best"]
        load_lora(self.encoder.model, groups["lora"])
        with torch.no_grad():
            self.scale.copy_(groups["scale"][""])
            for number, value in enumerate(self.head):
                value.copy_(groups["head"][str(number)])
        if self.moments:
            self.moments.load(groups["moments"])
        state = adam_from(groups.get("adam", {}))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def speedometer(trainer: Trainer) -> Callable[[], float]:
    """A function that gives the tokens a second from now on."""
    started, done = time.monotonic(), trainer.tokens_done
    return lambda: (trainer.tokens_done - done) / max(time.monotonic() - started, 1e-9)
