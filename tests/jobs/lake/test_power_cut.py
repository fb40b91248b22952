"""After a power cut at any instant the lake holds the old rows or the new ones, whole; nothing that was written is lost.

The disk is simulated (tests/power_cut.py): each disk that a power cut could leave is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.lake import artifacts, partitions
from jobs.lake.items import bury, tombstones
from jobs.lake.partitions import write_json
from jobs.lake.tables import ITEMS
from tests.jobs.lake.test_partitions import items
from tests.power_cut import Cuts


def rows(lake: Path) -> list[str] | None:
    """Ids of the partition, None where nothing is committed."""
    if not partitions.committed(lake, "items"):
        return None
    found: list[str] = partitions.read(lake, ITEMS, "ds=2026-01-01")["item_id"].to_pylist()
    return found


def write(lake: Path, *parts: pa.Table) -> None:
    partitions.write(lake, ITEMS, "ds=2026-01-01", parts)


def test_a_partition_is_the_old_one_or_the_new_one_after_a_power_cut(tmp_path: Path, cuts: Cuts) -> None:
    lake = tmp_path / "lake"

    def allowed(*states: list[str] | None) -> Callable[[Path], None]:
        def check(left: Path) -> None:
            assert rows(left) in states

        return check

    assert cuts(lambda: write(lake, items("a"), items("b")), allowed(None, ["a", "b"])) > 20
    assert cuts(lambda: write(lake, items("c"), items("b")), allowed(["a", "b"], ["c", "b"])) > 20


@pytest.fixture
def finished(tmp_path: Path, cuts: Cuts) -> Callable[[Callable[[], Any]], Path]:
    """The lake that is left by a power cut right after a program's end, of what was synced alone."""

    def run(program: Callable[[], Any]) -> Path:
        last: list[Path] = []
        cuts(program, lambda left: last.append(left))
        return last[-1]

    return run


def test_what_a_writer_has_returned_from_is_there(tmp_path: Path, finished: Callable[[Callable[[], Any]], Path]) -> None:
    lake = tmp_path / "lake"
    assert rows(finished(lambda: write(lake, items("a")))) == ["a"]
    assert rows(finished(lambda: write(lake, items("b"), items("c")))) == ["b", "c"]
    left = finished(lambda: write_json(lake / "manifests" / "ds=2026-01-01" / "extract.json", {"x": 1}))
    assert (left / "manifests" / "ds=2026-01-01" / "extract.json").read_text()
    assert tombstones(finished(lambda: bury(lake, "m4", "2026-01-01"))) == {"m4"}


@pytest.fixture
def staged(tmp_path: Path) -> Iterator[Path]:
    """An artifact that was made but not kept yet."""
    (tmp_path / "lake").mkdir()
    home = artifacts.stage(tmp_path / "lake", "encoder")
    (home / "lora").mkdir()
    (home / "encoder.json").write_text("{}")
    (home / "lora" / "weights").write_bytes(b"weights")
    yield home


def test_an_artifact_is_whole_or_absent_after_a_power_cut(tmp_path: Path, cuts: Cuts, staged: Path) -> None:
    lake, kept = tmp_path / "lake", partitions.digest_folder(staged)[:16]

    def check(left: Path) -> None:
        found = left / "models" / "encoder" / kept
        assert not found.is_dir() or partitions.digest_folder(found)[:16] == kept

    assert cuts(lambda: artifacts.keep(lake, "encoder", staged), check) > 5
    assert (tmp_path / "after" / "models" / "encoder" / kept).is_dir(), "and is there once it was kept"
