"""A recommender, the champion, held-out `sequences` -> `metrics`: every model on the same cases, by slice, paired."""

from __future__ import annotations

import dataclasses
import time

import torch

from jobs.engines import registry
from jobs.evaluate.cases import every_case, keep_outcomes, weak_slices
from jobs.evaluate.config import Config as Config
from jobs.evaluate.config import Difference as Difference
from jobs.evaluate.config import Result as Result
from jobs.evaluate.config import unseen_only
from jobs.evaluate.figures import judged, metric_rows, tabled
from jobs.evaluate.ranks import opened, ranks_of
from jobs.evaluate.table import log_table
from jobs.lake import artifacts, partitions
from jobs.lake.tables import METRICS
from jobs.lake.tensors import (
    Catalogue,
    embeddings_digest,
    pick_device,
    read_catalogue,
    read_embeddings,
    read_histories,
    write_tensors,
)
from jobs.run import Run, as_json
from models.behaviour.artifact import Loaded
from models.behaviour.data import Histories, held_out, without_items
from models.behaviour.data import cases as held_out_cases
from models.judge.evaluation import SLICES, Cases, make_cases
from models.judge.metrics import popularity_leak

LEAK_ITEMS = (50, 20_000)
"""Items that the leak test needs at least, and samples at most."""


def run(config: Config) -> Result:
    """Ranks the held-out events under every model and replaces partition ds=DATE of `metrics`.

    Raises InputError or ValueError for a model or embeddings that are missing, no held-out event, or scores that are not finite.
    """
    chosen = resolve_models(config)
    catalogue = read_catalogue(config.run)
    challenger = opened(config.run, chosen["recommender"], pick_device(config.run))
    events, digest = read_events(config, challenger, catalogue)
    cases = make_cases(
        events, config.part, negatives=config.negatives, paper_tail=config.paper_tail, chunk=config.users_per_chunk,
        seed=config.run.seed, unseen=unseen_only(config),
    )  # fmt: skip
    started = time.monotonic()
    same = chosen["reference"] == chosen["champion"]
    others = {"champion": chosen["champion"], "reference": "" if same else chosen["reference"]}
    views = views_of(config, cases)
    by_view, before = ranks_of(config, challenger, others, catalogue, views, valid := validation(config, events))
    ranks = {name: (*found[0], found[1][0]) for name, found in by_view.items()}
    figures = judged(config, ranks, cases)
    seconds = time.monotonic() - started
    values, differences = tabled(config, figures, list(ranks))
    leak = leaks(config, challenger, catalogue, events)
    commit = partitions.write(config.run.lake, METRICS, f"ds={config.run.ds}", [metric_rows(config, figures, list(ranks))])
    outputs = {
        "metrics": commit.digest, "negatives": keep_negatives(config.run, cases),
        "outcomes": keep_outcomes(config.run, views[-1], {name: by_view[name][-1] for name in by_view}, config.k,
                                 weak_slices(views[-1], valid, before, config.k)),
    }  # fmt: skip
    rows = {"metrics": commit.rows, "cases": len(cases.users_C), "all_cases": len(views[-1].users_C)}
    result = Result(
        recommender_id=chosen["recommender"], encoder_id=chosen["encoder"], champion_id=chosen["champion"],
        reference_id=chosen["reference"], values=values, differences=differences,
        users=dict(zip(SLICES, figures.n_S.tolist(), strict=True)), leak=leak, leaking=leak.get("r2", 0.0) > config.leak_bound,
        outcomes_id=outputs["outcomes"], negatives_id=outputs["negatives"], device=str(challenger.device), rows=rows,
        inputs={"items": catalogue.digest, "sequences": digest, **chosen}, outputs=outputs, ranking_seconds=round(seconds, 3),
    )  # fmt: skip
    log_table(config, result, catalogue)
    record(config, result)
    return result


def resolve_models(config: Config) -> dict[str, str]:
    """Ids of the challenger, its encoder, the champion and the reference, and the digest of the embeddings that it reads."""
    chosen = registry.resolve(config.run, config.recommender)
    return {
        "encoder": chosen["encoder_id"],
        "llm_embeddings": embeddings_digest(config.run, chosen["encoder_id"]),
        "recommender": chosen["recommender_id"],
        "champion": registry.opponent(config.run, chosen["recommender_id"]),
        "reference": registry.reference(config.run, chosen["recommender_id"]),
    }


def read_events(config: Config, challenger: Loaded, catalogue: Catalogue) -> tuple[Histories, str]:
    """Histories without the train events of items that the challenger holds out as cold, and the digest of the table."""
    events, digest = read_histories(config.run, catalogue.item_ids)
    held_V = held_out(catalogue.item_ids, challenger.meta.get("cold_share", 0.0), challenger.meta.get("seed", 0))
    return without_items(events, held_V).to(challenger.device), digest


def views_of(config: Config, cases: Cases) -> list[Cases]:
    """What every model ranks: the cases as serving ranks, in the other ranking, and (last) all held-out events, for the gates."""
    other = dataclasses.replace(cases, unseen=not cases.unseen)
    return [cases, other, every_case(cases.events, config.part, cases, config.events_per_user, config.paper_tail)]


def validation(config: Config, events: Histories) -> Cases | None:
    """The validation event of each user, by whose rank the report tells weak users; None where it is judged itself, or absent."""
    if config.part == "valid" or not len(held_out_cases(events, "valid")[0]):
        return None
    return make_cases(events, "valid", negatives=1, paper_tail=config.paper_tail, chunk=config.users_per_chunk,
                      seed=config.run.seed, unseen=unseen_only(config))  # fmt: skip


def leaks(config: Config, challenger: Loaded, catalogue: Catalogue, events: Histories) -> dict[str, float]:
    """How well raw embeddings foretell popularity in the test part; empty for a catalogue too small to tell."""
    least, most = LEAK_ITEMS
    if len(catalogue.item_ids) < least:
        return {}
    in_test_N = events.position_N >= events.valid_end_U[events.user_N]
    count_N = torch.bincount(events.items_N[in_test_N], minlength=events.catalogue + 1)[1:]
    some = torch.randperm(len(count_N), generator=torch.Generator().manual_seed(config.run.seed))[:most]
    llm_NE = read_embeddings(config.run, challenger.meta["encoder_id"], catalogue.content_hashes)[some]
    leak = popularity_leak(llm_NE.to(count_N.device), count_N[some.to(count_N.device)], seed=config.run.seed)
    return {"r2": round(leak.r2, 4), "spearman": round(leak.spearman, 4), "items": float(leak.items)}


def keep_negatives(run: Run, cases: Cases) -> str:
    """Keeps what the sampled ranking ranked among, as indices into the catalogue; equal draws are one artifact."""
    staged = artifacts.stage(run.lake, "negatives")
    tensors = {"target_C": cases.target_C.int(), "negative_CN": cases.negative_CN.int()}
    write_tensors(staged / "negatives.safetensors", tensors)
    return artifacts.keep(run.lake, "negatives", staged)


def record(config: Config, result: Result) -> None:
    """The evaluation as a run of MLflow, where there is one; metric names there may hold no @."""
    metrics = {
        f"{model}.{slice_}.{name.replace('@', '_at_')}": value
        for model, by_slice in result.values.items()
        for slice_, figures in by_slice.items()
        for name, value in figures.items()
        if value is not None and (slice_ == "overall" or name.startswith("ndcg"))
    }
    params = {"recommender_id": result.recommender_id, "champion_id": result.champion_id, **as_json(config)}
    registry.log_run(config.run, "evaluate", params, metrics, inputs=result.inputs, documents={"evaluation": result})
