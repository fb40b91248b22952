"""`sequences` -> the collaborative teacher: an ID-only SRS trained on train rows alone, or their graph, untrained."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.lake import artifacts
from jobs.lake.tensors import checkpoint_path, pick_device, progress_log, read_catalogue, read_histories
from jobs.run import InputError, Run, as_json
from models.behaviour.artifact import save_recommender
from models.behaviour.data import Histories, held_out, train_counts, without_items
from models.behaviour.graph import FADE, graph_recommender
from models.behaviour.items import IdItems
from models.behaviour.progress import Trained, make_validation, validate
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.behaviour.training import Training, train
from models.processes import join, same_everywhere


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the teacher is trained. Give `rat` the same backbone: it aligns to a teacher of its own kind only."""

    run: Run
    backbone: Backbone = field(default_factory=Backbone)
    training: Training = field(default_factory=Training)
    view: Literal["trained", "graph"] = "trained"
    """`trained`: an ID-only SRS; `graph`: random vectors spread over the graph of users and items (ELMRec), untrained, read by a
    fading mean. `rat` aligns to either."""
    cold_share: float = 0.0
    """Share of the items whose train events are left out, so that `evaluate` can rank them as cold; 0 in production."""

    def __post_init__(self) -> None:
        if not 0 <= self.cold_share < 1:
            raise InputError(f"pretrain.cold_share {self.cold_share} is not in [0, 1): it is a share of the items")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The teacher and how good it became."""

    teacher_id: str
    epochs: int
    best_epoch: int
    validation_ndcg: float
    """NDCG@10 of the best epoch, full ranking, over the last validation event of each user."""
    validation_recall: float
    seconds_per_epoch: float
    device: str
    history: tuple[dict[str, float], ...]
    """Of each epoch: loss, and ndcg and recall where it was validated."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Trains the teacher and keeps it in the lake.

    Raises InputError or ValueError for items or sequences that are missing, or nothing to train or validate on.
    """
    device = pick_device(config.run)
    rank, _ = join()
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    events = without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed)).to(device)
    counts_V = train_counts(events)
    inputs = {"items": catalogue.digest, "sequences": digest}
    checkpoint = checkpoint_path("pretrain", config, inputs, config.run.lake)
    teacher, trained = spread(config, events) if config.view == "graph" else trained_teacher(config, events, counts_V, checkpoint)
    teacher_id = keep(config, teacher, catalogue.item_ids) if rank == 0 else "0" * 16
    teacher_id = same_everywhere(teacher_id, device)
    if rank == 0:
        checkpoint.unlink(missing_ok=True)
    result = Result(
        teacher_id=teacher_id,
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        validation_ndcg=trained.ndcg,
        validation_recall=trained.recall,
        seconds_per_epoch=trained.seconds_per_epoch,
        device=str(device),
        history=trained.history,
        inputs=inputs,
        outputs={"teacher": teacher_id},
        rows={"users": len(events.train_end_U), "items": events.catalogue, "train_events": int(counts_V.sum())},
    )
    if rank == 0:
        record(config, result)
    return result


def trained_teacher(config: Config, events: Histories, counts_V: torch.Tensor, checkpoint: Path) -> tuple[Recommender, Trained]:
    """The ID-only SRS, trained."""
    torch.manual_seed(config.run.seed)
    teacher = Recommender(IdItems(events.catalogue + 1, config.backbone.width), build_sequence(config.backbone))
    trained = train(
        teacher, events, config.training, max_len=config.backbone.max_len, seed=config.run.seed,
        log=progress_log("pretrain", config.training.epochs), checkpoint=checkpoint, candidates_M=counts_V.nonzero().flatten(),
        unseen=config.run.exclude_seen,
    )  # fmt: skip
    return teacher, trained


def spread(config: Config, events: Histories) -> tuple[Recommender, Trained]:
    """The graph of users and items as a teacher, and what it is worth by itself."""
    teacher = graph_recommender(events, config.backbone, config.run.seed)
    among_M = train_counts(events).nonzero().flatten()
    asked = make_validation(events, among_M, config.training.validation_users, config.backbone.max_len, config.run.exclude_seen)
    figures = validate(teacher, asked, nullcontext)
    return teacher, Trained(epochs=0, best_epoch=0, seconds_per_epoch=0.0, history=(), **figures)


def keep(config: Config, teacher: Recommender, item_ids: tuple[str, ...]) -> str:
    """Keeps the teacher's weights in the lake and returns their id."""
    staged = artifacts.stage(config.run.lake, "teacher")
    meta: dict[str, Any] = {"cold_share": config.cold_share, "seed": config.run.seed, "ds": config.run.ds}
    if config.view == "graph":
        meta["fading"] = FADE
    save_recommender(staged, teacher, item_ids=item_ids, backbone=config.backbone, items={"kind": "id"}, meta=meta)
    return artifacts.keep(config.run.lake, "teacher", staged)


def record(config: Config, result: Result) -> None:
    """The training as a run of MLflow, where there is one: its curve by epoch."""
    if not config.run.tracking_uri:
        return
    # MLflow takes seconds to load, and GPU workers may lack it
    from jobs.engines import registry

    metrics = {"validation_ndcg": result.validation_ndcg, "validation_recall": result.validation_recall}
    params = {"teacher_id": result.teacher_id, "config": as_json(config)}
    registry.log_run(config.run, "pretrain", params, metrics, inputs=result.inputs, curve=result.history)
