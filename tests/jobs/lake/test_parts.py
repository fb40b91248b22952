"""Parts that nights add to one partition: few stay small, readers and kills find a whole table, what was forgotten stays away."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.forget import tables
from jobs.lake import partitions, unnamed
from jobs.lake import parts as finished_parts
from jobs.lake import store as stores
from jobs.lake.items import bury
from jobs.lake.partitions import Commit
from jobs.lake.parts import FEW, commit_parts, part_path, write_part
from jobs.lake.tables import llm_embeddings
from jobs.run import Run, Unavailable
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store

TABLE, HOME = llm_embeddings(4), "encoder=e/shard=00000-of-00002"


@pytest.fixture(params=["folder", "bucket"])
def lake(request: pytest.FixtureRequest, object_store: ObjectStore, tmp_path: Path) -> Path:
    where = Path(object_store.address()) if request.param == "bucket" else tmp_path / "lake"
    return Run(ds="2026-01-01", lake=where).lake


def rows(*ids: str, kind: Any = np.float16) -> pa.Table:
    """Each with a vector of its own."""
    values = np.asarray([[len(item), *item[-3:].encode().ljust(3)] for item in ids], kind).ravel()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), 4)
    return pa.table({"item_id": ids, "content_hash": [f"h {item}" for item in ids], "embedding": vectors})


def night(lake: Path, *ids: str, full: int = 1_000, home: str = HOME) -> Commit:
    """What `embed` does with the texts that it embedded."""
    parts = [part_path(lake, TABLE, home, "-".join(ids))] if ids else []
    for part in parts:
        write_part(part, rows(*ids))
    return commit_parts(lake, TABLE, home, parts, full)


def ids_of(lake: Path, home: str = HOME) -> list[str]:
    found: list[str] = partitions.read(lake, TABLE, home)["item_id"].to_pylist()
    return found


def state(lake: Path) -> tuple[str, tuple[str, ...]]:
    """Names of parts bear their digests."""
    commit = partitions.read_commit(lake, TABLE.name, HOME)
    return commit.digest, commit.files


def test_nights_add_no_more_than_a_few_parts_to_what_a_reader_opens(lake: Path) -> None:
    night(lake, "base", "other")
    counts = [len(night(lake, f"n{number}").files) for number in range(30)]
    assert max(counts) == FEW and min(counts) == 1
    assert ids_of(lake) == ["base", "other", *(f"n{number}" for number in range(30))]
    kept = {row["item_id"]: row["embedding"] for row in partitions.read(lake, TABLE, HOME).to_pylist()}
    assert kept["n7"] == rows("n7")["embedding"][0].as_py() != kept["n8"]


def test_requests_of_a_reader_are_those_of_few_parts_after_any_number_of_nights(object_store: ObjectStore) -> None:
    lake, asked = Run(ds="2026-01-01", lake=Path(object_store.address())).lake, list[Counter[str]]()
    for number in range(4 * (FEW + 1)):
        night(lake, f"n{number}")
        object_store.seen.clear()
        assert len(ids_of(lake)) == number + 1
        asked.append(object_store.counts())
    assert asked[FEW:] == (asked[FEW : 2 * FEW] * 4)[: len(asked[FEW:])]


def test_full_parts_stay_the_files_that_they_are_and_no_part_grows_past_one(lake: Path) -> None:
    first = night(lake, *(f"b{number}" for number in range(10)), full=10)
    for number in range(40):
        commit = night(lake, f"n{number}", f"m{number}", full=10)
        assert commit.files[0] == first.files[0] and max(commit.counts) <= 10
        assert len(commit.files) <= 1 + commit.rows // 5 + FEW
    assert len(ids_of(lake)) == len(set(ids_of(lake))) == 90


def test_a_night_without_texts_and_a_rerun_leave_the_same_bytes(lake: Path) -> None:
    for number in range(FEW + 1):
        night(lake, f"n{number}")
    before = state(lake)
    night(lake)
    assert state(lake) == before and len(before[1]) == 1


def test_a_shard_s_parts_are_joined_with_no_other_shard_s(lake: Path) -> None:
    other = HOME.replace("00000-of", "00001-of")
    for number in range(FEW + 1):
        night(lake, f"n{number}")
        night(lake, f"o{number}", home=other)
    assert (ids_of(lake)[0], ids_of(lake, other)[0], len(ids_of(lake, other))) == ("n0", "o0", FEW + 1)


class Killed(BaseException):
    """Stands for a kill."""


def killing(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, at: int) -> None:
    """The call number `at` dies before it does anything."""
    whole, calls = getattr(target, name), [0]

    def call(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise Killed
        return whole(*given, **named)

    monkeypatch.setattr(target, name, call)


@pytest.mark.parametrize(("what", "at"), [("add", 1), ("read", 1), ("write", 1), ("join", 2), ("end", 1)])
def test_killed_anywhere_in_a_join_the_table_is_whole_and_the_rerun_ends_with_the_same_bytes(
    lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, at: int
) -> None:
    calm = tmp_path / "calm"
    for number in range(FEW + 1):
        night(calm, f"n{number}")
    for number in range(FEW):
        night(lake, f"n{number}")
    last = f"n{FEW}"
    write_part(part_path(lake, TABLE, HOME, last), rows(last))
    target, name = {
        "add": (partitions, "commit_files"), "read": (partitions, "opened"), "write": (finished_parts, "write_part"),
        "join": (partitions, "commit_files"), "end": (finished_parts.shutil, "rmtree"),
    }[what]  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, target, name, at)
        commit_parts(lake, TABLE, HOME, [part_path(lake, TABLE, HOME, last)], 1_000)
    assert ids_of(lake) == [f"n{number}" for number in range(FEW + (what != "add"))]
    if what == "add":
        commit_parts(lake, TABLE, HOME, [part_path(lake, TABLE, HOME, last)], 1_000)
    else:
        night(lake)  # all texts are known
    assert state(lake) == state(calm)
    assert not list(partitions.folder(lake, TABLE.name, HOME).glob(".parts/*"))


def reading(lake: Path, commit: Commit) -> Iterator[str]:
    """A reader that has read the commit, and opens its files one by one."""
    for name in commit.files:
        with partitions.opened(lake, f"{TABLE.name}/{HOME}/{name}") as file:
            yield from file.read()["item_id"].to_pylist()


def test_a_reader_of_the_commit_of_before_ends_unbroken_and_old_parts_go_later(lake: Path) -> None:
    for number in range(FEW):
        night(lake, f"n{number}")
    reader = reading(lake, partitions.read_commit(lake, TABLE.name, HOME))
    assert next(reader) == "n0"
    assert len(night(lake, f"n{FEW}").files) == 1
    assert list(reader) == [f"n{number}" for number in range(1, FEW)]
    night(lake, "later")
    here = partitions.folder(lake, TABLE.name, HOME)
    if store := stores.of(lake):
        assert unnamed.parts(store, 3_600, dry_run=False) == {}, "who reads them may be under way"
        assert len(unnamed.parts(store, -1, dry_run=False)) == FEW + 1
    else:
        assert len(list(here.glob("part-*.parquet"))) == 2
    assert ids_of(lake) == [*(f"n{number}" for number in range(FEW + 1)), "later"]


def test_a_reader_that_outlives_two_nights_is_told_to_run_again(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for number in range(FEW):
        night(lake, f"n{number}")
    reader = reading(lake, partitions.read_commit(lake, TABLE.name, HOME))
    next(reader)
    for late in ("late", "later"):
        night(lake, late)
    with pytest.raises(Unavailable, match="was replaced while it was read"):
        list(reader)


def test_a_join_leaves_rows_of_forgotten_items_to_forget_as_their_texts_may_be_another_s(lake: Path) -> None:
    for number in range(FEW):
        night(lake, f"n{number}")
    bury(lake, "n2", "2026-01-05")
    assert len(night(lake, f"n{FEW}").files) == 1
    assert ids_of(lake) == [f"n{number}" for number in range(FEW + 1)]


def test_forgetting_after_a_join_finds_the_item_in_the_joined_part_and_in_those_that_it_replaced(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for number in range(FEW + 1):
        night(lake, f"n{number}")
    gone = frozenset({"n2"})
    assert tables.forget_tables(lake, gone)[0] == {TABLE.name: 1}
    tables.drop_leftovers(lake, gone)
    assert "n2" not in ids_of(lake) and len(ids_of(lake)) == FEW
    assert not [path for path in lake.rglob("*.parquet") if b"n2" in path.read_bytes()]
    night(lake, "later")
    assert ids_of(lake)[-1] == "later"


def at_the_last_moment(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Does something once, between what the next commit has read and its own work."""
    whole, done = partitions.commit_files, threading.Event()

    def commit(*given: Any, **named: Any) -> Commit:
        if not done.is_set():
            done.set()
            act()
        return whole(*given, **named)

    monkeypatch.setattr(partitions, "commit_files", commit)


def test_what_a_night_adds_while_an_item_is_forgotten_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = tmp_path / "lake"
    night(lake, "a", "b")
    at_the_last_moment(monkeypatch, lambda: night(lake, "c"))
    with pytest.raises(Unavailable, match="another writer committed it"):
        tables.forget_tables(lake, frozenset({"a"}))
    assert ids_of(lake) == ["a", "b", "c"]
    tables.forget_tables(lake, frozenset({"a"}))
    assert ids_of(lake) == ["b", "c"]


def test_a_night_never_brings_back_what_was_forgotten_while_it_committed(
    lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(lake, "a", "b")

    def forgotten() -> None:
        if stores.of(lake):
            partitions.write(lake, TABLE, HOME, [rows("b")])
        else:
            tables.forget_tables(lake, frozenset({"a"}))

    at_the_last_moment(monkeypatch, forgotten)
    with pytest.raises(Unavailable, match="another writer committed it"):
        night(lake, "c")
    assert ids_of(lake) == ["b"]
    night(lake, "c")
    assert ids_of(lake) == ["b", "c"]


def test_parts_of_another_number_type_stay_as_they_are(lake: Path) -> None:
    wide = part_path(lake, TABLE, HOME, "wide")
    write_part(wide, rows("w", kind=np.float32))
    commit_parts(lake, llm_embeddings(4, "float32"), HOME, [wide], 1_000)
    first = partitions.read_commit(lake, TABLE.name, HOME).files[0]
    for number in range(3 * FEW):
        commit = night(lake, f"n{number}")
        assert commit.files[0] == first and len(commit.files) <= 1 + FEW
    assert partitions.read_schema(lake, TABLE.name, HOME).field("embedding").type.value_type == pa.float32()
