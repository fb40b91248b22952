"""`python -m jobs worth --recipe FILE --ds DATE`: is the LLM's tuning worth its GPU time on your own catalogue and logs?

Ranks validation events by the cosine of whitened texts, without any training, with the base model, the newest encoder of the
recipe, others by id, fewer layers of the base, and TF-IDF without an LLM; tells NDCG@10 with 95 % intervals. Keeps nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jobs.lake import artifacts, partitions
from jobs.lake.tables import ITEMS
from jobs.lake.tensors import pick_device
from jobs.recipe import build, load_recipe, values_of
from jobs.run import InputError, Run
from jobs.scft.config import Config
from jobs.scft.refresh import trainings
from jobs.scft.tuning import build as build_encoder
from jobs.scft.worth import Sample, sample_of
from models.judge import untrained
from models.judge.metrics import by_rank
from models.judge.text_floor import text_ranks, tfidf_table
from models.judge.untrained import TOLD, Worth
from models.text.encoder import Encoder, load_encoder

log = logging.getLogger(__name__)
BASE, TFIDF = "base", "tfidf"


def main(argv: Sequence[str]) -> int:
    """Prints a table to standard error and its figures as JSON. Raises InputError where the lake has no catalogue or logs."""
    parser = argparse.ArgumentParser(prog="python -m jobs worth", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, metavar="FILE", help="the recipe whose base and lake are taken")
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument("--encoder", action="append", default=[], metavar="ID", help="another encoder of the lake; repeat")
    parser.add_argument(
        "--layers", action="append", default=[], type=int, metavar="N", help="also the base's first N layers; repeat"
    )
    parser.add_argument("--items", type=int, default=0, help="items of the sample; 0 is 1,500 on a CPU and 50,000 on a GPU")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(arguments.recipe)
    run = build(Run, {"ds": arguments.ds, **recipe.get("run", {})}, "run")
    config = build(Config, {"run": run, **values_of(recipe, "scft")}, "scft")
    config = dataclasses.replace(config, worth_items=arguments.items or config.worth_items)
    worth = measure_encoders(config, arguments.encoder, arguments.layers)
    log.info("\n%s", "\n".join(table(worth)))
    print(json.dumps(plain(worth)))
    return 0


def measure_encoders(config: Config, ids: Sequence[str], layers: Sequence[int]) -> Worth:
    """Every encoder on one sample, each less the base model and less TF-IDF."""
    device = pick_device(config.run)
    snapshot = partitions.latest(config.run.lake, ITEMS.name, config.run.ds)
    sample = sample_of(config, snapshot, device)
    if isinstance(sample, str):
        raise InputError(f"nothing to weigh encoders by: {sample}")
    asked = candidates(config, device, ids, layers)
    ndcg_C = {name: untrained.untrained_ndcg(sample.trial, sample.embedded(load(), name)) for name, load in asked.items()}
    if (floor_C := without_llm(sample)) is not None:
        ndcg_C[TFIDF] = floor_C
    return untrained.compare_rankings(
        sample.trial, ndcg_C, [(one, other) for one in ndcg_C if one != TFIDF for other in (BASE, TFIDF)], config.run.seed
    )


def candidates(
    config: Config, device: torch.device, ids: Sequence[str], layers: Sequence[int]
) -> dict[str, Callable[[], Encoder]]:
    """What is weighed, by name; each is loaded only while it embeds. Raises InputError for an id that the lake lacks."""
    lake = config.run.lake

    def of_base(count: int) -> Encoder:
        untrained = dataclasses.replace(config.training, steps=0)
        zero = dataclasses.replace(config, layers=count, training=untrained, attention="base", suffix_tokens=0)
        return build_encoder(zero, device).eval()

    def of_artifact(folder: Path) -> Encoder:
        return load_encoder(folder, device=device)

    found: dict[str, Callable[[], Encoder]] = {BASE: lambda: of_base(config.layers)}
    found |= {f"base, {count} layers": (lambda count=count: of_base(count)) for count in layers}  # type: ignore[misc]
    if (newest := next(trainings(lake, config.run.ds), None)) is not None and newest.result.get("steps"):
        ids = [str(newest.result["encoder_id"]), *ids]
    for encoder_id in dict.fromkeys(ids):
        folder = artifacts.find(lake, "encoder", encoder_id)
        found[f"encoder {encoder_id}"] = lambda folder=folder: of_artifact(folder)  # type: ignore[misc]
    return found


def without_llm(sample: Sample) -> torch.Tensor | None:
    """ndcg_C of TF-IDF over the same texts; None where they are too few for it."""
    made = tfidf_table(["; ".join(value for _, value in item) for item in sample.items])
    if made is None:
        return None
    return by_rank(text_ranks(sample.trial.cases, made.to(sample.trial.cases.target_C.device))[0])["ndcg"].cpu()


def table(worth: Worth) -> list[str]:
    """Lines for people."""
    shown = [slice_ for slice_ in TOLD if slice_ in next(iter(worth.ndcg.values()))]
    width = max(len(name) for name in (*worth.ndcg, *worth.less))
    lines = [
        f"NDCG@10 of {worth.users} users' validation events, nothing trained on top",
        " " * width + "".join(f"{s:>28}" for s in shown),
    ]
    lines += [f"{name:<{width}}" + "".join(f"{rows[s]:>28.4f}" for s in shown) for name, rows in worth.ndcg.items()]
    for pair, rows in worth.less.items():
        lines.append(f"{pair:<{width}}" + "".join(f"{difference_text(rows[s]):>28}" for s in shown))
    if worth.users < untrained.FEWEST:
        lines.append(f"{untrained.FEWEST} users are needed to decide anything: take a larger sample by --items, or a later --ds")
    return lines


def difference_text(ends: tuple[float, float, float]) -> str:
    """A difference with its interval."""
    value, low, high = ends
    return f"{value:+.4f} (few users)" if math.isnan(low) else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def plain(worth: Worth) -> dict[str, Any]:
    """JSON's form: it has no NaN."""
    less = {
        pair: {s: [None if math.isnan(x) else x for x in ends] for s, ends in rows.items()} for pair, rows in worth.less.items()
    }
    return {"users": worth.users, "ndcg": worth.ndcg, "less": less}
