"""A recommender, the champion, held-out `sequences` -> `metrics`: every model on the same cases, by slice, paired."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.engines import registry
from jobs.evaluate.cases import every_case, keep_outcomes
from jobs.evaluate.parts import part_ranks
from jobs.lake import artifacts, partitions
from jobs.lake.tables import METRICS
from jobs.lake.tensors import Catalogue, embeddings_digest, pick_device, read_catalogue, read_embeddings, read_histories
from jobs.run import InputError, Run, as_json
from models.behaviour.artifact import Loaded, load_recommender
from models.behaviour.data import Histories, held_out, without_items
from models.behaviour.fused import FusedRecommender
from models.judge.bootstrap import Bootstrap, Estimate, bootstrap, estimate
from models.judge.evaluation import SLICES, Cases, Ranks, floor_ranks, make_cases, vector_ranks
from models.judge.metrics import by_rank, popularity_leak

log = logging.getLogger(__name__)

CHALLENGER = "llmemb"
NAMES = ("popularity", "repeat_markov_popularity", "id_only", CHALLENGER, "champion", "reference")
LEAK_ITEMS = (50, 20_000)
"""Items that the leak test needs at least, and samples at most."""
BATCH = 65_536


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is judged, and how finely."""

    run: Run
    recommender: str = "latest"
    """The challenger: `latest` (of the newest `rat` run), an alias of the registry, or a recommender's id."""
    baselines: dict[str, str] = field(default_factory=dict)
    """More recommenders for the table, NAME = ID: a zero-shot text model, LLM-ESR, other backbones."""
    part: Literal["valid", "test"] = "test"
    """The held-out part: each user's last event in it is to be foretold from all before it."""
    events_per_user: int = 0
    """Newest held-out events of a user that the gates of `promote` judge; 0 takes all. They are ranked beside the table's one."""
    exclude_seen: bool | None = None
    """Ranks among items that the user has not touched yet; a repeat can still be the target. None is as serving:
    `run.exclude_seen`. The other ranking stands in the table too."""
    unseen: bool | None = None
    """The old name of `exclude_seen`."""
    k: int = 10
    """Cut of HR and NDCG."""
    negatives: int = 100
    """Of the sampled ranking, which is there for comparison with papers only."""
    resamples: int = 1000
    """Of the bootstrap over users."""
    min_users: int = 30
    """A slice of fewer users gets no interval: it can't tell."""
    paper_tail: int = 4
    """Slice `paper_tail`, LLMEmb's own rule: items with fewer events, held-out ones counted; for comparison only."""
    users_per_chunk: int = 4096
    """Users ranked at once, at most."""
    leak_bound: float = 0.5
    """Share of the variance of log test popularity that raw embeddings may foretell; above it, a field leaks."""

    def __post_init__(self) -> None:
        if min(self.k, self.negatives, self.users_per_chunk) < 1 or self.resamples < 2 or self.events_per_user < 0:
            raise InputError(
                "evaluate: k, negatives and users_per_chunk must be at least 1, resamples at least 2, events_per_user at least 0"
            )
        if taken := set(self.baselines) & set(NAMES):
            raise InputError(f"evaluate.baselines.{min(taken)}: the table has a model of that name; choose another")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The challenger's NDCG less another model's, over the same users."""

    against: str
    slice: str
    value: float | None
    low: float | None
    """Lower end of the 95 % interval; none where the slice is too small for one."""
    high: float | None
    detectable: float | None
    """The smallest difference that the slice could have shown (5 % level, two-sided, power 80 %)."""
    reference: float | None
    """The other model's NDCG."""
    n: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures that `promote` decides on."""

    recommender_id: str
    encoder_id: str
    champion_id: str
    """The recommender that serves, or that served until this one took over; empty on the first night."""
    reference_id: str
    """The fixed reference, which stays while champions come and go; empty where there is none, or where it is the challenger."""
    values: dict[str, dict[str, dict[str, float | None]]]
    """By model, slice, metric."""
    differences: tuple[Difference, ...]
    """To every other model, by slice."""
    users: dict[str, int]
    """Of each slice."""
    leak: dict[str, float]
    """How well raw embeddings foretell log test popularity, cross-validated: r2, spearman, items."""
    leaking: bool
    """Whether r2 is above `leak_bound`."""
    outcomes_id: str
    """Artifact with every model's NDCG of every held-out event: what the gates judge."""
    negatives_id: str
    """Artifact with the negatives of the sampled ranking."""
    ranking_seconds: float
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Ranks the held-out events under every model and replaces partition ds=DATE of `metrics`.

    Raises InputError or ValueError for a model or embeddings that are missing, no held-out event, or scores that are not finite.
    """
    device = pick_device(config.run)
    chosen = registry.resolve(config.run, config.recommender)
    champion_id = registry.opponent(config.run, chosen["recommender_id"])
    reference_id = registry.reference(config.run, chosen["recommender_id"])
    catalogue = read_catalogue(config.run)
    challenger = opened(config.run, chosen["recommender_id"], device)
    events, digest = read_histories(config.run, catalogue.item_ids)
    held_V = held_out(catalogue.item_ids, challenger.meta.get("cold_share", 0.0), challenger.meta.get("seed", 0))
    events = without_items(events, held_V).to(device)
    cases = make_cases(
        events, config.part, negatives=config.negatives, paper_tail=config.paper_tail, chunk=config.users_per_chunk,
        seed=config.run.seed, unseen=unseen_only(config),
    )  # fmt: skip
    started = time.monotonic()
    others = {"champion": champion_id, "reference": reference_id if reference_id != champion_id else ""}
    ranks = both_ways(config, challenger, others, catalogue, cases)
    all_cases = every_case(events, config.part, cases, config.events_per_user, config.paper_tail)
    all_ranks: Mapping[str, tuple[Tensor, ...]] = ranks
    if len(all_cases.users_C) > len(cases.users_C):
        all_ranks = floor_ranks(all_cases) | dict(model_ranks(config, challenger, others, catalogue, all_cases))
    found = judged(config, ranks, cases)
    seconds = time.monotonic() - started
    values, differences = tabled(config, found, list(ranks))
    leak = leaks(config, challenger, catalogue, events)
    commit = partitions.write(config.run.lake, METRICS, f"ds={config.run.ds}", [metric_rows(config, found, list(ranks))])
    outcomes_id = keep_outcomes(config.run, all_cases, all_ranks, config.k)
    negatives_id = keep_negatives(config.run, cases)
    result = Result(
        recommender_id=chosen["recommender_id"],
        encoder_id=chosen["encoder_id"],
        champion_id=champion_id,
        reference_id=reference_id,
        values=values,
        differences=differences,
        users=dict(zip(SLICES, found.n_S.tolist(), strict=True)),
        leak=leak,
        leaking=leak.get("r2", 0.0) > config.leak_bound,
        outcomes_id=outcomes_id,
        negatives_id=negatives_id,
        ranking_seconds=round(seconds, 3),
        device=str(device),
        inputs={
            "items": catalogue.digest,
            "sequences": digest,
            "encoder": chosen["encoder_id"],
            "llm_embeddings": embeddings_digest(config.run, chosen["encoder_id"]),
            "recommender": chosen["recommender_id"],
            "champion": champion_id,
            "reference": reference_id,
        },
        outputs={"metrics": commit.digest, "negatives": negatives_id, "outcomes": outcomes_id},
        rows={"metrics": commit.rows, "cases": len(cases.users_C), "all_cases": len(all_cases.users_C)},
    )
    tell(config, result, catalogue)
    record(config, result)
    return result


# ----------------------------------------------------------------------------------------------------------------- models


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


# ---------------------------------------------------------------------------------------------------------------- figures


def columns(config: Config) -> list[str]:
    """Metrics of a model, in order."""
    names = [f"hr@{config.k}", f"ndcg@{config.k}", "mrr"]
    other = "all" if unseen_only(config) else "unseen"
    return names + [f"sampled_{name}" for name in names] + [f"{other}_{name}" for name in names]


def unseen_only(config: Config) -> bool:
    """Whether the ranking that counts leaves out what a user has had."""
    asked = config.exclude_seen if config.exclude_seen is not None else config.unseen
    return config.run.exclude_seen if asked is None else asked


def both_ways(
    config: Config, challenger: Loaded, others: dict[str, str], catalogue: Catalogue, cases: Cases
) -> dict[str, tuple[Tensor, ...]]:
    """Of each model: ranks as serving ranks, among sampled negatives, and in the other ranking."""
    other = dataclasses.replace(cases, unseen=not cases.unseen)
    first, second = (
        floor_ranks(some) | dict(model_ranks(config, challenger, others, catalogue, some)) for some in (cases, other)
    )
    return {name: (*ranks, second[name][0]) for name, ranks in first.items()}


def judged(config: Config, ranks: dict[str, tuple[Tensor, ...]], cases: Cases) -> Bootstrap:
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
    tensors = {"target_C": cases.target_C, "negative_CN": cases.negative_CN}
    save_file({name: value.int().cpu().contiguous() for name, value in tensors.items()}, staged / "negatives.safetensors")
    return artifacts.keep(run.lake, "negatives", staged)


# ---------------------------------------------------------------------------------------------------------------- tell it


def tell(config: Config, result: Result, catalogue: Catalogue) -> None:
    """The table, for a person."""
    log.info("%s", "\n".join(table(config, result, catalogue)))


def table(config: Config, result: Result, catalogue: Catalogue) -> Iterator[str]:
    """Lines of the table: NDCG by model and slice, then the challenger's differences, the sampled ranking, and the leak test."""
    ndcg = f"ndcg@{config.k}"
    names = [name for name in SLICES if name != "paper_tail"]
    among = f"{len(catalogue.item_ids):,} {'unseen ' if unseen_only(config) else ''}items"
    yield f"evaluate: the last {config.part} event of {result.users['overall']:,} users, ranked among {among}; {ndcg}"
    yield line("", names)
    yield line("users", [f"{result.users[name]:,}" for name in names])
    for model, by_slice in result.values.items():
        yield line(model, [shown(by_slice[name][ndcg]) for name in names])
    for against in ("champion", "id_only", "popularity"):
        rows = {row.slice: row for row in result.differences if row.against == against}
        if rows:
            yield line(f"{CHALLENGER} - {against}", [shown(rows[name].value, "+") for name in names])
            yield line("   95 % from", [shown(rows[name].low, "+") for name in names])
            yield line("   to", [shown(rows[name].high, "+") for name in names])
            yield line("   could have shown", [shown(rows[name].detectable) for name in names])
            break
    yield f"overall, and for comparison with papers among {config.negatives} sampled negatives:"
    yield line("", columns(config))
    for model, by_slice in result.values.items():
        yield line(model, [shown(by_slice["overall"][name]) for name in columns(config)])
    if result.leak:
        warning = f" ABOVE {config.leak_bound}: a field of the prompt leaks popularity" if result.leaking else ""
        yield f"raw embeddings foretell log test popularity: R2 {result.leak['r2']:.3f}, rank correlation " \
              f"{result.leak['spearman']:.3f}{warning}"  # fmt: skip


def line(head: str, cells: list[str]) -> str:
    """One line of the table."""
    return f"  {head:<26}" + "".join(f"{cell:>{max(9, len(cell) + 2)}}" for cell in cells)


def shown(value: float | None, sign: str = "") -> str:
    """A figure with four digits; a dash where there is none."""
    return "-" if value is None else f"{value:{sign}.4f}"


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
