"""Faults: killed at random instants and run again, all ends as in a calm run, and readers notice nothing."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gc
import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from feature_repo.reader import Answer, Pointer

HARNESS = Path(__file__).parents[1] / "benchmarks" / "bench_faults.py"


def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The bench as a module, which leaves the environment as it was."""
    # set first, so that what the harness sets is taken back at the end too
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REPLICAS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("bench_faults", HARNESS)
    assert spec is not None and spec.loader is not None
    harness = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_faults", harness)
    spec.loader.exec_module(harness)
    return harness


@pytest.mark.parametrize("store", ["sqlite", "redis", "sentinel", "postgres", "standby"])
def test_killed_and_run_again_all_ends_equal(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kills; `python tests/benchmarks/bench_faults.py --kills 200` is the long run."""
    monkeypatch.setenv("LLMEMB_LEASE_MS", "1500")
    harness = loaded(monkeypatch)
    masters: list[Any] = []
    with harness.servers(store, tmp_path, masters) as online:
        result = harness.shift(argparse.Namespace(store=store, kills=3, minutes=0, readers=1, seed=7), tmp_path, online, masters)
    assert result["kills"] >= 3
    assert result["reads"] > 0
    assert {name: result[name] for name in harness.FAILURES} == dict.fromkeys(harness.FAILURES, 0)


def test_the_checker_of_order_finds_what_end_states_hide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each fault that it is there to find, put in by hand."""
    harness = loaded(monkeypatch)
    written = dt.datetime(2026, 1, 2, tzinfo=dt.UTC)

    def answer(space: str, sequence: int, version: int, of: str = "", missing: tuple[str, ...] = ()) -> Answer:
        about = {"recommender_id": "", "ds": "2026-01-01", "width": 8, "codec": "float32", "items": 1, "previous": None}
        pointer = Pointer(space_id=space, sequence=sequence, written=written, **about)
        row = np.frombuffer(harness.vector(of or space, "m1", version), np.float32)
        return Answer(pointer=pointer, item_ids=["m1"], vector_ND=row[None], as_of=[written], missing=list(missing), deleted=[])

    def faults(*seen: tuple[Answer, int, int]) -> set[str]:
        watcher = harness.Watcher(5)
        found = [watcher.judge(given, acknowledged, epoch, epoch) for given, acknowledged, epoch in seen]
        return {name for one in found for name, count in one.items() if count}

    assert faults((answer("a", 1, 0), 0, 0), (answer("a", 1, 2), 1, 0), (answer("b", 2, 1), 2, 0)) == set()
    assert faults((answer("a", 1, 0, of="b"), 0, 0)) == {"mixed"}
    assert faults((answer("a", 1, 0, missing=("m2",)), 0, 0)) == {"lost"}
    assert faults((answer("a", 2, 0), 0, 0), (answer("a", 1, 0), 0, 0)) == {"went_back"}
    assert faults((answer("a", 1, 3), 0, 0), (answer("a", 1, 2), 0, 0)) == {"went_back"}
    assert faults((answer("a", 2, 0), 0, 0), (answer("a", 1, 0), 0, 1)) == {"undone"}
    assert faults((answer("a", 1, 0), 2, 0)) == {"acknowledged_lost"}
    acts = [("acquire", "A", 0, 1), ("write", "A", 2, 3), ("acquire", "B", 4, 6), ("write", "B", 7, 8), ("write", "A", 5, 9)]
    journal = tmp_path / "journal.jsonl"
    for more, count in (([], 0), ([("write", "A", 10, 11)], 1)):
        lines = [dict(zip(("act", "lease", "began", "ended"), act, strict=True)) for act in [*acts, *more]]
        journal.write_text("\n".join(map(json.dumps, lines)))
        assert harness.double_writers(journal) == count


def test_no_database_of_the_bench_is_open_when_it_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is forked beside one reads what is old: SQLite takes its parent's locks for its own."""
    harness = loaded(monkeypatch)
    path = tmp_path / "online.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE llmemb_x (entity_key, feature_name, value, event_ts)")
    gc.disable()  # a connection that nobody closed waits for it
    try:
        assert harness.dump(tmp_path, json.dumps({"type": "sqlite", "path": str(path)}))["llmemb_x"] == []
        assert not [file.path for file in psutil.Process().open_files() if str(tmp_path) in file.path]
    finally:
        gc.enable()
