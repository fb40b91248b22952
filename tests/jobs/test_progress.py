"""Long work says at once that it began, and then how long it will take: a bar for people, lines for logs."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from jobs import logs, progress
from jobs.progress import Progress

log = logging.getLogger("jobs.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_first_line_comes_before_the_work_and_the_next_ones_have_an_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(log, "validation", 4344) as shown:
        shown.start()
        assert "test: validation: 4,344 texts" in capsys.readouterr().err
        clock[0] += 1
        shown.add(40)
        assert capsys.readouterr().err == ""
        clock[0] += 9
        shown.add(960, "2,000 tokens/s")
        assert "validation: 1,000 of 4,344 texts, 33 s to go  2,000 tokens/s" in capsys.readouterr().err


def test_nobody_waits_ten_seconds_for_a_line() -> None:
    assert progress.EVERY_S < 10


def test_rounds_begin_anew_and_plain_work_goes_on_past_its_estimate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for rounds, lines in ((True, 2), (False, 1)):
        shown = Progress(log, "validation", 10, rounds=rounds)
        for _ in range(4):
            shown.add(5)
        assert capsys.readouterr().err.count("validation: 10 texts") == lines


def test_a_terminal_has_a_bar_and_logs_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMEMB_LOG", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logs.start()
    with Progress(log, "embedding", 10) as shown:
        shown.add(4)
        log.info("a line")
        shown.add(6)
    assert "embedding:" in terminal.getvalue()
    assert "INFO    test: a line\n" in terminal.getvalue()
    assert "of 10 texts" not in terminal.getvalue()


def test_a_collector_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("LLMEMB_LOG", "json")
    assert not progress.on_terminal()
