"""Manifests: what a job read and wrote, with the digests (`manifests/ds=DATE/JOB.json`).

They chain from an online vector back to the source snapshot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.run import InputError


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
