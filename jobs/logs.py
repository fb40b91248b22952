"""One JSON line a job's end for log collectors, of fields on an allow-list: what is not named here never reaches a log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "job": str,
    "ds": str,
    "status": str,
    "started_at": str,
    "seconds": (int, float),
    "code_revision": str,
    "recipe_sha256": str,
}
"""Of a manifest: whole values of these types. Errors stay out: their text may quote what was read."""
COUNTS = "rows"
"""Row counts by table, the only nested field."""


def line(manifest: Mapping[str, Any]) -> str:
    """The JSON line of a manifest."""
    kept: dict[str, Any] = {name: manifest[name] for name, kind in FIELDS.items() if isinstance(manifest.get(name), kind)}
    counts = manifest.get(COUNTS)
    if isinstance(counts, Mapping):
        kept[COUNTS] = {str(name): count for name, count in counts.items() if isinstance(count, int)}
    return json.dumps(kept, sort_keys=True)
