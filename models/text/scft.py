"""SCFT: fine-tunes an encoder's LoRA weights so that two views of an item meet and views of different items part.

Step s draws its items, views and dropout from (seed, s) alone, so a resumed run needs no sampler or generator state to go on
as if nothing had happened, and processes agree on a batch without a word.

Shapes: B items of a step, R rows (two views an item), Q queries, C candidates, E width.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.processes import sum_gradients
from models.text import fp8
from models.text.contrastive import alike, backward, info_nce
from models.text.encoder import Encoder, layers_of, load_lora, lora_state
from models.text.lora import Seeds
from models.text.memory import Memory
from models.text.packing import there
from models.text.prompts import Ints, Prompts, Texts, take, views
from models.text.view_retrieval import held_out, precision, validate

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True)
class Scft:
    """How an encoder is fine-tuned (METHOD §1)."""

    steps: int = 4000
    """At most; 0 keeps the base model as it is (zero-shot)."""
    batch: int = 512
    """Items of a step over all GPUs: each is told from all others."""
    ratio: float = 0.4
    """Share of an item's attributes that a view drops, on average; never all."""
    temperature: float = 0.05
    learn_temperature: bool = False
    """Trains the temperature too, from `temperature` on."""
    learning_rate: float = 2e-4
    warm_up: float = 0.05
    """Share of the steps over which the learning rate rises; then it falls along a cosine to a tenth."""
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient."""
    tokens: int = 0
    """Tokens of a micro-batch on one GPU; 0 asks the memory. Smaller ones cost a second forward, never exactness."""
    compile: bool = True
    """On CUDA, compiles the model's layers: worth its minute or two of start in all but short trainings."""
    fp8: bool = False
    """Multiplies with the frozen weights in 8 bits (NVIDIA GPUs of compute capability 8.9 or later); the gates judge in full."""
    validate_every: int = 250
    patience: int = 4
    """Validations without a better rank before training stops."""
    validation_items: int = 1000
    """Items kept out of training, at most, whose views are looked for among the catalogue."""
    candidates: int = 10_000
    """Items of the catalogue that are looked through, at most."""
    cluster_weight: float = 0.0
    """Weight of the second signal: telling from an item's text in which of the teacher's clusters it lies (P2Rec, 2406.00333)."""
    pair_share: float = 0.0
    """Share of a step's items that meet a view of another item, one that users took right before or after it, instead of a second
    one of their own (as NoteLLM pairs notes, 2403.01744)."""

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ValueError("batch = 1 has no negatives to learn from: give at least 2")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio = {self.ratio} must lie in [0, 1): a view never drops all attributes")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive; usual are 0.05 to 0.1")
        if self.cluster_weight < 0:
            raise ValueError(f"cluster_weight = {self.cluster_weight} must be at least 0, which leaves the clusters out")
        if not 0 <= self.pair_share <= 1:
            raise ValueError(f"pair_share = {self.pair_share} must lie in [0, 1]; 0 leaves the users out")


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What training gave."""

    lora: dict[str, Tensor] = field(repr=False)
    """The best LoRA weights by PEFT's names."""
    steps: int
    best_step: int
    losses: tuple[float, ...]
    history: tuple[dict[str, float], ...]
    """Figures of each validation, the base model's first (step 0)."""
    temperature: float
    tokens_per_second: float


class Interrupted(Exception):
    """Training was told to stop and saved its state."""


# -------------------------------------------------------------------------------------------------------------- training


def train(
    encoder: Encoder,
    texts: Texts,
    config: Scft,
    *,
    seed: int,
    log: Log,
    cluster_I: Ints | None = None,
    pair_P2: Ints | None = None,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Fine-tunes the encoder's LoRA weights and leaves the best ones in it.

    `cluster_I`, wanted where config.cluster_weight is not 0, is the number of each item's cluster, -1 where it has none;
    `pair_P2`, wanted where config.pair_share is not 0, are items that users took one after the other.

    `checkpoint` is a file that is written at each validation and when `stop` says so (then Interrupted is raised), and taken
    up where it exists. Under torch.distributed every process calls this with the same arguments.
    Raises ValueError for a loss that is not finite, a batch that the processes cannot share, or too few texts.
    """
    validation, items = held_out(texts, config, encoder.limit, seed)
    trainer = Trainer(encoder, texts, items, config, seed, cluster_I, pair_P2)
    if checkpoint and checkpoint.exists():
        trainer.load(checkpoint)
    else:
        trainer.add(validate(encoder, validation)[0], log)
    started, done = time.monotonic(), trainer.tokens_done
    with disable_input_dtype_casting(encoder.model):
        while trainer.step < config.steps and not trainer.stale():
            loss = trainer.train_step()
            log({"loss": loss, "learning_rate": trainer.rate(), "tokens_per_s": speed(trainer, started, done)}, trainer.step)
            due = trainer.step % config.validate_every == 0 or trainer.step == config.steps
            if due:
                trainer.add(validate(encoder, validation)[0], log)
            halt = stop()
            if checkpoint and (due or halt):
                trainer.save(checkpoint)
            if halt:
                raise Interrupted(f"stopped after step {trainer.step} of {config.steps}; run again to go on from there")
    return trainer.finish(speed(trainer, started, done))


def speed(trainer: Trainer, started: float, done: int) -> float:
    """Tokens a second since `started`."""
    return (trainer.tokens_done - done) / max(time.monotonic() - started, 1e-9)


@dataclass(frozen=True)
class Drawn:
    """What a step learns from: items, whose views they meet, the views, and the views' keys."""

    step: int
    items: Ints
    partners: Ints
    rows: Prompts
    keys: Ints


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
        pair_P2: Ints | None = None,
    ) -> None:
        self.encoder, self.texts, self.items, self.config, self.seed = encoder, texts, items, config, seed
        if config.fp8:
            fp8.convert(encoder.model, trained_through=True)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.batch = min(config.batch, len(items)) // self.world * self.world
        if self.batch < 2 or (config.batch % self.world and config.batch <= len(items)):
            raise ValueError(f"batch = {config.batch} can't be shared by {self.world} processes: give a multiple")
        self.weights = [p for p in encoder.model.parameters() if p.requires_grad]
        self.scale = torch.tensor(math.log(1 / config.temperature), device=encoder.device, requires_grad=config.learn_temperature)
        self.cluster_I = cluster_I if config.cluster_weight else None
        if config.cluster_weight and cluster_I is None:
            raise ValueError("cluster_weight needs the teacher's clusters: none were given")
        self.head = cluster_head(encoder, self.cluster_I)
        if config.pair_share and pair_P2 is None:
            raise ValueError("pair_share needs the items that users took one after the other: none were given")
        self.partners = Partners(pair_P2, items, len(texts)) if config.pair_share and pair_P2 is not None else None
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

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def rate(self) -> float:
        """The learning rate of the step at hand."""
        warm = max(1, int(self.config.warm_up * self.config.steps))
        if self.step < warm:
            return self.config.learning_rate * (self.step + 1) / warm
        share = (self.step - warm) / max(1, self.config.steps - warm)
        return self.config.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * min(share, 1.0))) / 2)

    def draw(self, step: int) -> Drawn:
        """Items of a step, the next ones of endless shuffled passes so that no batch is odd, and two views of each."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        passes = places // len(self.items)
        order = {number: np.random.default_rng([self.seed, 1, number]).permutation(self.items) for number in np.unique(passes)}
        items = np.asarray([order[number][place % len(self.items)] for number, place in zip(passes, places, strict=True)])
        partners = items
        if self.partners:
            partners = self.partners.draw(items, self.config.pair_share, np.random.default_rng([self.seed, 5, step]))
        both = np.stack([items, partners], axis=1).ravel()
        rows, keys = views(self.texts, both, self.config.ratio, self.encoder.limit, np.random.default_rng([self.seed, 2, step]))
        return Drawn(step, items, partners, rows, keys)

    def train_step(self) -> float:
        """One optimizer step; returns the loss. Raises ValueError where it is not finite."""
        drawn = self.ready if self.ready and self.ready.step == self.step else self.draw(self.step)
        items, device = drawn.items, self.encoder.device
        texts = self.texts.text_I[items], self.texts.text_I[drawn.partners]
        alike_BB = alike(*(there(x, device) for x in (*texts, drawn.keys[::2], drawn.keys[1::2])))
        share = len(items) // self.world * 2
        own = take(drawn.rows, np.arange(self.rank * share, (self.rank + 1) * share))

        def loss_of(all_RE: Tensor) -> Tensor:
            return info_nce(all_RE[0::2], all_RE[1::2], self.scale.exp(), alike_BB) + self.cluster_loss(all_RE, drawn)

        if not self.encoder.training:
            self.encoder.train()
        tell = self.memory.fitting(partial(self.gradient, own, loss_of))
        self.update()
        # a GPU still works on the gradient, and goes on with the next step without a pause
        self.ready = self.draw(self.step + 1)
        loss = tell()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step + 1}: lower learning_rate or raise temperature")
        self.losses.append(loss)
        self.tokens_done += int(drawn.rows.length_B.sum())
        return loss

    def cluster_loss(self, all_RE: Tensor, drawn: Drawn) -> Tensor | float:
        """The second signal over a batch's views, weighed; every process computes it whole, as it does the first."""
        if self.cluster_I is None:
            return 0.0
        both = np.stack([drawn.items, drawn.partners], axis=1).ravel()
        label_R = there(self.cluster_I[both], all_RE.device)
        logits_RK = self.scale.exp().detach() * F.linear(F.normalize(all_RE, dim=1), *self.head)
        loss = F.cross_entropy(logits_RK, label_R, ignore_index=-1, reduction="sum")
        return self.config.cluster_weight * loss / (label_R >= 0).sum().clamp_min(1)

    def gradient(self, own: Prompts, loss_of: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        """Gradient of this process's rows, in micro-batches that fit; returns what tells the loss of the whole batch."""
        self.optimizer.zero_grad(set_to_none=True)
        forwards = [partial(self.forward, part, number) for number, part in enumerate(self.memory.split(own))]
        return backward(forwards, loss_of)

    def forward(self, rows: Prompts, number: int) -> Tensor:
        """emb_RE of a micro-batch; its dropout is the same whenever it is called within a step."""
        seed = int(np.random.SeedSequence([self.seed, 3, self.step, self.rank, number]).generate_state(1)[0])
        torch.manual_seed(seed)
        self.seeds.set(seed)
        with precision(self.encoder):
            emb_RE: Tensor = self.encoder(self.encoder.step(rows))
        return emb_RE

    def update(self) -> None:
        """Sums the processes' gradients, clips and steps."""
        if self.world > 1:
            sum_gradients(self.weights)
        nn.utils.clip_grad_norm_(self.weights, self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()

    def add(self, quality: dict[str, float], log: Log) -> None:
        """Takes a validation's figures; keeps the weights where no held-out view was ever found better."""
        best = max((entry["mrr"] for entry in self.history[1:]), default=-math.inf)
        self.history.append({"step": float(self.step), **quality})
        if self.step and quality["mrr"] > best:
            self.best, self.best_step = lora_state(self.encoder.model), self.step
        log({f"validation_{name}": value for name, value in quality.items()}, self.step)

    def stale(self) -> bool:
        """Whether validation has stopped improving."""
        later = [entry for entry in self.history[1:] if entry["step"] > self.best_step]
        return len(later) >= self.config.patience

    def finish(self, tokens_per_second: float) -> Tuned:
        """Puts the best weights back and sums up."""
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
        """Replaces the checkpoint at once (the first process does)."""
        if self.rank:
            return
        tensors = {f"lora.{name}": value for name, value in lora_state(self.encoder.model).items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()} | {"scale": self.scale.detach()}
        tensors |= {f"head.{number}": value.detach() for number, value in enumerate(self.head)}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
        known = {"losses": self.losses, "history": self.history, "best_step": self.best_step, "tokens": self.tokens_done}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".aside")
        save_file({name: value.cpu().clone() for name, value in tensors.items()}, aside, metadata={"known": json.dumps(known)})
        aside.replace(path)

    def load(self, path: Path) -> None:
        """Takes up a checkpoint: the next step runs as if nothing had happened."""
        with safe_open(path, framework="pt") as file:
            known = json.loads(file.metadata()["known"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.losses, self.history = known["losses"], known["history"]
        self.best_step, self.tokens_done = known["best_step"], known["tokens"]
        self.best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        state = {name.removeprefix("lora."): value for name, value in tensors.items() if name.startswith("lora.")}
        load_lora(self.encoder.model, state)
        with torch.no_grad():
            self.scale.copy_(tensors["scale"])
            for number, value in enumerate(self.head):
                value.copy_(tensors[f"head.{number}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class Partners:
    """For every item the items that users took right before or after it, as often as they did."""

    def __init__(self, pair_P2: Ints, items: Ints, catalogue: int) -> None:
        trained_I = np.zeros(catalogue, dtype=bool)
        trained_I[items] = True
        pair_P2 = pair_P2[trained_I[pair_P2].all(axis=1)]
        one_P, self.other_P = np.concatenate([pair_P2, pair_P2[:, ::-1]]).T
        order = np.argsort(one_P, kind="stable")
        self.other_P, self.count_I = self.other_P[order], np.bincount(one_P, minlength=catalogue)
        self.start_I = self.count_I.cumsum() - self.count_I

    def draw(self, items: Ints, share: float, random: np.random.Generator) -> Ints:
        """A partner for a share of the items; the others, and those that have none, get themselves."""
        place_B, drawn_B = random.random((2, len(items)))
        count_B = self.count_I[items]
        met_B = (drawn_B < share) & (count_B > 0)
        result = items.copy()
        result[met_B] = self.other_P[(self.start_I[items] + place_B * count_B).astype(np.int64)[met_B]]
        return result


def cluster_head(encoder: Encoder, cluster_I: Ints | None) -> list[Tensor]:
    """Weight and bias of a linear map from embeddings to clusters: only training needs it, no artifact holds it."""
    if cluster_I is None:
        return []
    shape = (int(cluster_I.max(initial=0)) + 1, encoder.spec.width)
    weight = torch.zeros(shape, device=encoder.device, requires_grad=True)
    return [weight, torch.zeros(shape[0], device=encoder.device, requires_grad=True)]


def shuffled(items: Sequence[Sequence[tuple[str, str]]], seed: int) -> list[list[tuple[str, str]]]:
    """A control: every attribute's values are dealt out anew over the items, so that texts say nothing true (METHOD §3)."""
    random = np.random.default_rng([seed, 4])
    result = [list(attributes) for attributes in items]
    places: dict[str, list[tuple[int, int]]] = {}
    for row, attributes in enumerate(items):
        for column, (name, _) in enumerate(attributes):
            places.setdefault(name, []).append((row, column))
    for name, where in places.items():
        for (row, column), source in zip(where, random.permutation(len(where)), strict=True):
            result[row][column] = (name, items[where[source][0]][where[source][1]][1])
    return result
