"""What an encoder is worth before anything is trained on it: ranks of validation events, beside its base model and others.

See models.judge.untrained. An encoder that is surely worse than its base would cost nights of GPU time for nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.lake.items import live_items
from jobs.lake.tensors import read_catalogue, read_histories
from jobs.progress import Progress
from jobs.run import InputError, Refused
from jobs.scft.config import Config
from models.behaviour.data import held_out, without_items
from models.judge import untrained
from models.judge.untrained import Trial, Worth
from models.processes import from_first
from models.text.embedding import embed, embed_together
from models.text.encoder import Encoder
from models.text.prompts import Attributes, prompts
from models.text.view_retrieval import CPU_TOKENS, evaluating

log = logging.getLogger(__name__)
CPU_ITEMS, GPU_ITEMS = 1_500, 50_000
"""Items of the sample: a minute of SmolLM2 on two cores, seconds on a GPU."""
NEW, BASE, BEFORE = "new", "base", "before"
Found = TypeVar("Found")


class Sample:
    """A trial and the texts of its items."""

    def __init__(self, trial: Trial, items: Sequence[Attributes]) -> None:
        self.trial, self.items = trial, items

    def embedded(self, encoder: Encoder, name: str) -> torch.Tensor:
        """llm_NE of the sample's items; progress is told under `name`. Raises ValueError for what isn't finite."""
        return finite(self.embedded_by(embed, encoder, name), name)

    def embedded_by(self, how: Callable[..., Found], encoder: Encoder, name: str) -> Found:
        """The sample's items as `embed`, or in all processes together as `embed_together`, embeds them."""
        texts = encoder.tokenize(self.items)
        whole, _ = prompts(texts, np.arange(len(texts)), encoder.limit)
        budget = CPU_TOKENS if encoder.device.type == "cpu" else 0
        with Progress(log, f"worth of {name}", len(texts)) as shown, evaluating(encoder):
            return how(encoder, whole, budget=budget, log=lambda done, _: shown.add(done))

    def ndcg(self, encoder: Encoder) -> float:
        """NDCG@10 over all the trial's cases, the same in all processes; each embeds its share, and all must call this.

        Raises ValueError for embeddings that aren't finite.
        """
        name = "the weights of now"
        emb_NE = self.embedded_by(embed_together, encoder, name)

        def judged() -> bytes:
            assert emb_NE is not None
            return str(float(untrained.untrained_ndcg(self.trial, finite(emb_NE, name)).mean())).encode()

        return float(from_first(judged))


def finite(emb_NE: NDArray[np.float32], name: str) -> torch.Tensor:
    """Embeddings as a tensor. Raises ValueError, with whose they are, where one isn't finite."""
    broken = int((~np.isfinite(emb_NE).all(axis=1)).sum())
    if broken:
        raise ValueError(f"embeddings of {name} are not finite ({broken} of {len(emb_NE)} texts): lower "
                         "scft.training.learning_rate, or take another base")  # fmt: skip
    return torch.from_numpy(emb_NE)


def sample_of(config: Config, snapshot: str, device: torch.device) -> Sample | str:
    """The sample that the lake's newest sequences give; or why there is none."""
    try:
        catalogue = read_catalogue(config.run)
        events, _ = read_histories(config.run, catalogue.item_ids)
        events = without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed))
        limit = config.worth_items or (CPU_ITEMS if device.type == "cpu" else GPU_ITEMS)
        trial = untrained.draw(events, limit, config.run.seed)
    except (InputError, ValueError) as error:
        return str(error)
    wanted = {catalogue.item_ids[row]: place for place, row in enumerate(trial.rows_N.tolist())}
    items: list[Attributes] = [[] for _ in wanted]
    for batch in live_items(config.run.lake, snapshot, ("item_id", "attributes")):
        for row in batch.to_pylist():
            if (place := wanted.get(row["item_id"])) is not None:
                items[place] = [(entry["name"], entry["value"]) for entry in row["attributes"]]
    return Sample(trial, items)


def measure_encoders(config: Config, sample: Sample | str, encoders: dict[str, Callable[[], Encoder]]) -> dict[str, Any]:
    """The encoder NEW beside the others, each loaded only while it embeds: verdict, why, figures and differences.

    Raises Refused where the new one is surely worse than its base, or with accept = "better" isn't surely better, or where its
    embeddings aren't finite. The one before decides nothing: where it can't be had, the log says so.
    """
    if isinstance(sample, str):
        return unknown(config, f"not told: {sample}")
    emb = {}
    for name, load in encoders.items():
        try:
            emb[name] = sample.embedded(load(), {NEW: "the new encoder", BASE: "its base", BEFORE: "the one before"}[name])
        except ValueError as error:
            if name == NEW:
                raise Refused(f"the encoder is refused: {error}") from error
            if name != BEFORE:
                raise
            log.warning("the encoder before is left out of the comparison: %s", error)
    worth = untrained.weigh(sample.trial, emb, config.run.seed)
    if worth.users < untrained.FEWEST:
        return unknown(config, f"not told: {worth.users} users have a validation event, {untrained.FEWEST} are needed", worth)
    said = untrained.verdict(worth, f"{NEW} - {BASE}")
    why = difference_text(worth, f"{NEW} - {BASE}", config)
    log.info("without any training, the encoder ranks %s than its base: %s",
             {"better": "better", "worse": "worse"}.get(said, "no differently"), why)  # fmt: skip
    if said == "worse" or (said != "better" and config.accept == "better"):
        beside = "worse" if said == "worse" else "not surely better"
        raise Refused(
            f"the encoder is refused: ranking validation events without any training, it is {beside} than its base: {why}; "
            "train it otherwise (docs/own-llm.md), or use the base as it is: scft.training.steps = 0"
        )
    return as_result(said, why, worth)


def unknown(config: Config, why: str, worth: Worth | None = None) -> dict[str, Any]:
    """The result where nothing can be told. Raises Refused where the recipe takes only what is better."""
    log.warning("what the encoder is worth is %s", why)
    if config.accept == "better":
        raise Refused(f'the encoder is refused: scft.accept = "better", and what it is worth is {why}')
    return as_result("unknown", why, worth)


def check_kept(config: Config, kept: Mapping[str, Any]) -> None:
    """Raises Refused where the encoder in use is not known to be better than its base, and the recipe now takes only such."""
    worth = kept.get("worth") or {}
    if config.accept == "better" and worth.get("verdict") in ("no different", "unknown"):
        raise Refused(
            f'the encoder in use, {kept["encoder_id"]}, is refused: scft.accept = "better", and beside its base it is '
            f"{worth['verdict']}: {worth.get('why')}; train it otherwise, or set scft.training.steps = 0"
        )


def as_result(said: str, why: str, worth: Worth | None) -> dict[str, Any]:
    """The manifest's form: JSON has no NaN."""
    if worth is None:
        return {"verdict": said, "why": why}
    less = {pair: {key: [None if math.isnan(x) else round(x, 5) for x in ends] for key, ends in rows.items()}
            for pair, rows in worth.less.items()}  # fmt: skip
    ndcg = {name: {key: round(value, 5) for key, value in rows.items()} for name, rows in worth.ndcg.items()}
    return {"verdict": said, "why": why, "users": worth.users, "ndcg": ndcg, "less": less}


def difference_text(worth: Worth, pair: str, config: Config) -> str:
    """A pair's differences as one line."""
    parts = [
        f"{key} {value:+.4f} " + ("(too few users to tell)" if math.isnan(low) else f"[{low:+.4f}, {high:+.4f}]")
        for key, (value, low, high) in worth.less[pair].items()
    ]
    unasked = config.training.reads_teacher and "cold" in worth.less[pair]
    note = " (cold items are held out of the teacher only where pretrain.cold_share is scft.cold_share)" if unasked else ""
    return f"NDCG@10 {', '.join(parts)} over {worth.users} users{note}"
