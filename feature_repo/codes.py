"""Codes of items beside their vectors, under the same keys: written where they changed, removed with the vectors.

A row names its books: who reads codes of several items compares those first, since a refit replaces rows one chunk at a time.
Shapes: N rows of a chunk, K books.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from feast.protos.feast.types.Value_pb2 import Int64List, Value

from feature_repo import feature_definitions as views
from feature_repo.keys import key_texts
from feature_repo.leases import Store
from feature_repo.reader import Reader, end_of
from feature_repo.strangers import DELETES, batched, delete_codes
from feature_repo.transport import entity_keys

FIELDS = ("codes", "number", "books_id")
Coded = tuple[list[int], int, str]
"""Codes, number, books."""


def read_codes(reader: Reader, space_id: str, ids: Sequence[str]) -> list[Coded | None]:
    """What is online of some items, in order; None where an item has no codes."""
    keys = {"item_id": list(ids), "space_id": [space_id] * len(ids)}
    rows = reader.transport.read("item_codes", keys, FIELDS) if ids else []
    return [([int(code) for code in row["codes"]], int(row["number"]), str(row["books_id"])) if "books_id" in row else None
            for _, row in rows]  # fmt: skip


def write_codes(
    store: Store, reader: Reader, space_id: str, books_id: str, ds: str,
    ids: Sequence[str], code_NK: npt.NDArray[np.int64], number_N: npt.NDArray[np.int64],
) -> int:  # fmt: skip
    """Writes the codes of those items whose row online is another; returns how many. Raises Fenced when the lease is lost."""
    wanted: list[Coded] = [(codes, number, books_id) for codes, number in zip(code_NK.tolist(), number_N.tolist(), strict=True)]
    online = read_codes(reader, space_id, ids)
    rows: list[Any] = []
    keys = entity_keys({"item_id": list(ids), "space_id": [space_id] * len(ids)})
    for key, want, now in zip(keys, wanted, online, strict=True):
        if want != now:
            codes, number, books = want
            values = {
                "codes": Value(int64_list_val=Int64List(val=codes)),
                "number": Value(int64_val=number),
                "books_id": Value(string_val=books),
            }
            rows.append((key, values, end_of(ds), None))
    if rows:
        store.write(views.item_codes, rows)
    else:
        store.renew()
    return len(rows)


def remove_left(store: Store, space_id: str, ids: Collection[str]) -> int:
    """Removes codes of a space's items that are not among `ids`: they left the catalogue. Reads all keys of the view."""
    kept, removed = set(ids), 0
    for keys in store.keys(views.item_codes):
        store.renew()
        found = [(key, key_texts(views.item_codes, key)) for key in set(keys)]
        gone = [key for key, (item_id, own) in found if own == space_id and item_id not in kept]
        for part in batched(gone, DELETES):
            delete_codes(store, part)
        removed += len(gone)
    return removed
