"""The search for weights gives signs of life."""

from __future__ import annotations

import logging

import pytest

from jobs.rat import fuse


def test_the_search_for_weights_says_every_few_seconds_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(fuse.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO):
        tried = fuse.counter()
        for _ in range(40):
            now[0] += 0.5
            tried()
    assert [record.getMessage() for record in caplog.records] == [
        f"parts: {tries} weights tried on the validation cases" for tries in (16, 32)
    ]
