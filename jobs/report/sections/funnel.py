"""From records seen to vectors served, and what was refused by reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.lake.nights import Night
from jobs.report import plots as plots
from jobs.report.blocks import Figure, Table
from jobs.report.facts import Facts
from jobs.report.words import number


def section(facts: Facts) -> dict[str, Any]:
    """Steps of the items, counts of the logs, and the quarantine; nothing but `ended` where `extract` did not end well."""
    extract = facts.night.result("extract")
    if not extract:
        return {"ended": False}
    steps = item_steps(facts.night)
    refused = sorted(extract.get("quarantined", {}).items(), key=lambda pair: -pair[1])
    reasons = [[reason, f"{count:,}"] for reason, count in refused]
    return {
        "ended": True,
        "steps": funnel([(name, float(value)) for name, value in steps if value is not None]),
        "absent": ", ".join(name.lower() for name, value in steps if value is None),
        "logs": Table(caption="Logs and users", head=["What", "Count"], rows=log_rows(extract)),
        "quarantine": Table(caption="Quarantine, by reason", head=["Reason", "Records"], rows=reasons) if reasons else None,
    }


def item_steps(night: Night) -> list[tuple[str, float | None]]:
    """(step, items), from the source table to the store; None where the job has not ended well."""
    extract, project, publish = (night.result(job) for job in ("extract", "project", "publish"))
    refused = sum(count for reason, count in extract.get("quarantined", {}).items() if reason.startswith("items:"))
    embedded = night.total("embed", "embedded") + night.total("embed", "resumed") if night.done("embed") else None
    return [
        ("Item records seen", extract.get("seen", {}).get("items")),
        ("Refused, in quarantine", refused),
        ("Items of the snapshot", extract.get("rows", {}).get("items")),
        ("New since the last snapshot", extract.get("new_items")),
        ("Text changed since", extract.get("changed_items")),
        ("Texts embedded this night", embedded),
        ("Vectors of the space", project.get("rows", {}).get("item_embeddings")),
        ("Vectors that serve", publish.get("items")),
    ]


def funnel(known: Sequence[tuple[str, float]]) -> Figure:
    """The steps as bars, what was refused in another colour."""
    colours = [plots.BAD if name.startswith("Refused") else plots.GOOD for name, _ in known]
    words = "; ".join(f"{name.lower()} {value:,.0f}" for name, value in known)
    picture = plots.bars("funnel", [name for name, _ in known], [value for _, value in known], "items", colours)
    return Figure(picture=picture, words=f"Items: {words}.")


def log_rows(extract: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of logs and users."""
    counts = [
        ("Events seen", extract.get("seen", {}).get("interactions")),
        ("Events taken from the last snapshot", extract.get("carried")),
        ("Events kept", extract.get("rows", {}).get("interactions")),
        ("Events after this date, left for later", extract.get("later")),
        ("Users", extract.get("rows", {}).get("sequences")),
        ("Items left out because they were forgotten", extract.get("forgotten")),
    ]
    return [[name, number(value)] for name, value in counts]
