"""Texts -> LoRA weights: the base model built, trained, and watched meanwhile."""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jobs.progress import Progress
from jobs.scft.config import Config
from jobs.scft.worth import Sample
from models.text.base_model import base_sha256, load_base, tokenizer_sha256
from models.text.encoder import Encoder, Spec
from models.text.lora import add_lora
from models.text.objectives import Signals
from models.text.prompts import Texts
from models.text.scft import Interrupted, Scft, Tuned, fine_tune
from models.text.view_retrieval import HELD_OUT

log = logging.getLogger(__name__)
CPU_HELD_OUT, CPU_CANDIDATES = 200, 1_000
"""Held-out items and candidates of a validation on a CPU: a minute or two of SmolLM2 with AVX2."""


def build(config: Config, device: torch.device) -> Encoder:
    """The base model with untrained LoRA weights, its embeddings still the base model's; or with untrained suffix tokens."""
    model, tokenizer, folder = load_base(config.base, device=device, layers=config.layers, four_bit=config.four_bit)
    torch.manual_seed(config.run.seed)
    spec = Spec(
        base=config.base,
        base_sha256=base_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        policy=config.policy,
        lora=config.lora if config.training.steps and not config.suffix_tokens else None,
        pooling=config.pooling,
        layers=config.layers,
        max_tokens=config.max_tokens,
        width=model.config.hidden_size,
        from_users=config.training.from_users,
        attention=config.attention,
        suffix_tokens=config.suffix_tokens,
    )
    return Encoder(add_lora(model, spec.lora) if spec.lora else model, tokenizer, spec)


def sized(config: Config, device: torch.device) -> Scft:
    """The training's settings with a validation that suits the device; the same wherever the recipe says `full`."""
    training = config.training
    if device.type != "cpu" or config.validation == "full":
        return training
    held_out, candidates = min(training.validation_items, CPU_HELD_OUT), min(training.candidates, CPU_CANDIDATES)
    if (held_out, candidates) != (training.validation_items, training.candidates):
        log.info("on a CPU %d held-out items are looked for among %s candidates: scft.validation = \"full\" takes all that "
                 "scft.training names", held_out, f"{candidates:,}")  # fmt: skip
    return dataclasses.replace(training, validation_items=held_out, candidates=candidates)


def tune(
    encoder: Encoder,
    texts: Texts,
    training: Scft,
    seed: int,
    signals: Signals,
    checkpoint: Path,
    sample: Sample | str,
) -> Tuned:
    """Trains; SIGTERM saves and leaves with status 143. What users teach is validated by what it foretells."""
    worth = sample.ndcg if not isinstance(sample, str) and (training.from_users or training.whiten) else None
    with terminated() as stop, watched(encoder, validation_size(texts, training)):
        try:
            return fine_tune(encoder, texts, training, seed=seed, log=progress(training.steps), signals=signals,
                         checkpoint=checkpoint, stop=stop, worth=worth)  # fmt: skip
        except Interrupted as error:
            log.info("%s", error)
            raise SystemExit(143) from error


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM has come, instead of dying of it."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


def validation_size(texts: Texts, training: Scft) -> int:
    """Prompts of one validation: two views of each held-out item, and the candidates."""
    different = len(set(texts.text_I.tolist()))
    held_out = max(2, min(training.validation_items, int(different * HELD_OUT)))
    return 2 * held_out + max(held_out, min(training.candidates, different))


@contextmanager
def watched(encoder: Encoder, total: int) -> Iterator[None]:
    """Tells how far a validation is: prompts that the encoder embeds while it isn't training, `total` in each."""
    with Progress(log, "validation", total, rounds=True) as shown:

        def count(module: torch.nn.Module, _: Any, emb: torch.Tensor) -> None:
            if not module.training:
                shown.add(len(emb))

        hook = encoder.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def progress(steps: int) -> Callable[[dict[str, float], int], None]:
    """A `log(metrics, step)`: validations at once, losses at most every five seconds, with the seconds to go."""
    began, first, last = time.monotonic(), -1, -5.0

    def log_step(metrics: dict[str, float], step: int) -> None:
        nonlocal first, last
        first = step if first < 0 else first
        if "loss" not in metrics or time.monotonic() - last >= 5 or step == steps:
            last = time.monotonic()
            left = (steps - step) * (last - began) / max(step - first, 1)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            log.info("step %d/%d  %s%s", step, steps, shown, f"  {left:,.0f} s to go at most" if step > first else "")

    return log_step
