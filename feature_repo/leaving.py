"""Spaces that neither serve nor stand before what serves: which may go, what they take, and how they are removed."""

from __future__ import annotations

import dataclasses
import datetime as dt
from dataclasses import dataclass

from feature_repo.keys import serialized
from feature_repo.leases import Store
from feature_repo.reader import CODECS, Pointer, Reader, Space
from feature_repo.spaces import live, remove_space
from feature_repo.transport import entity_keys

SAMPLE = 100
"""Rows by which the bytes of a space are estimated."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What `collect` does, or has done."""

    removed: dict[str, int]
    """Rows of each space that goes."""
    waiting: dict[str, float]
    """Hours that other spaces have left."""
    kept: dict[str, Space]
    """The serving space and the one before."""


def due(store: Store, pointer: Pointer, grace: dt.timedelta) -> Collected:
    """Every space that neither serves nor is the one before goes, once `grace` has passed since that was first noted.

    The pointer is one read under the lease: without one, nothing tells what must stay. Half-staged spaces of a publisher that
    died go the same way. Writes nothing.
    """
    kept, now = live(pointer), dt.datetime.now(dt.UTC)
    online, notes = store.spaces(), store.notes()
    removed: dict[str, int] = {}
    waiting: dict[str, float] = {}
    for space_id in sorted(set(online) - set(kept)):
        since = dt.datetime.fromisoformat(notes.get(space_id, now.isoformat()))
        if now - since >= grace:
            removed[space_id] = online[space_id]
        else:
            waiting[space_id] = round((grace - (now - since)).total_seconds() / 3600, 2)
    return Collected(removed=removed, waiting=waiting, kept=kept)


def collect(store: Store, planned: Collected) -> Collected:
    """Removes the spaces that are `due`, and notes since when the others wait. Raises Fenced."""
    notes, now = store.notes(), dt.datetime.now(dt.UTC).isoformat()
    for space_id in set(notes) - {*planned.removed, *planned.waiting}:
        store.note(space_id, None)
    for space_id in set(planned.waiting) - set(notes):
        store.note(space_id, now)
    removed: dict[str, int] = {}
    for space_id in planned.removed:
        removed[space_id] = remove_space(store, space_id)
        store.note(space_id, None)  # last: killed before, a rerun goes on where this ended
    return dataclasses.replace(planned, removed=removed)


def row_bytes(store: Store, reader: Reader, space_id: str) -> float:
    """Bytes of a space's row, key and vector: the mean of some."""
    ids = next((ids[:SAMPLE] for ids in store.members(space_id) if ids), [])
    if not ids:
        return 0.0
    asked = {"item_id": ids, "space_id": [space_id] * len(ids)}
    rows = reader.transport.read("item_embedding", asked, [field for field, _ in CODECS.values()])
    vectors = sum(len(raw) for _, values in rows for raw in values.values())
    return (vectors + sum(len(serialized(key)) for key in entity_keys(asked))) / len(ids)
