"""The decision of the gates, differences with intervals by slice, and all models' values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jobs.lake.nights import JobRun
from jobs.report import plots as plots
from jobs.report.blocks import Figure, Table
from jobs.report.facts import Facts
from jobs.report.plots import Interval
from jobs.report.words import first_line, number

MODELS = ("popularity", "repeat_markov_popularity", "tfidf_text", "id_only")
SLICES = ("overall", "cold", "tail", "head", "repeat", "new", "short", "long", "paper_tail")
"""Orders of the evaluation, in which people read: manifests are sorted by name."""
MARKS = "Circle: surely no worse; diamond: can't tell; square: surely worse; cross: too few users for an interval."
PLOTS = {
    "champion": "Challenger less champion by slice, NDCG with 95 % intervals; dotted: the loss that counts as none.",
    "floors": "Challenger less every other model, overall, NDCG with 95 % intervals.",
    "id-only": "Challenger less the ID-only model by slice, NDCG with 95 % intervals: what the texts are worth.",
}


def section(facts: Facts) -> dict[str, Any]:
    """Decisions, forest plots with their figures, and tables of all models."""
    judged, promote = facts.night.result("evaluate"), facts.night.all("promote")
    margin = promote[0].manifest.get("config", {}).get("margin") if promote else None
    found = comparisons(judged)
    return {
        "decisions": [decision(run) for run in promote],
        "evaluated": bool(judged),
        "forests": [forest(name, rows, margin) for name, rows in found.items() if rows],
        "champion": bool(found["champion"]),
        "models": list(model_tables(judged)),
    }


def decision(run: JobRun) -> tuple[str, Table | None]:
    """(what a run of `promote` decided, its gates), or how it failed."""
    result = run.result
    if run.status != "done":
        return f"promote {run.status}: {first_line(run.manifest.get('error'))}", None
    by = f" by {result['approved_by']}" if result.get("approved_by") else ""
    against = f"against champion {result['champion_id']}" if result.get("champion_id") else "as the first champion"
    rows = [[reason["gate"], reason["verdict"], reason["text"]] for reason in result.get("reasons", [])]
    gates = Table(caption="Gates", head=["Gate", "Verdict", "Figures"], rows=rows, numeric=False)
    return f"Decision: {result.get('recommender_id')} is {result.get('decision')}{by}, {against}.", gates


def comparisons(judged: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Forest plot -> its differences: against the champion, against all others overall, against ID-only by slice."""
    rows = [row for row in judged.get("differences", []) if row.get("value") is not None]
    return {
        "champion": [row for row in rows if row["against"] == "champion"],
        "floors": [row for row in rows if row["slice"] == "overall" and row["against"] != "champion"],
        "id-only": [row for row in rows if row["against"] == "id_only" and row["slice"] != "overall"],
    }


def forest(name: str, rows: Sequence[Mapping[str, Any]], margin: float | None) -> tuple[Figure, Table]:
    """A forest plot, and the same in figures."""
    intervals = [interval(row, margin if name == "champion" else None) for row in rows]
    figure = Figure(picture=plots.forest(name, intervals, "difference in NDCG"), words=f"{PLOTS[name]} {MARKS}")
    key = "against" if name == "floors" else "slice"
    cells = [[row[key], *(number(row.get(figure)) for figure in ("value", "low", "high", "detectable", "n"))] for row in rows]
    head = ["Model" if name == "floors" else "Slice", "Difference", "From", "To", "Could have shown", "Users"]
    return figure, Table(caption=PLOTS[name].split(",")[0], head=head, rows=cells)


def interval(row: Mapping[str, Any], margin: float | None) -> Interval:
    """A difference as a row of a forest plot; `margin` is the share of the reference that is no loss."""
    low, high = row.get("low"), row.get("high")
    allowed = margin * (row.get("reference") or 0.0) if margin is not None else None
    floor = -(allowed or 0.0)
    verdict = "undecided"
    if low is not None and high is not None:
        verdict = "passed" if low >= floor else "failed" if high < floor else "undecided"
    name = row["against"] if row["slice"] == "overall" and row["against"] != "champion" else row["slice"]
    label = f"{name} ({row.get('n', 0):,})"
    return Interval(label=label, value=row["value"], low=low, high=high, margin=allowed, verdict=verdict)


def model_tables(judged: Mapping[str, Any]) -> Iterator[Table]:
    """Every model's NDCG in every slice, and its other metrics overall."""
    values = judged.get("values", {})
    if not values:
        return
    values = {model: values[model] for model in in_order(values, MODELS)}
    first = next(iter(values.values()))
    slices = in_order(first, SLICES)
    metrics = sorted(next(iter(first.values())), key=lambda name: (name.startswith("sampled"), name))
    ndcg = next((name for name in metrics if name.startswith("ndcg")), metrics[0])
    users = judged.get("users", {})
    rows = [["users", *(number(users.get(name)) for name in slices)]]
    rows += [[model, *(number(by_slice.get(name, {}).get(ndcg)) for name in slices)] for model, by_slice in values.items()]
    yield Table(caption=f"{ndcg} of every model by slice (whole catalogue ranked)", head=["Model", *slices], rows=rows)
    caption = "All metrics overall; sampled ones are for comparison with papers only"
    rows = [[model, *(number(by_slice.get("overall", {}).get(name)) for name in metrics)] for model, by_slice in values.items()]
    yield Table(caption=caption, head=["Model", *metrics], rows=rows)


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Names in a given order; others behind, by name."""
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))
