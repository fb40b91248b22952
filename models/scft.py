"""SCFT: fine-tunes an encoder's LoRA weights so that two views of an item meet and views of different items part.

Step s draws its items, views and dropout from (seed, s) alone, so a resumed run needs no sampler or generator state to go on
as if nothing had happened, and processes agree on a batch without a word.

Shapes: B items of a step, R rows (two views an item), Q queries, C candidates, E width.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from peft.helpers import disable_input_dtype_casting
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from models.contrastive import alike, backward, info_nce
from models.encoder import Encoder, embed, layers_of, load_lora, lora_state
from models.prompts import Ints, Prompts, Texts, prompts, take, views
from models.training import sum_gradients

Log = Callable[[dict[str, float], int], None]
HELD_OUT = 0.2
"""No more than this share of a small catalogue is kept for validation."""


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
    """On CUDA, compiles the model's layers."""
    validate_every: int = 250
    patience: int = 4
    """Validations without a better rank before training stops."""
    validation_items: int = 1000
    """Items kept out of training, at most, whose views are looked for among the catalogue."""
    candidates: int = 10_000
    """Items of the catalogue that are looked through, at most."""

    def __post_init__(self) -> None:
        if self.batch < 2:
            raise ValueError("batch = 1 has no negatives to learn from: give at least 2")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio = {self.ratio} must lie in [0, 1): a view never drops all attributes")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be positive; usual are 0.05 to 0.1")


@dataclass(frozen=True, kw_only=True)
class Gates:
    """When an encoder is refused (METHOD §1)."""

    mean_cosine: float = 0.98
    """Largest mean cosine between two different items: above it the space has collapsed."""
    effective_rank: float = 4.0
    """Smallest effective rank of the items' embeddings (Roy and Vetterli 2007); a quarter of the items in tiny catalogues."""
    moved: float = 1e-3
    """Smallest relative distance from the base model's embeddings."""
    recall_drop: float = 0.0
    """How much less often than the base model it may find held-out views; more than 0 is for small validation sets."""


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


# ------------------------------------------------------------------------------------------------------------ validation


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Held-out items' views, to be found among whole items of the catalogue."""

    view_a: Prompts
    view_b: Prompts
    candidates: Prompts
    target_Q: Ints
    """The candidate of each view's item."""
    items: Ints
    """The held-out items."""


def held_out(texts: Texts, config: Scft, limit: int, seed: int) -> tuple[Validation, Ints]:
    """The validation set, and the items left to train on; of items that read the same only the first counts.

    Raises ValueError where fewer than 4 different texts are left.
    """
    unique = np.unique(texts.text_I, return_index=True)[1]
    if len(unique) < 4:
        raise ValueError(f"the catalogue has {len(unique)} different texts: SCFT needs at least 4, and thousands to be of use")
    random = np.random.default_rng([seed, 0])
    order = random.permutation(unique)
    count = max(2, min(config.validation_items, int(len(unique) * HELD_OUT)))
    items, rest = np.sort(order[:count]), np.sort(order[count:])
    looked = np.concatenate([items, order[count : max(count, config.candidates)]])
    first, second = (views(texts, items, config.ratio, limit, random)[0] for _ in range(2))
    whole, _ = prompts(texts, looked, limit)
    return Validation(view_a=first, view_b=second, candidates=whole, target_Q=np.arange(count), items=items), rest


def validate(encoder: Encoder, validation: Validation) -> tuple[dict[str, float], NDArray[np.float32]]:
    """Figures of an encoder as it is, and its candidates' embeddings."""
    was = encoder.training
    encoder.eval()
    with precision(encoder):
        a_QE, b_QE, items_CE = (embed(encoder, part) for part in (validation.view_a, validation.view_b, validation.candidates))
    encoder.train(was)
    return figures(*map(torch.from_numpy, (a_QE, b_QE, items_CE, validation.target_Q))), items_CE


def figures(a_QE: Tensor, b_QE: Tensor, items_CE: Tensor, target_Q: Tensor) -> dict[str, float]:
    """Retrieval of view a's item, and the shape of the space; NaN where an embedding is not finite.

    alignment and uniformity: Wang and Isola 2020, arXiv 2005.10242; effective rank: Roy and Vetterli 2007.
    """
    a_QE, b_QE, items_CE = (F.normalize(emb.float(), dim=1) for emb in (a_QE, b_QE, items_CE))
    rank_Q = torch.cat(
        [ranks(a_QE[start : start + 512], items_CE, target_Q[start : start + 512]) for start in range(0, len(a_QE), 512)]
    )
    shape_NE = items_CE[torch.linspace(0, len(items_CE) - 1, min(2048, len(items_CE))).long()]
    cosine_NN = shape_NE @ shape_NE.T
    others = ~torch.eye(len(shape_NE), dtype=torch.bool)
    return {
        "recall_1": float((rank_Q <= 1).float().mean()),
        "recall_10": float((rank_Q <= 10).float().mean()),
        "mrr": float((1 / rank_Q).mean()),
        "alignment": float((a_QE - b_QE).square().sum(1).mean()),
        "uniformity": float((4 * cosine_NN[others] - 4).exp().mean().log()),
        "mean_cosine": float(cosine_NN[others].mean()),
        "effective_rank": effective_rank(shape_NE),
    }


def ranks(query_QE: Tensor, items_CE: Tensor, target_Q: Tensor) -> Tensor:
    """Expected rank_Q of each query's target under ties, 1 is best; NaN where a score is not finite."""
    scores_QC = query_QE @ items_CE.T
    own_Q1 = scores_QC.gather(1, target_Q[:, None])
    rank_Q = 1 + (scores_QC > own_Q1).sum(1) + ((scores_QC == own_Q1).sum(1) - 1) / 2
    return rank_Q.masked_fill(~scores_QC.isfinite().all(1), math.nan)


def effective_rank(emb_NE: Tensor) -> float:
    """exp of the entropy of the singular values' shares, after centring: how many directions the embeddings use."""
    if not bool(emb_NE.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(emb_NE - emb_NE.mean(0))
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def refusals(
    tuned: Mapping[str, float], base: Mapping[str, float], moved: float, gates: Gates, *, candidates: int, zero_shot: bool = False
) -> list[str]:
    """Why an encoder is refused, each with its figures; empty where it may go on.

    `moved` is the relative distance of its embeddings from the base model's.
    """
    if not all(map(math.isfinite, (*tuned.values(), moved))):
        return ["its embeddings are not finite"]
    wrong = []
    smallest = min(gates.effective_rank, candidates / 4)
    if tuned["mean_cosine"] > gates.mean_cosine:
        wrong.append(f"the space has collapsed: mean cosine {tuned['mean_cosine']:.4f} is above {gates.mean_cosine}")
    if tuned["effective_rank"] < smallest:
        wrong.append(f"the space has collapsed: effective rank {tuned['effective_rank']:.2f} is below {smallest:.2f}")
    if not zero_shot and moved < gates.moved:
        wrong.append(f"its embeddings are the base model's: relative distance {moved:.1e} is below {gates.moved}")
    if tuned["recall_1"] < base["recall_1"] - gates.recall_drop:
        wrong.append(f"it finds held-out views less often than the base model: {tuned['recall_1']:.4f} < {base['recall_1']:.4f}")
    return wrong


def distance(emb_CE: NDArray[np.float32], base_CE: NDArray[np.float32]) -> float:
    """Relative distance between two encoders' embeddings of the same texts."""
    return float(np.linalg.norm(emb_CE - base_CE) / max(float(np.linalg.norm(base_CE)), 1e-12))


# -------------------------------------------------------------------------------------------------------------- training


def train(
    encoder: Encoder,
    texts: Texts,
    config: Scft,
    *,
    seed: int,
    log: Log,
    checkpoint: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Tuned:
    """Fine-tunes the encoder's LoRA weights and leaves the best ones in it.

    `checkpoint` is a file that is written at each validation and when `stop` says so (then Interrupted is raised), and taken
    up where it exists. Under torch.distributed every process calls this with the same arguments.
    Raises ValueError for a loss that is not finite, a batch that the processes cannot share, or too few texts.
    """
    validation, items = held_out(texts, config, encoder.limit, seed)
    trainer = Trainer(encoder, texts, items, config, seed)
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


def precision(encoder: Encoder) -> AbstractContextManager[Any]:
    """bf16 arithmetic where the base is in bf16: LoRA weights stay in float32 and are cast as they are used."""
    half = next(encoder.model.parameters()).dtype == torch.bfloat16
    return torch.autocast(encoder.device.type, torch.bfloat16, enabled=half)


class Trainer:
    """LoRA weights, optimizer and the record of a fine-tuning."""

    def __init__(self, encoder: Encoder, texts: Texts, items: Ints, config: Scft, seed: int) -> None:
        self.encoder, self.texts, self.items, self.config, self.seed = encoder, texts, items, config, seed
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.batch = min(config.batch, len(items)) // self.world * self.world
        if self.batch < 2 or (config.batch % self.world and config.batch <= len(items)):
            raise ValueError(f"batch = {config.batch} can't be shared by {self.world} processes: give a multiple")
        self.weights = [p for p in encoder.model.parameters() if p.requires_grad]
        self.scale = torch.tensor(math.log(1 / config.temperature), device=encoder.device, requires_grad=config.learn_temperature)
        groups: list[dict[str, Any]] = [{"params": self.weights}, {"params": [self.scale], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.memory = Memory(encoder, config)
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

    def drawn(self) -> Ints:
        """Items of the step: the next ones of endless shuffled passes over the catalogue, so that no batch is odd."""
        places = np.arange(self.step * self.batch, (self.step + 1) * self.batch)
        passes = places // len(self.items)
        order = {number: np.random.default_rng([self.seed, 1, number]).permutation(self.items) for number in np.unique(passes)}
        return np.asarray([order[number][place % len(self.items)] for number, place in zip(passes, places, strict=True)])

    def train_step(self) -> float:
        """One optimizer step; returns the loss. Raises ValueError where it is not finite."""
        items = self.drawn()
        random = np.random.default_rng([self.seed, 2, self.step])
        rows, keys = views(self.texts, np.repeat(items, 2), self.config.ratio, self.encoder.limit, random)
        device = self.encoder.device
        text_B, a_B, b_B = (torch.from_numpy(x.copy()).to(device) for x in (self.texts.text_I[items], keys[::2], keys[1::2]))
        alike_BB = alike(text_B, a_B, b_B)
        share = len(items) // self.world * 2
        own = take(rows, np.arange(self.rank * share, (self.rank + 1) * share))

        def loss_of(all_RE: Tensor) -> Tensor:
            return info_nce(all_RE[0::2], all_RE[1::2], self.scale.exp(), alike_BB)

        self.encoder.train()
        loss = self.memory.fitting(partial(self.gradient, own, loss_of))
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {self.step + 1}: lower learning_rate or raise temperature")
        self.update()
        self.losses.append(loss)
        self.tokens_done += int(rows.length_B.sum())
        return loss

    def gradient(self, own: Prompts, loss_of: Callable[[Tensor], Tensor]) -> float:
        """Gradient of this process's rows, in micro-batches that fit; returns the loss of the whole batch."""
        self.optimizer.zero_grad(set_to_none=True)
        forwards = [partial(self.forward, part, number) for number, part in enumerate(self.memory.split(own))]
        return backward(forwards, loss_of)

    def forward(self, rows: Prompts, number: int) -> Tensor:
        """emb_RE of a micro-batch; its dropout is the same whenever it is called within a step."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, 3, self.step, self.rank, number]).generate_state(1)[0]))
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
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


class Memory:
    """How a step fits into the device: which layers are recomputed in the backward pass, and the size of micro-batches.

    Starts from an estimate. Where it was too bold, it recomputes more layers first (a third more time for all of them), then
    halves the micro-batches (one more forward).
    """

    def __init__(self, encoder: Encoder, config: Scft) -> None:
        self.device = encoder.device
        stack = layers_of(encoder.model)
        self.layers = len(stack)
        self.whole, self.kept = stored(encoder)
        self.fixed = config.tokens
        self.recomputed = 0
        self.halvings = 0
        compiled = config.compile and self.device.type == "cuda"
        if compiled:
            encoder.round_shapes()
        for number, layer in enumerate(stack):
            # one compiled layer serves all, as they share their code
            layer.forward = partial(self.run, number, torch.compile(layer.forward) if compiled else layer.forward)

    def run(self, number: int, forward: Callable[..., Any], *states: Any, **options: Any) -> Any:
        """A layer's forward, to be done again in the backward pass where its memory is needed."""
        if number < self.recomputed and torch.is_grad_enabled():
            return recompute(forward, *states, use_reentrant=False, **options)
        return forward(*states, **options)

    def room(self) -> float:
        """Bytes for activations."""
        if self.device.type != "cuda":
            return math.inf
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return 0.85 * (free - torch.cuda.memory_allocated(self.device))

    def split(self, rows: Prompts) -> list[Prompts]:
        """Micro-batches of whole items (two rows each), and the layers to recompute so that they fit."""
        room, total = self.room(), int(rows.length_B.sum())
        most = self.fixed or (total if math.isinf(room) else int(room / (self.layers * self.kept + self.whole)))
        most = max(1, most // 2**self.halvings)
        pairs = len(rows.length_B) // 2
        parts = min(pairs, -(-total // most))
        largest = -(-total // parts)
        if not math.isinf(room):
            spare = room - largest * self.layers * self.whole
            self.recomputed = max(self.recomputed, min(self.layers, math.ceil(-spare / (largest * (self.whole - self.kept)))))
        ends = np.linspace(0, pairs, parts + 1).astype(int)
        return [take(rows, np.arange(2 * start, 2 * end)) for start, end in pairwise(ends)]

    def fitting(self, attempt: Callable[[], float]) -> float:
        """Runs a step's gradient, more thriftily after each time that memory was too small for it."""
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError:
                if dist.is_initialized() or self.halvings > 6:
                    raise
                torch.cuda.empty_cache()
                if self.recomputed < self.layers:
                    self.recomputed = min(self.layers, self.recomputed + -(-self.layers // 4))
                else:
                    self.halvings += 1


def stored(encoder: Encoder) -> tuple[float, float]:
    """Bytes a token that one layer keeps for the backward pass, and those where it is recomputed.

    Counted in 16-bit states: inputs and outputs of norms, maps, LoRA dropout and attention, and the gated inner states.
    """
    config = encoder.config
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    return 2.0 * (18 * width + 7 * inner), 2.0 * width


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
