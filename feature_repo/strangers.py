"""Rows of a space that it should not have: of items that left, or that a killed publishing wrote; found and removed."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_repo import feature_definitions as views
from feature_repo.keys import key_texts, serialized
from feature_repo.leases import Store
from feature_repo.transport import entity_keys

DELETES = 1_000


def outside(ids: Sequence[str], hash_N: npt.NDArray[np.int64]) -> list[str]:
    """Those ids that are not among the sorted hashes of `inspect`, of which there is at least one."""
    asked_N = np.fromiter(map(hash, ids), np.int64, len(ids))
    at_N = np.minimum(np.searchsorted(hash_N, asked_N), len(hash_N) - 1)
    return [ids[int(number)] for number in np.flatnonzero(hash_N[at_N] != asked_N)]


def strangers(store: Store, space_id: str, hash_N: npt.NDArray[np.int64], *, all_keys: bool = False) -> Iterator[list[str]]:
    """Items with a row in a space that are not among `hash_N` (of `inspect`), in bounded lists.

    With `all_keys` every key of the store is read: it finds also rows that another program wrote and no list names.
    """
    if not all_keys:
        for ids in store.members(space_id):
            yield outside(ids, hash_N)
        return
    for keys in store.keys(views.item_embedding):
        found = [key_texts(views.item_embedding, key) for key in set(keys)]
        yield outside([item_id for item_id, own in found if own == space_id], hash_N)


def remove_strangers(store: Store, space_id: str, hash_N: npt.NDArray[np.int64]) -> int:
    """Removes rows of items that are not among `hash_N` from a space, whenever and by whom they were written; returns how many.

    Items that left the catalogue lose their row so, also those that left while a publishing of this space lay killed. Raises
    Fenced when the lease is lost.
    """
    removed = 0
    for ids in strangers(store, space_id, hash_N):
        store.renew()
        removed += remove_items(store, space_id, ids)
    return removed


def remove_items(store: Store, space_id: str, item_ids: Sequence[str]) -> int:
    """Removes some items of one space, and their codes."""
    keys = [serialized(key) for key in entity_keys({"item_id": item_ids, "space_id": [space_id] * len(item_ids)})]
    for part in batched(keys, DELETES):
        store.delete(views.item_embedding, part)
        delete_codes(store, part)
    return len(keys)


def delete_codes(store: Store, keys: Sequence[bytes]) -> None:
    """Removes the codes of some serialized keys. A store that never had any stays as it is."""
    try:
        store.delete(views.item_codes, keys)
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise


def batched(values: Sequence[Any], size: int) -> Iterator[Any]:
    """Slices of at most `size`."""
    for start in range(0, len(values), size):
        yield values[start : start + size]
