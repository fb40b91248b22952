"""Faults: killed at random instants and run again, all ends as in a calm run, and readers notice nothing."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "benchmarks" / "bench_faults.py"


@pytest.mark.parametrize("store", ["sqlite", "redis"])
def test_killed_and_run_again_all_ends_equal(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kills; `python tests/benchmarks/bench_faults.py --kills 200` is the long run."""
    monkeypatch.setenv("LLMEMB_LEASE_MS", "1500")
    spec = importlib.util.spec_from_file_location("bench_faults", HARNESS)
    assert spec is not None and spec.loader is not None
    harness = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_faults", harness)
    spec.loader.exec_module(harness)
    with harness.servers(store, tmp_path) as online:
        result = harness.shift(argparse.Namespace(store=store, kills=3, readers=1, seed=7), tmp_path, online)
    assert result["kills"] >= 3
    assert result["reads"] > 0
    assert {name: result[name] for name in harness.FAILURES} == dict.fromkeys(harness.FAILURES, 0)
