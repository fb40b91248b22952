"""Manifests: what a job read and wrote, with the digests (`manifests/ds=DATE/JOB.json`).

They chain from an online vector back to the source snapshot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.run import InputError

KEPT = ("device", "embedded", "resumed", "tokens", "tokens_per_second", "written")
"""Of a Result, what stays known of a run after the job has run again for the same date."""
ATTEMPTS = 20
"""Earlier runs that a manifest tells of, at most."""


def path_of(lake: Path, ds: str, job: str) -> Path:
    """Where a job's manifest of one date lies."""
    return lake / "manifests" / f"ds={ds}" / f"{job}.json"


def read(lake: Path, ds: str, job: str) -> dict[str, Any]:
    """The newest manifest of a job at or before `ds` that ended well. Raises InputError where there is none."""
    found = [
        path
        for path in sorted((lake / "manifests").glob(f"ds=*/{job}.json"))
        if path.parent.name <= f"ds={ds}" and json.loads(path.read_text())["status"] == "done"
    ]
    if not found:
        raise InputError(f"no run of {job!r} at or before {ds} in the lake {lake}: run `python -m jobs {job}` first")
    value: dict[str, Any] = json.loads(found[-1].read_text())
    return value


def runs_so_far(manifest: Path) -> list[dict[str, Any]]:
    """Runs that a manifest, about to be replaced, tells of: their end, time and what they did, oldest first; of many the last."""
    try:
        known = json.loads(manifest.read_text())
        own = {name: known[name] for name in ("status", "started_at", "seconds")}
        result = known.get("result") or {}
        own["result"] = {name: result[name] for name in KEPT if name in result}
        return [*known.get("earlier", []), own][-ATTEMPTS:]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
