"""`items` -> an encoder: an LLM's LoRA weights, fine-tuned until two views of an item meet (SCFT), judged, kept, registered."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from jobs.lake import partitions
from jobs.lake.tables import ITEMS
from jobs.lake.tensors import checkpoint_path, pick_device
from jobs.scft.config import Config as Config
from jobs.scft.judge import keep
from jobs.scft.refresh import due, recipe_digest
from jobs.scft.signals import read_signals
from jobs.scft.texts import read_texts, warn_of_short
from jobs.scft.tuning import build, sized, tune
from jobs.scft.worth import Sample, check_kept, sample_of
from models.processes import join, same_everywhere
from models.text.encoder import of_base
from models.text.lora import update_norm
from models.text.scft import Tuned
from models.text.scft_batches import shuffle_texts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The encoder and what it is worth."""

    encoder_id: str
    due: bool
    """Whether it was trained in this run; otherwise it is the one in use before."""
    reason: str
    """Why it was due, or why not."""
    trained_ds: str
    snapshot: str
    """Partition of `items` that it was trained on."""
    recipe_digest: str
    """Digest of the settings that shape it."""
    figures: dict[str, float]
    """Held-out views found among the catalogue (recall_1, recall_10, mrr), alignment, uniformity, mean_cosine, effective_rank."""
    base_figures: dict[str, float]
    """The same for the base model."""
    moved: float
    """Relative distance of its embeddings from the base model's."""
    update_norm: float
    """Norm of ΔW."""
    temperature: float
    steps: int
    best_step: int
    losses: tuple[float, ...]
    history: tuple[dict[str, float], ...]
    """Figures of each validation, by step."""
    tokens_per_second: float
    empty: int
    """Texts in which nothing is known of the item."""
    version: str | None
    """Version in the model registry."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
    worth: dict[str, Any] = field(default_factory=dict)
    """What it foretells without any training on top, beside its base model and the encoder in use before: `verdict` (better,
    no different, unknown, base), `why`, and NDCG@10 with differences by slice. Empty where an older manifest does not tell."""
    device: str = ""
    """That it was trained on; empty where an older manifest does not tell."""


def run(config: Config) -> Result:
    """Fine-tunes an encoder if one is due, refuses it if it is not better than none, keeps and registers it.

    Raises InputError or ValueError for too few texts, a blocked field or a base model that does not fit; Refused with the
    figures when a gate of METHOD §1 fails, also where the one in use is not what `accept` now asks for.
    """
    snapshot = partitions.latest(config.run.lake, ITEMS.name, config.run.ds)
    reason, previous = due(config, snapshot)
    if previous is not None:
        log.info("not due: %s", reason)
        check_kept(config, previous)
        return Result(**{**previous, "due": False, "reason": reason})
    log.info("due: %s", reason)
    return Result(
        **trained(config, snapshot),
        due=True,
        reason=reason,
        snapshot=snapshot,
        trained_ds=config.run.ds,
        recipe_digest=recipe_digest(config),
    )


def trained(config: Config, snapshot: str) -> dict[str, Any]:
    """Trains, judges and keeps an encoder; the Result's fields that come of it."""
    device = pick_device(config.run)
    rank, _ = join()
    item_ids, hashes, items = read_texts(config, snapshot)
    load = cache(partial(build, config, device))
    # before the base is loaded: what is missing is told in seconds
    signals, learned_from = read_signals(config, load, item_ids, hashes, items)
    encoder = load()
    texts = encoder.tokenize(shuffle_texts(items, config.run.seed) if config.shuffle_texts else items)
    warn_of_short(config, texts)
    inputs = {"items": partitions.read_commit(config.run.lake, ITEMS.name, snapshot).digest, "base": encoder.spec.base_sha256}
    inputs |= learned_from
    training, tuned = sized(config, device), None
    sample: Sample | str = "nothing was trained"
    checkpoint = checkpoint_path("scft", config, inputs, config.run.lake)
    if training.steps or encoder.spec != of_base(encoder.spec):
        sample = sample_of(config, snapshot, device)
    if training.steps:
        tuned = tune(encoder, texts, training, config.run.seed, signals, checkpoint, sample)
    if rank == 0:
        facts = keep(config, encoder, texts, training, tuned, inputs, sample)
        checkpoint.unlink(missing_ok=True)
    else:
        facts = {"encoder_id": "0" * 16, "figures": {}, "base_figures": {}, "moved": 0.0, "version": None, "worth": {}}
    facts["encoder_id"] = same_everywhere(facts["encoder_id"], device)
    common = {"empty": texts.empty, "device": str(device), "inputs": inputs, "rows": {"texts": len(texts)}}
    return facts | course(config, tuned, facts) | common | {"outputs": {"encoder": facts["encoder_id"]}}


def course(config: Config, tuned: Tuned | None, facts: dict[str, Any]) -> dict[str, Any]:
    """The Result's fields that tell how the training went; of none where there was none."""
    if tuned is None:
        return {"update_norm": 0.0, "temperature": config.training.temperature, "steps": 0, "best_step": 0, "losses": (),
                "history": (facts["base_figures"],), "tokens_per_second": 0.0}  # fmt: skip
    return {
        "update_norm": update_norm(tuned.learned),
        "temperature": tuned.temperature,
        "steps": tuned.steps,
        "best_step": tuned.best_step,
        "losses": tuned.losses[:: max(1, len(tuned.losses) // 500)],
        "history": tuned.history,
        "tokens_per_second": tuned.tokens_per_second,
    }
