"""`sequences`, `llm_embeddings`, the teacher -> a recommender: recommendation adaptation training (LLMEmb, section on RAT)."""

from __future__ import annotations

import dataclasses
import logging

import torch
import torch.nn.functional as F

from jobs.lake import artifacts
from jobs.lake.tensors import checkpoint_path, pick_device, progress_log
from jobs.rat import fuse, refit, rotation
from jobs.rat.config import Config as Config
from jobs.rat.config import Result as Result
from jobs.rat.make import fusion_of, item_config, make_aligner, make_items, training_of
from jobs.rat.read import Read, read_all
from jobs.rat.rotation import Rotation
from jobs.run import as_json
from models.behaviour.assembly import Material
from models.behaviour.fused import Part
from models.behaviour.llm_esr import Distiller, like_users
from models.behaviour.recommender import Recommender, build_sequence
from models.behaviour.training import Aligner, train
from models.processes import join, same_everywhere

log = logging.getLogger(__name__)

MODEL = "llmemb-recommender"


def run(config: Config) -> Result | refit.Result:
    """Trains a recommender to be judged, or the champion on all events."""
    return gated(config) if config.stage == "gated" else refit.run(config)


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
        log=progress_log("rat", config.training.epochs), candidates_M=read.counts_V.nonzero().flatten(),
        unseen=config.run.exclude_seen, aligner=aligner_of(config, read),
        distiller=make_distiller(config, read), checkpoint=checkpoint,
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


def fresh(config: Config, read: Read) -> Recommender:
    """The recommender before its first step."""
    torch.manual_seed(config.run.seed)
    return Recommender(
        make_items(config, read.white_NK, read.whitening.spread_K), build_sequence(config.backbone, config.adapter)
    )


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


def aligner_of(config: Config, read: Read) -> Aligner | None:
    """The alignment to the teacher; None without one."""
    if read.taught is None:
        return None
    return make_aligner(config, read.taught.table_VD, read.taught.known_V, read.catalogue, read.counts_V)


def make_distiller(config: Config, read: Read) -> Distiller | None:
    """LLM-ESR's self-distillation over users alike in what they read; None for other adapters."""
    if config.adapter != "llm_esr" or config.distil == 0:
        return None
    like_US = like_users(read.events, F.pad(read.white_NK, (0, 0, 1, 0)), config.like_users)
    return Distiller(read.events, like_US, config.backbone.width, config.distil)


def material(config: Config, recommender: Recommender, read: Read) -> Material:
    """What the parts are made of."""
    taught = read.taught if "collaborative" in config.fusion.parts else None
    llmemb = Part(
        name="llmemb", items=recommender.eval().items, sequence=recommender.sequence, backbone=config.backbone,
        config=item_config(config),
    )  # fmt: skip
    return Material(
        events=read.events, counts_V=read.counts_V, white_NK=read.white_NK, whitening=read.whitening,
        item_ids=read.catalogue.item_ids, llmemb=llmemb, teacher=None if taught is None else taught.model,
        teacher_VD=None if taught is None else taught.table_VD, unseen=config.run.exclude_seen, tried=fuse.counter(),
    )  # fmt: skip
