"""Neighbours of some items under every embedding, and neighbour churn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.report.blocks import Table
from jobs.report.facts import Facts
from jobs.report.views import Views
from jobs.report.words import percent


def section(facts: Facts) -> dict[str, Any]:
    """The table of examples, and churn against what served before; None where there is none."""
    views = facts.views
    return {
        "views": views,
        "examples": examples(views) if views is not None and views.examples else None,
        "churn": churn(facts.night.result("publish")),
    }


def examples(views: Views) -> Table:
    """An example a row, a kind of embedding a column."""
    names = list(views.examples[0].columns)
    rows = []
    for found in views.examples:
        near = [tuple(title for _, title in found.columns.get(name, [])) or "–" for name in names]
        rows.append([f"{found.title} [{found.item_id}]", found.group, *near])
    return Table(caption="Nearest items before and after", head=["Item", "Group", *names], rows=rows, numeric=False)


def churn(publish: Mapping[str, Any]) -> Table | None:
    """Neighbour churn by group."""
    if not publish.get("churn"):
        return None
    caption = (
        f"Neighbour churn against what served before ({publish.get('compatibility')}): "
        "share of the ten nearest that changed though no text did"
    )
    rows = [[group, percent(share)] for group, share in publish["churn"].items()]
    return Table(caption=caption, head=["Group", "Changed"], rows=rows)
