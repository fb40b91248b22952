"""The lake -> what a recommender is trained on: histories, whitened embeddings, the teacher, and what vectors are turned towards.

Shapes: N items, V items + 1 (row 0 is padding), K whitened width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.lake import artifacts, manifests
from jobs.lake.tensors import Catalogue, embeddings_digest, read_catalogue, read_embeddings, read_histories
from jobs.rat import rotation
from jobs.rat.config import Config
from jobs.rat.rotation import Goal, Rotation
from jobs.run import InputError
from models.behaviour.artifact import load_recommender
from models.behaviour.data import Histories, held_out, train_counts, without_items
from models.behaviour.recommender import LoadedRecommender
from models.behaviour.whitening import Whitening, fit_whitening

LEAST_WHITE = 32
"""Directions that whitening may keep of a catalogue however small."""


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The teacher, in the catalogue's order."""

    model: LoadedRecommender
    table_VD: Tensor
    """Its item vectors; an item that it lacks has zeros."""
    known_V: Tensor
    """Whether it has the item."""


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
    white_NK: Tensor
    whitening: Whitening
    taught: Taught | None
    """None where nothing asks for the teacher."""
    inputs: dict[str, str]


def read_all(config: Config, device: torch.device) -> Read:
    """Reads the lake. Raises InputError for an encoder that learned from items which are to be held out."""
    encoder_id, teacher_id = chosen(config)
    if config.cold_share and learned_from_users(config, encoder_id):
        raise InputError(f"encoder {encoder_id} learned from users' histories, also of items that rat.cold_share "
                         f"{config.cold_share} holds out: train one that learns from texts alone")  # fmt: skip
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
    whitening = fit_whitening(llm_NE, min(config.whitened_width, max(LEAST_WHITE, len(llm_NE) // 8)))
    with torch.no_grad():
        white_NK = whitening(llm_NE)
    asked = teacher_id != "none" and config.adapter != "llm_esr" and (config.alpha or "collaborative" in config.fusion.parts)
    return Read(
        encoder_id=encoder_id, teacher_id=teacher_id, catalogue=catalogue, goal=goal, events=events,
        counts_V=train_counts(events), white_NK=white_NK, whitening=whitening, inputs=inputs,
        taught=read_teacher(config, teacher_id, catalogue, device) if asked else None,
    )  # fmt: skip


def learned_from_users(config: Config, encoder_id: str) -> bool:
    """Whether an encoder has seen users' histories."""
    # the LLM's libraries take seconds to load, and nothing else here needs them
    from models.text.encoder import read_spec

    return read_spec(artifacts.find(config.run.lake, "encoder", encoder_id)).from_users


def chosen(config: Config) -> tuple[str, str]:
    """Ids of the encoder and the teacher (or "none")."""
    encoder_id, teacher_id = config.encoder, config.teacher
    if encoder_id == "latest":
        encoder_id = manifests.latest(config.run, "scft")["encoder_id"]
    if teacher_id == "latest":
        teacher_id = manifests.latest(config.run, "pretrain")["teacher_id"]
    return encoder_id, teacher_id


def read_teacher(config: Config, teacher_id: str, catalogue: Catalogue, device: torch.device) -> Taught:
    """The teacher in this catalogue's order.

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
    return Taught(model=teacher, table_VD=teacher.table()[row_V], known_V=row_V > 0)
