"""Rows of `items`, in a file of their own: a process that only writes them needs nothing else of the tests."""

from __future__ import annotations

import pyarrow as pa

from jobs.lake.tables import ITEMS


def rows(*ids: str) -> pa.Table:
    attributes = [[{"name": "title", "value": item}] for item in ids]
    columns = {"item_id": ids, "attributes": attributes, "content_hash": ids, "first_seen_ds": ["2026-01-01"] * len(ids)}
    return pa.table(columns, ITEMS.schema)
