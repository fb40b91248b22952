"""Several workers of one service: one that was killed leaves nothing behind in the metrics."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from feature_repo.serving.metrics import works
from tests.feature_repo.serving import world
from tests.feature_repo.serving.test_page import counted_whole, metrics, script
from tests.feature_repo.serving.world import publish


def children(pid: int) -> list[int]:
    """Processes that a process started and that answer: multiprocessing's helper is none."""
    found = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def until(url: str, line: str) -> str:
    """Waits for a line of the metrics. Raises AssertionError where it never comes."""
    end = time.monotonic() + 60
    while line not in (text := metrics(url)).splitlines():
        assert time.monotonic() < end, text
        time.sleep(0.1)
    return text


def test_workers_count_together_and_of_one_that_was_killed_the_gauges_leave_and_the_counts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    world.apply(tmp_path)
    publish(tmp_path, seed=1)
    serve = script()
    with serve.serving(tmp_path, WORKERS="2") as (url, process):
        # the slowest worker counts: until it has loaded, the pointer that serves is 0
        until(url, "llmemb_pointer_sequence 1.0")
        for _ in range(20):
            serve.ask(url, "/recommend", history=["i1"], k=3)
        # a worker counts an answer once it is sent, and another one may tell the metrics
        counted_whole(until(url, 'llmemb_requests_total{endpoint="/recommend",outcome="200"} 20.0'), 20)
        workers = children(process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        publish(tmp_path, seed=2)
        # the lowest of all workers counts: that of the dead one would stay 1 for ever
        text = until(url, "llmemb_pointer_sequence 2.0")
        counted_whole(text, 20)


def test_a_number_that_another_program_has_got_is_no_worker() -> None:
    assert not works(os.getppid()) and not works(1) and not works(2**22 - 1)
    assert works(os.getpid())
