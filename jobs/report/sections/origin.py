"""What was read and written, with digests, and how to ask on."""

from __future__ import annotations

from typing import Any

from jobs.report.blocks import Table
from jobs.report.facts import Facts
from jobs.report.words import short


def section(facts: Facts) -> dict[str, Any]:
    """Code, recipes, and the digests of everything read and written; None where none is recorded."""
    runs = facts.night.runs
    rows = [
        [run.name, did, name, short(digest)]
        for run in runs
        for did, things in (("read", run.result.get("inputs", {})), ("wrote", run.result.get("outputs", {})))
        for name, digest in things.items()
        if digest
    ]
    head = ["Job", "It", "What", "Digest"]
    return {
        "code": ", ".join(sorted({str(run.manifest.get("code_revision", "unknown")) for run in runs})) or "unknown",
        "recipes": ", ".join(sorted({short(run.manifest.get("recipe_sha256")) for run in runs})) or "unknown",
        "count": len(rows),
        "digests": Table(caption="What each job read and wrote", head=head, rows=rows, numeric=False) if rows else None,
        "ds": facts.night.ds,
    }
