"""Recommenders of the lake or the registry -> ranks of every case under each, one recommender in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from jobs.engines import registry
from jobs.evaluate.config import CHALLENGER, Config
from jobs.evaluate.parts import part_ranks
from jobs.lake import artifacts
from jobs.lake.tensors import Catalogue, read_embeddings
from jobs.run import Run
from models.behaviour.artifact import Loaded, load_recommender
from models.behaviour.fused import FusedRecommender
from models.judge.evaluation import Cases, Ranks, floor_ranks, vector_ranks

BATCH = 65_536


def opened(run: Run, recommender_id: str, device: torch.device) -> Loaded:
    """A recommender of the lake, or of the registry."""
    return load_recommender(registry.fetch(run, "recommender", recommender_id), device)


def model_ranks(
    config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue, cases: Cases
) -> Iterator[tuple[str, Ranks]]:
    """(name, ranks) of the ID-only teacher, the baselines, the challenger and the others, one in memory at a time."""
    teacher_id = challenger.meta.get("teacher_id", "none")
    if teacher_id != "none":
        teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id), challenger.device)
        yield "id_only", ranked(teacher, id_table(teacher, catalogue), cases)
    for name, recommender_id in config.baselines.items():
        baseline = opened(config.run, recommender_id, challenger.device)
        yield name, ranked(baseline, text_table(config.run, baseline, catalogue), cases)
    table_VD = text_table(config.run, challenger, catalogue)
    yield CHALLENGER, ranked(challenger, table_VD, cases)
    if isinstance(challenger, FusedRecommender):
        yield from part_ranks(challenger, table_VD, cases)
    for name, other_id in others.items():
        if other_id:
            other = opened(config.run, other_id, challenger.device)
            yield name, ranked(other, text_table(config.run, other, catalogue), cases)


def ranked(recommender: Loaded, table_VD: Tensor, cases: Cases) -> Ranks:
    """Ranks of the cases under a recommender."""
    return vector_ranks(cases, table_VD, recommender.encode, recommender.backbone.max_len)


def id_table(teacher: Loaded, catalogue: Catalogue) -> Tensor:
    """table_VD in the catalogue's order; an item that the teacher never met has zeros, and so ties with its like."""
    own_VD = teacher.table()
    row_V = torch.tensor([0, *(teacher.row.get(item_id, 0) for item_id in catalogue.item_ids)], device=own_VD.device)
    return own_VD[row_V].float()


def text_table(run: Run, recommender: Loaded, catalogue: Catalogue) -> Tensor:
    """table_VD of the catalogue's items from their LLM embeddings: what serving would hold."""
    llm_NE = read_embeddings(run, recommender.meta["encoder_id"], catalogue.content_hashes)
    parts = [torch.zeros(1, recommender.width, device=recommender.device)]
    for start in range(0, len(llm_NE), BATCH):
        parts.append(recommender.project(llm_NE[start : start + BATCH], catalogue.item_ids[start : start + BATCH]))
    return torch.cat(parts)


def both_ways(
    config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue, cases: Cases
) -> dict[str, tuple[Tensor, ...]]:
    """Of each model: ranks as serving ranks, among sampled negatives, and in the other ranking."""
    other = dataclasses.replace(cases, unseen=not cases.unseen)
    first, second = (
        floor_ranks(some) | dict(model_ranks(config, challenger, others, catalogue, some)) for some in (cases, other)
    )
    return {name: (*ranks, second[name][0]) for name, ranks in first.items()}
