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
from torch import Tensor, nn

from models.checkpoint import adam_from, adam_state, read_checkpoint, write_checkpoint
from models.processes import any_process, from_first, sum_gradients
from models.text import fp8
from models.text.base_model import layers_of
from models.text.contrastive import backward, info_nce, read_later, same_text_mask
from models.text.encoder import Encoder, learned_state, load_learned
from models.text.lora_dropout import Seeds
from models.text.memory import Memory
from models.text.moments import Moments
from models.text.objectives import Heads, Signals
from models.text.packing import to_device
from models.text.prompts import Ints, Prompts, Texts, take
from models.text.scft_batches import Drawn, batches_of, often
from models.text.scft_settings import Scft as Scft
from models.text.users import DrawnUsers, prompt_of, user_prompts
from models.text.view_retrieval import Validation, autocast_like_base, hold_out_views, validate_together

Log = Callable[[dict[str, float], int], None]
NONE = Signals()
USERS = 1 << 20
"""Number of the users' first micro-batch, behind those of all items."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The result of a training."""

    learned: dict[str, Tensor] = field(repr=False)
    """The best LoRA weights by PEFT's names, or suffix tokens."""
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
    signals: Signals = NONE,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    worth: Callable[[Encoder], float] | None = None,
) -> Tuned:
    """An encoder with untrained LoRA weights or suffix tokens, and a catalogue -> the best ones, also left in the encoder.

    `signals` are what else there is to learn from; each is needed where the settings weigh it.
    `worth` says what an encoder is good for; the best weights are those of its highest value, without it those of the best mrr.
    All processes call it together, and it gives all of them the same.
    `checkpoint` is a file. It is written at each validation and when `stop` returns true; then Interrupted is raised. Where it
    exists, training goes on from it. Under torch.distributed every process calls this with the same arguments.
    Raises ValueError for a loss that is not finite, a batch that the processes cannot share, or too few texts.
    """
    validation, items = hold_out_views(texts, config, encoder.limit, seed)
    trainer = Trainer(encoder, texts, items, config, seed, signals, worth)
    # the first process decides for all: another one may not see its file
    if state := from_first(lambda: checkpoint.read_bytes() if checkpoint and checkpoint.exists() else b""):
        trainer.load(state)
    else:
        trainer.heads.fit(encoder, texts, items, seed)
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
        signals: Signals = NONE,
        worth: Callable[[Encoder], float] | None = None,
    ) -> None:
        self.encoder, self.texts, self.config, self.seed, self.worth = encoder, texts, config, seed, worth
        if config.fp8:
            fp8.convert(encoder.model, trained_through=True)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.heads = Heads(encoder, config, signals)
        self.batches = batches_of(texts, items, signals.pairs, config, encoder.limit, seed, self.world)
        self.user_head, room = prompt_of(encoder)
        self.user_prompts = None
        if config.reads_users and signals.users is not None:
            cluster_I = signals.cluster_I if config.user_weight else None
            self.user_prompts = user_prompts(signals.users, config, self.batches.size, room, seed, self.world, cluster_I)
        self.often_I = often(self.batches, len(texts), config)
        self.moments = Moments(encoder, texts, seed) if config.whiten else None
        self.weights = [p for p in encoder.parameters() if p.requires_grad]
        self.scale = torch.tensor(math.log(1 / config.temperature), device=encoder.device, requires_grad=config.learn_temperature)
        heads = list(self.heads.learned.values())
        groups: list[dict[str, Any]] = [{"params": self.weights}, {"params": [self.scale, *heads], "weight_decay": 0.0}]
        fused = encoder.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
        self.seeds = Seeds(layers_of(encoder.model), encoder.device)
        self.ready: tuple[Drawn, DrawnUsers | None] | None = None
        """The next step's batch."""
        self.memory = Memory(encoder, tokens=config.tokens, compiled=config.compile)
        self.losses: list[float] = []
        self.history: list[dict[str, float]] = []
        self.best, self.best_step, self.tokens_done = learned_state(encoder), 0, 0

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
        drawn, users = self.ready if self.ready and self.ready[0].step == self.step else self.draw(self.step)
        texts = self.texts.text_I[drawn.items], self.texts.text_I[drawn.partners]
        same_BB = same_text_mask(*(to_device(x, self.encoder.device) for x in (*texts, drawn.keys[::2], drawn.keys[1::2])))
        share = len(drawn.items) // self.world * 2
        own = take(drawn.rows, np.arange(self.rank * share, (self.rank + 1) * share))

        often_B = None if self.often_I is None else to_device(self.often_I[drawn.partners], self.encoder.device)
        if self.moments and self.step % self.config.whiten_every == 0:
            self.moments.take()

        def loss_of(all_RE: Tensor) -> Tensor:
            view_RE = self.moments.whiten(all_RE) if self.moments else all_RE
            weight, loss = self.config.contrast_weight, all_RE.new_zeros(())
            if weight:
                loss = weight * info_nce(view_RE[0::2], view_RE[1::2], self.scale.exp(), same_BB, often_B)
            both_R = np.stack([drawn.items, drawn.partners], axis=1).ravel()
            return loss + self.heads.item_loss(all_RE, both_R, self.scale.exp().detach()) if self.heads.told_of_items else loss

        if not self.encoder.training:
            self.encoder.train()
        read_loss = self.memory.run_fitting(partial(self.gradient, own, loss_of, users))
        self.update()
        # the GPU still works on the gradient: the next batch is drawn meanwhile
        self.ready = self.draw(self.step + 1)
        loss = read_loss()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step + 1}: lower learning_rate or raise temperature")
        self.losses.append(loss)
        self.tokens_done += int(drawn.rows.length_B.sum()) + (int(users.rows.length_B.sum()) if users else 0)
        return loss

    def draw(self, step: int) -> tuple[Drawn, DrawnUsers | None]:
        """A step's items and users."""
        return self.batches.draw(step), self.user_prompts.draw(step) if self.user_prompts else None

    def gradient(self, own: Prompts, loss_of: Callable[[Tensor], Tensor], users: DrawnUsers | None = None) -> Callable[[], float]:
        """Computes the gradient of this process's rows, in micro-batches that fit -> a function that reads the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        if users is None:
            return self.item_gradient(own, loss_of)
        of_users = self.user_gradient(users)
        if not (self.config.contrast_weight or self.heads.told_of_items):
            return of_users
        of_items = self.item_gradient(own, loss_of)
        return lambda: of_items() + of_users()

    def item_gradient(self, own: Prompts, loss_of: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        """The part of the items."""
        parts = enumerate(self.memory.split(own))
        return backward([partial(self.forward, take(own, rows), number) for number, rows in parts], loss_of)

    def user_gradient(self, users: DrawnUsers) -> Callable[[], float]:
        """The part of the users: their losses are sums over users, so each micro-batch goes by itself."""
        count = len(users.context_B) // self.world
        own = users.some(np.arange(self.rank * count, (self.rank + 1) * count))
        known = max(1, int((users.share_BK.sum(1) > 0).sum()))
        tokens = max(1, int(users.rows.length_B.sum() - users.context_B.sum()))
        total = torch.zeros((), device=self.encoder.device)
        for number, rows in enumerate(self.memory.split(own.rows, each=1)):
            part = own.some(rows)
            self.seed_dropout(USERS + number)
            with autocast_like_base(self.encoder):
                step = self.encoder.step(part.rows, self.user_head)
                hidden_TE = self.encoder.states(step)
            clusters, titles = self.heads.user_loss(hidden_TE, step, part, self.scale.exp().detach())
            loss = self.config.user_weight * clusters / known + self.config.title_weight * titles / tokens
            torch.autograd.backward(loss)
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        return read_later(total)

    def forward(self, rows: Prompts, number: int) -> Tensor:
        """A micro-batch -> its emb_RE. Within a step its dropout is always the same."""
        self.seed_dropout(number)
        with autocast_like_base(self.encoder):
            emb_RE: Tensor = self.encoder(self.encoder.step(rows))
        return emb_RE

    def seed_dropout(self, number: int) -> None:
        """Sets the masks of a micro-batch by its number."""
        seed = int(np.random.SeedSequence([self.seed, 3, self.step, self.rank, number]).generate_state(1)[0])
        torch.manual_seed(seed)
        self.seeds.set(seed)

    def update(self) -> None:
        """Sums the gradients over processes, clips them, and takes an optimizer step."""
        if self.world > 1:
            sum_gradients([*self.weights, *self.heads.shared_out])
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
            by = "worth"
            quality[by] = self.worth(self.encoder)
        best = max((entry[by] for entry in self.history[1:]), default=-math.inf)
        self.history.append({"step": float(self.step), **quality})
        if self.step and quality[by] > best:
            self.best, self.best_step = learned_state(self.encoder), self.step
        log({f"validation_{name}": value for name, value in quality.items()}, self.step)

    def stale(self) -> bool:
        """Whether the last config.patience validations brought nothing better."""
        later = [entry for entry in self.history[1:] if entry["step"] > self.best_step]
        return len(later) >= self.config.patience

    def finish(self, tokens_per_second: float) -> Tuned:
        """Puts the best weights into the encoder -> the result."""
        load_learned(self.encoder, self.best)
        self.encoder.eval()
        return Tuned(
            learned=self.best,
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
        groups: dict[str, dict[Any, Tensor]] = {"learned": {**learned_state(self.encoder)}, "best": {**self.best}}
        groups |= {"scale": {"": self.scale.detach()}, "heads": {**self.heads.state()}}
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
        load_learned(self.encoder, groups["learned"])
        self.heads.load(groups.get("heads", {}))
        with torch.no_grad():
            self.scale.copy_(groups["scale"][""])
        if self.moments:
            self.moments.load(groups["moments"])
        state = adam_from(groups.get("adam", {}))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def speedometer(trainer: Trainer) -> Callable[[], float]:
    """A function that gives the tokens a second from now on."""
    started, done = time.monotonic(), trainer.tokens_done
    return lambda: (trainer.tokens_done - done) / max(time.monotonic() - started, 1e-9)
