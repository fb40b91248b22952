"""Recommenders of the lake or the registry -> ranks of every case under each, one recommender in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from jobs.engines import registry
from jobs.evaluate.config import CHALLENGER, Config
from jobs.evaluate.parts import part_rankers
from jobs.lake import artifacts, items
from jobs.lake.tensors import Catalogue, read_embeddings
from jobs.run import Run
from models.behaviour.artifact import Loaded, load_recommender
from models.behaviour.fused import FusedRecommender
from models.judge.evaluation import Cases, Ranks, floor_ranks, vector_ranks
from models.judge.text_floor import text_ranks, tfidf_table
from models.text.prompts import LEAKS, normalised_name

BATCH = 65_536
Ranker = Callable[[Cases], Ranks]


def opened(run: Run, recommender_id: str, device: torch.device) -> Loaded:
    """A recommender of the lake, or of the registry."""
    return load_recommender(registry.fetch(run, "recommender", recommender_id), device)


def rankers(config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue) -> Iterator[tuple[str, Ranker]]:
    """(name, ranker) of the text floor, the ID-only teacher, the baselines, the challenger, its parts, and the others.

    Each model's vectors are made once, whatever is ranked by them, and one model is in memory at a time.
    """
    floor_VD = tfidf_table(texts(config.run, catalogue))
    if floor_VD is not None:
        yield "tfidf_text", partial(text_ranks, table_VD=floor_VD.to(challenger.device))
    teacher_id = challenger.meta.get("teacher_id", "none")
    if teacher_id != "none":
        teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id), challenger.device)
        yield "id_only", partial(ranked, teacher, id_table(teacher, catalogue))
    for name, recommender_id in config.baselines.items():
        baseline = opened(config.run, recommender_id, challenger.device)
        yield name, partial(ranked, baseline, text_table(config.run, baseline, catalogue))
    table_VD = text_table(config.run, challenger, catalogue)
    yield CHALLENGER, partial(ranked, challenger, table_VD)
    if isinstance(challenger, FusedRecommender):
        yield from part_rankers(challenger, table_VD)
    for name, other_id in others.items():
        if other_id:
            other = opened(config.run, other_id, challenger.device)
            yield name, partial(ranked, other, text_table(config.run, other, catalogue))


def ranks_of(
    config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue, views: Sequence[Cases]
) -> dict[str, list[Ranks]]:
    """Of each model its ranks of every view's cases."""
    counted = [floor_ranks(cases) for cases in views]
    found = {name: [ranks[name] for ranks in counted] for name in counted[0]}
    for name, ranker in rankers(config, challenger, others, catalogue):
        found[name] = [ranker(cases) for cases in views]
    return found


def texts(run: Run, catalogue: Catalogue) -> list[str]:
    """What is said of each item, in the catalogue's order, without the fields that leak popularity."""
    leaks = {normalised_name(name) for name in LEAKS}
    return items.texts(run.lake, run.ds, catalogue.item_ids, lambda name: normalised_name(name) not in leaks)


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
