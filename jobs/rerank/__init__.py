"""A recommender's lists, `sequences`, titles -> a report: what an LLM that re-ranks them adds, offline (DELRec).

Soft tokens learn on validation events; test events are asked once: the recommender's order, the plain prompt, the prompt with
soft tokens, the same with titles shuffled over the items, and the oracle. Nothing that serves changes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from jobs.engines import registry
from jobs.lake import artifacts
from jobs.lake.items import titles
from jobs.lake.tensors import pick_device, read_catalogue, read_embeddings, read_histories
from jobs.rerank.config import Config as Config
from jobs.rerank.config import Result as Result
from models.behaviour.artifact import load_recommender
from models.behaviour.data import Histories
from models.judge.bootstrap import bootstrap, estimate
from models.judge.evaluation import Encode
from models.judge.rerank import Lists, make_lists, oracle, placed
from models.text.rerank import Question, Reranker, distil, load_reranker

log = logging.getLogger(__name__)
WAYS = ("recommender", "plain", "soft", "shuffled", "mixed", "oracle")
MIXES = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Weights of the LLM's standardised scores beside the recommender's."""


def run(config: Config) -> Result:
    """Asks the LLM. Raises InputError or ValueError for a base that can't be asked, a title that it doesn't know, or no event."""
    began, device = time.monotonic(), pick_device(config.run)
    chosen = registry.resolve(config.run, config.recommender)
    recommender = load_recommender(artifacts.find(config.run.lake, "recommender", chosen["recommender_id"]), device)
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    llm_NE = read_embeddings(config.run, chosen["encoder_id"], catalogue.content_hashes)
    table_VD = torch.nn.functional.pad(recommender.project(llm_NE, catalogue.item_ids), (0, 0, 1, 0))
    events = events.to(device)
    named = titles(config.run.lake, config.run.ds, catalogue.item_ids)
    words = [named[item_id] for item_id in catalogue.item_ids]
    values, weight, in_list = reranked(config, events, table_VD, recommender.encode, recommender.backbone.max_len, words)
    every_1C = torch.ones(1, len(values["plain"]), dtype=torch.bool)
    found = bootstrap(torch.stack([values[way] for way in WAYS], 1), every_1C, seed=config.run.seed)
    first = WAYS.index("recommender")
    less = {way: estimate(found, 0, place, minus=first) for place, way in enumerate(WAYS) if place != first}
    result = Result(
        recommender_id=chosen["recommender_id"], users=len(values["plain"]), top=config.top, tokens=config.distilling.tokens,
        in_list=round(in_list, 5), mix=weight,
        ndcg={way: round(float(values[way].mean()), 5) for way in WAYS},
        differences={way: one.interval() for way, one in less.items()},
        seconds=round(time.monotonic() - began, 1), device=str(device),
        inputs={"items": catalogue.digest, "sequences": digest, "recommender": chosen["recommender_id"]}, outputs={}, rows={},
    )  # fmt: skip
    log.info("NDCG@10 of %d users' lists: %s", result.users, "  ".join(f"{way} {result.ndcg[way]:.4f}" for way in WAYS))
    return result


def reranked(
    config: Config, events: Histories, table_VD: Tensor, encode: Encode, max_len: int, words: Sequence[str]
) -> tuple[dict[str, Tensor], float, float]:
    """NDCG@10 of each test user by each way; the weight in the mix; the share of targets that a recommender's lists hold.

    `words` are the items' titles, in the order of the table. Soft tokens learn on validation events.
    """
    parts = {part: make_lists(events, part, table_VD, encode, max_len, top=config.top, most=config.users,
                              unseen=config.run.exclude_seen) for part in ("valid", "test")}  # fmt: skip
    model = load_reranker(config.base, config.distilling, domain=config.domain, device=table_VD.device, seed=config.run.seed)
    known = questions(parts["valid"], words, config.history)
    refuse_unknown(model, [*known, *(question for some in (words, shuffled(words, config.run.seed))
                                     for question in questions(parts["test"], some, config.history))])  # fmt: skip
    distil(model, known, config.distilling, seed=config.run.seed, log=log_step)
    values, weight = rank_test_users(config, model, parts, words, known)
    return values, weight, float((parts["test"].place_C >= 0).double().mean())


def rank_test_users(
    config: Config, model: Reranker, parts: dict[str, Lists], words: Sequence[str], known: Sequence[Question]
) -> tuple[dict[str, Tensor], float]:
    """NDCG@10 of each test user by each way; and the weight in the mix, which validation chose."""
    test, places = parts["test"], parts["test"].item_CM.shape[1]
    soft_CM = scored(model, questions(test, words, config.history), places)
    other_CM = scored(model, questions(test, shuffled(words, config.run.seed), config.history), places)
    valid_CM, soft_SE = scored(model, known, places), model.soft_SE.data
    model.soft_SE.data = soft_SE[:0]
    plain_CM = scored(model, questions(test, words, config.history), places) if config.distilling.tokens else soft_CM
    model.soft_SE.data = soft_SE
    best = max(MIXES, key=lambda weight: float(placed(parts["valid"].mixed(valid_CM, weight), parts["valid"].place_C).mean()))
    scores = {"recommender": test.score_CM.double(), "plain": plain_CM, "soft": soft_CM, "shuffled": other_CM,
              "mixed": test.mixed(soft_CM, best)}  # fmt: skip
    found = {way: placed(score_CM, test.place_C) for way, score_CM in scores.items()}
    return found | {"oracle": oracle(test.place_C)}, best


def shuffled(words: Sequence[str], seed: int) -> list[str]:
    """Titles of other items."""
    return [words[place] for place in torch.randperm(len(words), generator=torch.Generator().manual_seed(seed)).tolist()]


def questions(lists: Lists, words: Sequence[str], newest: int) -> list[Question]:
    """The lists in titles."""
    return [
        Question(history=tuple(words[item - 1] for item in history if item)[-newest:],
                 candidates=tuple(words[item - 1] for item in items if item), target=place)
        for history, items, place in zip(lists.history_CL.tolist(), lists.item_CM.tolist(), lists.place_C.tolist(), strict=True)
    ]  # fmt: skip


def refuse_unknown(model: Reranker, asked: Sequence[Question]) -> None:
    """Raises ValueError for a title that the base doesn't know: told before the training, not after."""
    for title in sorted({title for question in asked for title in question.candidates}):
        model.title(title)


@torch.no_grad()
def scored(model: Reranker, asked: Sequence[Question], places: int) -> Tensor:
    """score_CM of all candidates, in float64 on the CPU; -inf in places of a list where there is none."""
    found = [model(question).double().cpu() for question in asked]
    return torch.stack([torch.nn.functional.pad(one, (0, places - len(one)), value=-torch.inf) for one in found])


def log_step(figures: dict[str, float], step: int) -> None:
    """A line now and then."""
    if step % 20 == 0:
        log.info("step %d  loss %.4f", step, figures["loss"])
