"""Feast's offline files after a power cut: the old rows or the new ones, whole; what was written is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo import offline
from tests.power_cut import Cuts


def tombstones(*item_ids: str) -> pa.Table:
    schema = offline.TABLES["item_tombstone"]
    return pa.table(
        {"item_id": list(item_ids), "forgotten_at": [0] * len(item_ids), "event_timestamp": [0] * len(item_ids)}, schema
    )


def ids(lake: Path) -> list[str] | None:
    """Ids of the one file, None where it has no name yet."""
    path = lake / "offline" / "item_tombstone" / "2026-01-01.parquet"
    if not path.exists():
        return None
    found: list[str] = pq.read_table(path)["item_id"].to_pylist()
    return found


def allowed(*states: list[str] | None) -> Callable[[Path], None]:
    def check(left: Path) -> None:
        assert ids(left) in states

    return check


def test_an_offline_file_is_the_old_one_or_the_new_one_after_a_power_cut(tmp_path: Path, cuts: Cuts) -> None:
    def write(*item_ids: str) -> Callable[[], None]:
        home = tmp_path / "lake" / "offline"
        return lambda: offline.write(home, "item_tombstone", "2026-01-01", [tombstones(one) for one in item_ids])

    assert cuts(write("a", "b"), allowed(None, ["a", "b"])) > 5
    assert cuts(write("c"), allowed(["a", "b"], ["c"])) > 5
    assert ids(tmp_path / "after") == ["c"], "what was written is there, even if nothing that was left unsynced is"


def test_an_item_that_was_forgotten_stays_forgotten_after_a_power_cut(tmp_path: Path, cuts: Cuts) -> None:
    home = tmp_path / "lake" / "offline"
    schema = offline.TABLES["item_attributes"]
    rows = pa.table({"item_id": ["a", "b"], "names": [[]] * 2, "values": [[]] * 2, "content_hash": ["h"] * 2,
                     "event_timestamp": [0] * 2}, schema)  # fmt: skip
    offline.write(home, "item_attributes", "2026-01-01", [rows])
    seen: list[list[str]] = []

    def check(left: Path) -> None:
        seen.append(pq.read_table(left / "offline" / "item_attributes" / "2026-01-01.parquet")["item_id"].to_pylist())
        assert seen[-1] in (["a", "b"], ["b"])

    cuts(lambda: offline.forget(home, ["a"]), check)
    assert seen[-1] == ["b"]
