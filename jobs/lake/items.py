"""What the lake knows of items: the identity of a text, and which items were forgotten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from jobs.lake.partitions import write_json


def content_hash(attributes: Iterable[tuple[str, str]]) -> str:
    """Identity of an item's text: SHA-256 over its (name, value) pairs in their order, 32 hexadecimal digits.

    Each text stands behind its length in code points, so that no two lists of pairs are written alike.
    """
    written = "".join(f"{len(name)}:{name}{len(value)}:{value}" for name, value in attributes)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def tombstones(lake: Path) -> frozenset[str]:
    """Ids of the items that were forgotten: no job may bring them back."""
    return frozenset(json.loads(path.read_text())["item_id"] for path in (lake / "tombstones").glob("*.json"))


def bury(lake: Path, item_id: str, ds: str) -> None:
    """Writes an item's tombstone, before anything of it is removed: a killed `forget` is then finished by its rerun."""
    name = hashlib.sha256(item_id.encode()).hexdigest()[:32]
    write_json(lake / "tombstones" / f"{name}.json", {"item_id": item_id, "forgotten_ds": ds})
