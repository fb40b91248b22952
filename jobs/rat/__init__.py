"""`sequences`, `llm_embeddings`, the teacher -> a recommender: recommendation adaptation training (LLMEmb, section on RAT)."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.lake import artifacts, manifests
from jobs.lake.tensors import (
    Catalogue,
    checkpoint_path,
    embeddings_digest,
    pick_device,
    progress_log,
    read_catalogue,
    read_embeddings,
    read_histories,
)
from jobs.lake.tensors import texts_of as texts_of
from jobs.rat import fuse, refit, rotation
from jobs.rat.config import Config as Config
from jobs.rat.config import Result as Result
from jobs.rat.rotation import Goal, Rotation
from jobs.run import InputError, as_json
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion, Material
from models.behaviour.data import Histories, held_out, train_counts, without_items
from models.behaviour.fused import Part
from models.behaviour.items import Items, MlpAdapter, NullSpaceItems, ResidualItems, TextItems
from models.behaviour.llm_esr import Distiller, DualItems, like_users
from models.behaviour.recommender import LoadedRecommender, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import Whitening, fit_whitening
from models.processes import join, same_everywhere
from models.text.encoder import read_spec

log = logging.getLogger(__name__)

MODEL = "llmemb-recommender"
LEAST_WHITE = 32
"""Directions that whitening may keep of a catalogue however small."""


def run(config: Config) -> Result | refit.Result:
    """Trains a recommender to be judged, or the champion on all events."""
    return gated(config) if config.stage == "gated" else refit.run(config)


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a recommender is trained on."""

    encoder_id: str
    teacher_id: str
    catalogue: Catalogue
    goal: Goal | Rotation
    """What vectors are turned towards."""
    events: Histories
    counts_V: Tensor
    llm_NE: Tensor
    whitening: Whitening
    inputs: dict[str, str]


def gated(config: Config) -> Result:
    """Trains a recommender, keeps it in the lake and registers it.

    Raises InputError or ValueError for items without an embedding, a teacher of another kind, or nothing to train on.
    """
    device = pick_device(config.run)
    rank, _ = join()
    read = read_all(config, device)
    recommender, checkpoint = fresh(config, read), checkpoint_path("rat", config, read.inputs, config.run.lake)
    trained = train(
        recommender, read.events, training_of(config), max_len=config.backbone.max_len, seed=config.run.seed,
        log=progress_log("rat"), candidates_M=read.counts_V.nonzero().flatten(), unseen=config.run.exclude_seen,
        aligner=make_aligner(config, read.teacher_id, read.catalogue, read.counts_V),
        distiller=make_distiller(config, recommender.items, read.events), checkpoint=checkpoint,
    )  # fmt: skip
    recommender_id, turned, fused = "0" * 16, Rotation(note="another process tells"), fuse.Fused()
    if rank == 0:
        recommender_id, turned, fused = keep(config, read, recommender)
    recommender_id = same_everywhere(recommender_id, device)
    result = Result(
        recommender_id=recommender_id, encoder_id=read.encoder_id, teacher_id=read.teacher_id,
        explained_variance=read.whitening.explained, whitened_width=read.whitening.map_EK.shape[1], epochs=trained.epochs,
        best_epoch=trained.best_epoch, validation_ndcg=trained.ndcg, validation_recall=trained.recall,
        seconds_per_epoch=trained.seconds_per_epoch, device=str(device), model_version=None, history=trained.history,
        rotation=turned, fused=fused, inputs=read.inputs, outputs={"recommender": recommender_id},
        rows={"users": len(read.events.train_end_U), "items": read.events.catalogue, "train_events": int(read.counts_V.sum())},
    )  # fmt: skip
    if rank == 0:
        result = dataclasses.replace(result, model_version=register(config, result))
        checkpoint.unlink(missing_ok=True)
    return result


def read_all(config: Config, device: torch.device) -> Read:
    """Reads the lake. Raises InputError for an encoder that learned from items which are to be held out."""
    encoder_id, teacher_id = chosen(config)
    if config.cold_share and read_spec(artifacts.find(config.run.lake, "encoder", encoder_id)).from_users:
        raise InputError(f"encoder {encoder_id} learned from users' histories, also of items that rat.cold_share "
                         f"{config.cold_share} holds out: train one with training.pair_share and cluster_weight 0")  # fmt: skip
    catalogue = read_catalogue(config.run)
    goal = rotation.find(config.run, config.rotate_to, catalogue, config.backbone.width)
    events, digest = read_histories(config.run, catalogue.item_ids)
    events = without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed)).to(device)
    llm_NE = read_embeddings(config.run, encoder_id, catalogue.content_hashes).to(device)
    inputs = {
        "items": catalogue.digest, "sequences": digest, "encoder": encoder_id,
        "llm_embeddings": embeddings_digest(config.run, encoder_id), "teacher": teacher_id,
    }  # fmt: skip
    if isinstance(goal, Goal):
        inputs |= {"rotate_to": goal.to, "item_embeddings": goal.digest}
    return Read(
        encoder_id=encoder_id, teacher_id=teacher_id, catalogue=catalogue, goal=goal, events=events,
        counts_V=train_counts(events), llm_NE=llm_NE, inputs=inputs,
        whitening=fit_whitening(llm_NE, min(config.whitened_width, max(LEAST_WHITE, len(llm_NE) // 8))),
    )  # fmt: skip


def fresh(config: Config, read: Read) -> Recommender:
    """The recommender before its first step."""
    torch.manual_seed(config.run.seed)
    return Recommender(make_items(config, read.whitening, read.llm_NE), build_sequence(config.backbone, config.adapter))


def keep(config: Config, read: Read, recommender: Recommender) -> tuple[str, Rotation, fuse.Fused]:
    """Puts the parts together and keeps the artifact; its id, how it was turned, and what its parts are worth."""
    meta = {"encoder_id": read.encoder_id, "teacher_id": read.teacher_id, "cold_share": config.cold_share,
            "seed": config.run.seed, "ds": config.run.ds}  # fmt: skip
    given = material(config, recommender, read)
    staged = artifacts.stage(config.run.lake, "recommender")
    turned, fused = fuse.keep(staged, fusion_of(config), given, read.goal, meta)
    recommender_id = artifacts.keep(config.run.lake, "recommender", staged)
    log.info("%s", "\n".join([rotation.in_words(turned), *fuse.in_words(fused)]))
    return recommender_id, turned, fused


def register(config: Config, result: Result) -> str | None:
    """Logs the run and registers the recommender; the new version, or None without a registry."""
    if not config.run.tracking_uri:
        return None
    # MLflow takes seconds to load, and GPU workers may lack it
    from jobs.engines import registry

    known = as_json(result)
    params = {"recommender_id": result.recommender_id, "encoder_id": result.encoder_id, "config": as_json(config)}
    metrics = {name: value for name, value in known.items() if isinstance(value, float)}
    artifact = artifacts.find(config.run.lake, "recommender", result.recommender_id)
    return registry.log_run(
        config.run, "rat", params, metrics, artifact, MODEL, registry.RECOMMENDER_CODE, inputs=result.inputs, curve=result.history
    )


def chosen(config: Config) -> tuple[str, str]:
    """Ids of the encoder and the teacher (or "none")."""
    encoder_id, teacher_id = config.encoder, config.teacher
    if encoder_id == "latest":
        encoder_id = manifests.latest(config.run, "scft")["encoder_id"]
    if teacher_id == "latest":
        teacher_id = manifests.latest(config.run, "pretrain")["teacher_id"]
    return encoder_id, teacher_id


def make_items(config: Config, whitening: Whitening, llm_NE: Tensor) -> Items:
    """The item source of the configured adapter over the catalogue's whitened embeddings."""
    with torch.no_grad():
        white_NK = whitening(llm_NE)
    unit = config.training.cosine > 0
    if config.adapter == "null_space":
        return NullSpaceItems(white_NK, config.backbone.width, config.text_width, unit=unit)
    if config.adapter == "llm_esr":
        return DualItems(white_NK, config.hidden, config.backbone.width)
    adapter = MlpAdapter(white_NK.shape[1], config.hidden, config.backbone.width)
    if config.adapter == "residual":
        return ResidualItems(white_NK, adapter, config.backbone.width, config.drop_ids, unit=unit)
    return TextItems(white_NK, adapter, unit=unit)


def training_of(config: Config) -> Training:
    """The configured training. LLM-ESR is a baseline of dot products, as published."""
    return dataclasses.replace(config.training, cosine=0.0) if config.adapter == "llm_esr" else config.training


def make_distiller(config: Config, items: Items, events: Histories) -> Distiller | None:
    """LLM-ESR's self-distillation over users alike in what they read; None for other adapters."""
    if not isinstance(items, DualItems) or config.distil == 0:
        return None
    like_US = like_users(events, items.white_VK.to(events.items_N.device), config.like_users)
    return Distiller(events, like_US, config.backbone.width, config.distil)


def read_teacher(config: Config, teacher_id: str, catalogue: Catalogue, device: torch.device) -> tuple[LoadedRecommender, Tensor]:
    """The teacher and its table_VD in this catalogue's order; an item that it lacks has zeros.

    Raises InputError for a teacher of another backbone or trained on items held out here.
    """
    teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id), device)
    assert isinstance(teacher, LoadedRecommender)
    if (teacher.backbone.name, teacher.width) != (config.backbone.name, config.backbone.width):
        raise InputError(f"teacher {teacher_id} is a {teacher.backbone.name} of width {teacher.width}, rat.backbone is a "
                         f"{config.backbone.name} of width {config.backbone.width}: pretrain with the same backbone")  # fmt: skip
    if (teacher.meta["cold_share"], teacher.meta["seed"]) != (config.cold_share, config.run.seed) and config.cold_share:
        raise InputError(f"teacher {teacher_id} has seen items that rat.cold_share {config.cold_share} holds out: "
                         "pretrain with the same cold_share and seed")  # fmt: skip
    row_V = torch.tensor([0, *(teacher.row.get(item_id, 0) for item_id in catalogue.item_ids)], device=device)
    return teacher, teacher.table()[row_V]


def make_aligner(config: Config, teacher_id: str, catalogue: Catalogue, counts_V: Tensor) -> Aligner | None:
    """The alignment to the teacher's table; items that the teacher lacks weigh nothing."""
    if teacher_id == "none" or config.alpha == 0 or config.adapter == "llm_esr":
        return None
    teacher, teacher_VD = read_teacher(config, teacher_id, catalogue, counts_V.device)
    known_V = torch.tensor([False, *(item_id in teacher.row for item_id in catalogue.item_ids)], device=counts_V.device)
    weight_V = counts_V / (counts_V + config.popularity_prior).clamp_min(1e-9) * known_V
    text_V = texts_of(catalogue).to(counts_V.device)
    return Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=config.alpha, temperature=config.temperature, text_V=text_V)


def fusion_of(config: Config) -> Fusion:
    """The configured fusion. LLM-ESR is a baseline that stands alone."""
    return Fusion(parts=("llmemb",)) if config.adapter == "llm_esr" else config.fusion


def material(config: Config, recommender: Recommender, read: Read) -> Material:
    """What the parts are made of."""
    items: dict[str, object] = {"kind": config.adapter} | (
        {"text_width": config.text_width, "added": True} if config.adapter == "null_space" else {"hidden": config.hidden}
    )
    if config.adapter != "llm_esr" and config.training.cosine:
        items["unit"] = True
    teacher, teacher_VD = None, None
    if read.teacher_id != "none" and "collaborative" in config.fusion.parts and config.adapter != "llm_esr":
        teacher, teacher_VD = read_teacher(config, read.teacher_id, read.catalogue, read.counts_V.device)
    llmemb = Part(
        name="llmemb", items=recommender.eval().items, sequence=recommender.sequence, backbone=config.backbone, config=items
    )  # fmt: skip
    with torch.no_grad():
        white_NK = read.whitening(read.llm_NE)
    return Material(
        events=read.events, counts_V=read.counts_V, white_NK=white_NK, whitening=read.whitening, item_ids=read.catalogue.item_ids,
        llmemb=llmemb, teacher=teacher, teacher_VD=teacher_VD, unseen=config.run.exclude_seen,
        tried=fuse.counter(),
    )  # fmt: skip
