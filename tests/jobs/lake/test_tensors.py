"""The line of an epoch: what is left of a training is told where it is known."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from jobs.lake import tensors


def lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, epochs: int | None, steps: list[int]) -> list[str]:
    """The lines of a training whose epochs take ten seconds each by its clock."""
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(tensors, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, logger="jobs"):
        log = tensors.progress_log("rat", epochs)
        for step in steps:
            log({"loss": 0.5}, step)
    return [record.getMessage() for record in caplog.records]


def test_seconds_left_come_from_the_epochs_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(monkeypatch, caplog, 4, [1, 2, 4]) == [
        "epoch 1  loss 0.5  at most 30 s to go",
        "epoch 2  loss 0.5  at most 20 s to go",
        "epoch 4  loss 0.5",
    ]


def test_what_was_resumed_is_timed_by_its_own_epochs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(monkeypatch, caplog, 40, [31]) == ["epoch 31  loss 0.5  at most 90 s to go"]


def test_an_unknown_number_of_epochs_gives_no_estimate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert lines(monkeypatch, caplog, None, [1]) == ["epoch 1  loss 0.5"]
