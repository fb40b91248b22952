"""The catalogue of a snapshot has no forgotten item, whoever reads it; a title is one thing everywhere."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from jobs.lake import partitions
from jobs.lake.items import bury, content_hash, live_items, title, titles, without_forgotten
from jobs.lake.tables import ATTRIBUTES, ITEMS

DS = "2026-03-10"


def write(lake: Path, pairs: dict[str, list[tuple[str, str]]]) -> None:
    attributes = [[{"name": name, "value": value} for name, value in item] for item in pairs.values()]
    rows = {"item_id": list(pairs), "attributes": pa.array(attributes, ATTRIBUTES),
            "content_hash": [content_hash(item) for item in pairs.values()], "first_seen_ds": [DS] * len(pairs)}  # fmt: skip
    partitions.write(lake, ITEMS, f"ds={DS}", [pa.table(rows)])


def ids(lake: Path) -> list[str]:
    return [item for batch in live_items(lake, f"ds={DS}", ("item_id",)) for item in batch["item_id"].to_pylist()]


def test_forgotten_items_are_in_no_catalogue(tmp_path: Path) -> None:
    write(tmp_path, {name: [("title", name)] for name in "abc"})
    assert ids(tmp_path) == ["a", "b", "c"]
    bury(tmp_path, "b", DS)
    assert ids(tmp_path) == ["a", "c"]
    batch = pa.record_batch({"item_id": ["b", "c"], "score": [1, 2]})
    assert [kept.to_pylist() for kept in without_forgotten(tmp_path, [batch])] == [[{"item_id": "c", "score": 2}]]


def test_a_title_is_the_attribute_title_else_the_first_else_the_id(tmp_path: Path) -> None:
    write(tmp_path, {"a": [("brand", "B"), ("title", "A")], "b": [("brand", "B")]})
    assert titles(tmp_path, DS, ["a", "b", "gone"]) == {"a": "A", "b": "B", "gone": "gone"}
    assert title("x", []) == "x"
