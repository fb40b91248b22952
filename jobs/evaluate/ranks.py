"""Recommenders of the lake or the registry -> ranks of every case under each, one recommender in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from jobs.engines import registry
from jobs.evaluate.config import CHALLENGER, Config
from jobs.evaluate.parts import part_spans
from jobs.lake import artifacts
from jobs.lake.tensors import Catalogue, read_embeddings, said_without_leaks
from jobs.run import Run
from models.behaviour.artifact import Loaded, load_recommender
from models.behaviour.fused import FusedRecommender
from models.judge.evaluation import Cases, Ranks, floor_ranks, span_ranks, vector_ranks
from models.judge.text_floor import text_ranks, tfidf_table

BATCH = 65_536
Ranker = Callable[[Cases], dict[str, Ranks]]
"""Cases -> ranks by the model's name; of several models where one pass makes them."""


def opened(run: Run, recommender_id: str, device: torch.device) -> Loaded:
    """A recommender of the lake, or of the registry."""
    return load_recommender(registry.fetch(run, "recommender", recommender_id), device)


def rankers(config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue) -> Iterator[Ranker]:
    """Rankers of the text floor, the ID-only teacher, the baselines, the challenger, its parts, and the others.

    Each model's vectors are made once, whatever is ranked by them, and one model is in memory at a time.
    """
    floor_VD = tfidf_table(said_without_leaks(config.run, catalogue))
    if floor_VD is not None:
        yield partial(floor_ranked, floor_VD.to(challenger.device))
    teacher_id = challenger.meta.get("teacher_id", "none")
    if teacher_id != "none":
        teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id), challenger.device)
        yield partial(ranked, "id_only", teacher, id_table(teacher, catalogue))
    for name, recommender_id in config.baselines.items():
        baseline = opened(config.run, recommender_id, challenger.device)
        yield partial(ranked, name, baseline, text_table(config.run, baseline, catalogue))
    yield partial(ranked, CHALLENGER, challenger, text_table(config.run, challenger, catalogue))
    for name, other_id in others.items():
        if other_id:
            other = opened(config.run, other_id, challenger.device)
            yield partial(ranked, name, other, text_table(config.run, other, catalogue))


def ranks_of(
    config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue, views: Sequence[Cases],
    valid: Cases | None = None,
) -> tuple[dict[str, list[Ranks]], Ranks | None]:  # fmt: skip
    """Of each model its ranks of every view's cases, and the challenger's of `valid`, where that is given.

    A last view that has the cases of the first is not ranked again.
    """
    again = same_cases(views[0], views[-1])
    ranked_views = views[:-1] if again else views
    counted = [floor_ranks(cases) for cases in ranked_views]
    found = {name: [ranks[name] for ranks in counted] for name in counted[0]}
    before: Ranks | None = None
    for ranker in rankers(config, challenger, others, catalogue):
        for cases in ranked_views:
            for name, ranks in ranker(cases).items():
                found.setdefault(name, []).append(ranks)
        if valid is not None and before is None and CHALLENGER in found:
            before = ranker(valid)[CHALLENGER]
    return {name: [*ranks, ranks[0]] for name, ranks in found.items()} if again else found, before


def same_cases(one: Cases, other: Cases) -> bool:
    """Whether two views ask for the same events in the same order, ranked alike: so it is where users have one held-out event."""
    return (
        one.unseen == other.unseen and torch.equal(one.users_C, other.users_C) and torch.equal(one.position_C, other.position_C)
    )


def floor_ranked(floor_VD: Tensor, cases: Cases) -> dict[str, Ranks]:
    """Ranks of the cases by plain text."""
    return {"tfidf_text": text_ranks(cases, floor_VD)}


def ranked(name: str, recommender: Loaded, table_VD: Tensor, cases: Cases) -> dict[str, Ranks]:
    """Ranks of the cases under a recommender; of the challenger, where it is of parts, under these too."""
    length = recommender.backbone.max_len
    if name != CHALLENGER or not isinstance(recommender, FusedRecommender):
        return {name: vector_ranks(cases, table_VD, recommender.encode, length)}
    spans = {name: (0, recommender.width), **part_spans(recommender)}
    return dict(zip(spans, span_ranks(cases, table_VD, recommender.encode, length, list(spans.values())), strict=True))


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
