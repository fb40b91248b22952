"""Measures of the night against their own history."""

from __future__ import annotations

from typing import Any

from jobs.report.blocks import Table
from jobs.report.facts import Facts
from jobs.report.words import number

ORDER = {"alarm": 0, "steady": 1, "too few nights": 2}


def section(facts: Facts) -> dict[str, Any]:
    """The table of measures, alarms first; None where nothing could be measured."""
    rows = [
        [
            found.name,
            number(found.value),
            number(found.median),
            number(found.allowed),
            found.nights,
            f"! {found.verdict}" if found.verdict == "alarm" else found.verdict,
        ]
        for found in sorted(facts.measures, key=lambda found: (ORDER[found.verdict], found.name))
    ]
    head = ["Measure", "Tonight", "Median before", "Allowed distance", "Nights", "Verdict"]
    return {"measures": Table(caption="Measures of this night", head=head, rows=rows) if rows else None}
