"""Figures as the report writes them: numbers, shares, durations, digests and messages, each short enough for a cell."""

from __future__ import annotations

import math


def number(value: object, digits: int = 4) -> str:
    """A figure for a table; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        return "–" if value is None or value == "" else str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{value:,.0f}"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share."""
    return "–" if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short(identity: object) -> str:
    """The first digits of a digest."""
    text = str(identity or "")
    return f"{text[:12]}…" if len(text) > 24 else text or "–"


def first_line(text: object) -> str:
    """A message, short enough for a line."""
    line = " ".join(str(text or "no message").split())
    return line if len(line) <= 300 else f"{line[:299]}…"
