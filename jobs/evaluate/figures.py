"""Ranks -> figures with intervals: of every model by slice, and the challenger's differences to all others."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pyarrow as pa
import torch
from torch import Tensor

from jobs.evaluate.config import CHALLENGER, Config, Difference, unseen_only
from jobs.lake.tables import METRICS
from models.judge.bootstrap import Bootstrap, Estimate, bootstrap, estimate
from models.judge.evaluation import SLICES, Cases
from models.judge.metrics import by_rank


def columns(config: Config) -> list[str]:
    """Metrics of a model, in order."""
    names = [f"hr@{config.k}", f"ndcg@{config.k}", "mrr"]
    other = "all" if unseen_only(config) else "unseen"
    return names + [f"sampled_{name}" for name in names] + [f"{other}_{name}" for name in names]


def judged(config: Config, ranks: Mapping[str, tuple[Tensor, ...]], cases: Cases) -> Bootstrap:
    """Every model's metrics, resampled together; a column for each (model, metric)."""
    values = [value for pair in ranks.values() for rank_C in pair for value in by_rank(rank_C, config.k).values()]
    return bootstrap(torch.stack(values, dim=1), cases.slices_SC, resamples=config.resamples, seed=config.run.seed)


def number(value: float) -> float | None:
    """A figure for JSON and tables: none where there is none."""
    return round(value, 6) if math.isfinite(value) else None


def tabled(
    config: Config, found: Bootstrap, models: list[str]
) -> tuple[dict[str, dict[str, dict[str, float | None]]], tuple[Difference, ...]]:
    """All values by model, slice and metric; and the challenger's differences in NDCG to all other models."""
    names = columns(config)
    rows = found.mean_SK.view(len(SLICES), len(models), len(names)).tolist()
    values = {
        model: {
            slice_: {name: number(rows[s][m][c]) for c, name in enumerate(names)} for s, slice_ in enumerate(SLICES)
        }
        for m, model in enumerate(models)
    }  # fmt: skip
    ndcg = [place * len(names) + 1 for place in range(len(models))]
    differences = []
    for m, model in enumerate(models):
        for s, slice_ in enumerate(SLICES):
            if model != CHALLENGER:
                less = estimate(found, s, ndcg[models.index(CHALLENGER)], minus=ndcg[m], min_users=config.min_users)
                differences.append(difference(model, slice_, less, values[model][slice_][names[1]]))
    return values, tuple(differences)


def difference(against: str, slice_: str, less: Estimate, reference: float | None) -> Difference:
    """One row of the comparison."""
    return Difference(
        against=against,
        slice=slice_,
        value=number(less.value),
        low=number(less.low),
        high=number(less.high),
        detectable=number(less.detectable),
        reference=reference,
        n=less.n,
    )


def metric_rows(config: Config, found: Bootstrap, models: list[str]) -> pa.Table:
    """Rows of `metrics`."""
    rows = []
    for place, (model, metric) in enumerate((model, metric) for model in models for metric in columns(config)):
        for s, slice_ in enumerate(SLICES):
            got = estimate(found, s, place, min_users=config.min_users)
            figures = {"value": number(got.value), "low": number(got.low), "high": number(got.high)}
            rows.append({"model": model, "slice": slice_, "metric": metric, **figures, "n": got.n})
    return pa.Table.from_pylist(rows, METRICS.schema)
