"""Waiting in tests, never for ever: a wait whose end does not come is a failure that says what was waited for."""

from __future__ import annotations

import time
from collections.abc import Callable

LONG = 60.0
"""Seconds: far longer than any wait here takes, on any machine."""


def until(come: Callable[[], bool], what: str, seconds: float = LONG) -> None:
    """Returns once `come()` is true. Raises AssertionError that names `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end, f"{what} did not come within {seconds:g} s"
        time.sleep(0.02)
