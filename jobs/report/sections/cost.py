"""Throughput, device time and cost against the nights before, and the age of what serves."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import Any

from jobs.lake.nights import Night
from jobs.report import plots as plots
from jobs.report.blocks import Figure, Table
from jobs.report.costs import churn, cost_figures, median_of, minutes, since_promotion
from jobs.report.facts import Facts
from jobs.report.words import number


def section(facts: Facts) -> dict[str, Any]:
    """Figures of the night beside their medians, what a promotion cost, ages in days, and curves over the nights."""
    nights = [*facts.before, facts.night]
    spent = since_promotion(nights, facts.gpu_hour_price)
    return {
        "costs": cost_table(facts),
        "spent": "" if spent is None else f"{spent:,.2f}",
        "serving_ds": facts.serving_ds,
        "late": days_between(facts.serving_ds, facts.night.ds) if facts.serving_ds else 0,
        "space_id": facts.space_id,
        "space_since": facts.space_since if facts.serving_ds else "",
        "old": days_between(facts.space_since, facts.night.ds) if facts.serving_ds and facts.space_since else 0,
        "over_nights": over_nights(nights) if len(nights) > 1 else [],
    }


def cost_table(facts: Facts) -> Table:
    """Each figure of the night and its median over the nights before."""
    rows = [
        [name, number(value, 3), number(median_of(figure, facts.before), 3)]
        for name, figure in cost_figures(facts.gpu_hour_price).items()
        if (value := figure(facts.night)) is not None or facts.before
    ]
    return Table(caption="Throughput and cost", head=["Figure", "Tonight", "Median before"], rows=rows)


def over_nights(nights: Sequence[Night]) -> list[Figure]:
    """Minutes, and churn where it is known, over the nights."""
    dates = [night.ds for night in nights]
    taken = plots.over_nights("minutes", dates, {"all jobs": [minutes(night) for night in nights]}, "minutes")
    figures = [Figure(picture=taken, words=f"Minutes of all jobs over {len(nights)} nights.")]
    share = {group: [churn(group)(night) for night in nights] for group in ("head", "tail", "cold")}
    if any(value is not None for values in share.values() for value in values):
        picture = plots.over_nights("churn", dates, share, "share changed")
        figures.append(Figure(picture=picture, words="Neighbour churn over the nights, by group."))
    return figures


def days_between(before: str, after: str) -> int:
    """Whole days between two dates."""
    return (dt.date.fromisoformat(after) - dt.date.fromisoformat(before)).days
