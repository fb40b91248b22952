"""`sequences`, `llm_embeddings` -> `bakeoff`: every system of LLMEmb's family and every floor, made and judged on one split.

It trains everything anew, for hours on a large catalogue, and changes nothing that serves. What doesn't pay is told too.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from jobs.engines.quantisers import quantised
from jobs.lake import manifests, partitions
from jobs.lake.tables import METRICS
from jobs.lake.tensors import (
    Catalogue,
    embeddings_digest,
    pick_device,
    read_catalogue,
    read_embeddings,
    read_histories,
    said_without_leaks,
    texts_of,
)
from jobs.run import InputError, Run
from models.behaviour.data import held_out, without_items
from models.judge import bakeoff
from models.judge.evaluation import SLICES, make_cases
from models.judge.family import CHAMPION, FAMILY
from models.judge.systems import Kit, Settings
from models.judge.text_floor import tfidf_table

log = logging.getLogger(__name__)
TABLE = dataclasses.replace(METRICS, name="bakeoff", grain="(model, slice, metric) of one bake-off")
PAPER_TAIL = 4
PARTS: tuple[Literal["test", "valid"], ...] = ("test", "valid")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which systems meet, and how finely they are told apart."""

    run: Run
    encoder: str = "latest"
    """The main encoder: an id, or `latest`, that of the newest `scft` run. Its texts must be embedded."""
    encoders: dict[str, str] = field(default_factory=dict)
    """Further encoders, NAME = ID: each gives `llmemb_NAME` and `fused_NAME` (zero-shot, other poolings, other objectives)."""
    systems: tuple[str, ...] = tuple(FAMILY)
    """Names of the systems that are compared; floors always are."""
    champion: str = CHAMPION
    """The model that all others are held against."""
    route_to: tuple[str, ...] = ("text", "graph", "repeat_markov_popularity")
    """Models that weak users are routed to, beside the champion."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Every system is made once with each of them."""
    cold_share: float = 0.1
    """Share of the items whose train events are left out, so that cold items can be ranked."""
    settings: Settings = field(default_factory=Settings)
    controls: bool = True
    """Also measures codes of product quantisation and residual k-means (by faiss)."""
    users_per_chunk: int = 4096
    """Users ranked at once, at most."""

    def __post_init__(self) -> None:
        if not self.systems or set(self.systems) - set(FAMILY):
            raise InputError(f"bakeoff.systems {list(self.systems)}: name some of {', '.join(FAMILY)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"bakeoff.seeds {list(self.seeds)} must name at least one seed, and each once")
        if not 0 <= self.cold_share < 1:
            raise InputError(f"bakeoff.cold_share {self.cold_share} is not in [0, 1): it is a share of the items")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The table, with what is held against the champion."""

    champion: str
    encoder_id: str
    models: tuple[dict[str, Any], ...]
    """Of each model: NDCG@10 overall, by seed, seconds of making it with all that it needs, bytes of an item, what it told."""
    values: dict[str, dict[str, dict[str, float]]]
    """By model, slice, metric; means over the seeds."""
    differences: tuple[dict[str, Any], ...]
    """The champion's NDCG@10 less every other model's, by slice; users and seeds are resampled together."""
    users: dict[str, int]
    """Of each slice."""
    routing: dict[str, Any]
    """Weak users under the champion, and what routing them brings, against a random router and the oracle."""
    seeds: tuple[int, ...]
    seconds: float
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Makes and judges all systems; replaces partition ds=DATE of `bakeoff`.

    Raises InputError or ValueError for embeddings that are missing, an empty graph, fewer items than a book has entries, or no
    event to validate or test on.
    """
    began, device = time.monotonic(), pick_device(config.run)
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    events = without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed)).to(device)
    encoder_id = manifests.latest(config.run, "scft")["encoder_id"] if config.encoder == "latest" else config.encoder
    llm = embedded(config, encoder_id, catalogue, device)
    floor_VD = tfidf_table(said_without_leaks(config.run, catalogue))
    test, valid = (make_cases(events, part, negatives=1, paper_tail=PAPER_TAIL, chunk=config.users_per_chunk,
                              seed=config.run.seed, unseen=config.run.exclude_seen) for part in PARTS)  # fmt: skip

    def kit(seed: int) -> Kit:
        return Kit(events, llm, catalogue.item_ids, config.settings, seed=seed, unseen=config.run.exclude_seen,
                   quantise=quantised if config.controls else None, text_V=texts_of(catalogue).to(device))  # fmt: skip

    floor_VD = None if floor_VD is None else floor_VD.to(device)
    found = bakeoff.held(kit, config.systems, config.seeds, test, valid, floor_VD)
    values, differences = bakeoff.compare_systems(found, test.slices_SC, config.champion, seed=config.run.seed)
    commit = partitions.write(config.run.lake, TABLE, f"ds={config.run.ds}", [metric_rows(values, test.slices_SC)])
    result = Result(
        champion=config.champion, encoder_id=encoder_id, models=tuple(bakeoff.rows(found, values)), values=values,
        differences=tuple(differences), users=dict(zip(SLICES, test.slices_SC.sum(1).tolist(), strict=True)),
        routing=bakeoff.routing(found, test, valid, config.route_to, config.champion), seeds=config.seeds,
        seconds=round(time.monotonic() - began, 1), device=str(device),
        inputs={"items": catalogue.digest, "sequences": digest, "encoder": encoder_id,
                "llm_embeddings": embeddings_digest(config.run, encoder_id)},
        outputs={"bakeoff": commit.digest}, rows={"bakeoff": commit.rows},
    )  # fmt: skip
    log.info("%s", "\n".join(bakeoff.table(result.models, values, differences, config.champion)))
    return result


def embedded(config: Config, encoder_id: str, catalogue: Catalogue, device: torch.device) -> dict[str, Tensor]:
    """llm_NE by the encoder's name, the main one first."""
    every = {"main": encoder_id, **config.encoders}
    return {name: read_embeddings(config.run, one, catalogue.content_hashes).float().to(device) for name, one in every.items()}


def metric_rows(values: dict[str, dict[str, dict[str, float]]], slices_GC: Tensor) -> pa.Table:
    """Rows of `bakeoff`."""
    users = dict(zip(SLICES, slices_GC.sum(1).tolist(), strict=True))
    found = [
        {"model": model, "slice": slice_, "metric": metric, "value": value, "low": None, "high": None, "n": users[slice_]}
        for model, by_slice in values.items()
        for slice_, figures in by_slice.items()
        for metric, value in figures.items()
    ]
    return pa.Table.from_pylist(found, TABLE.schema)
