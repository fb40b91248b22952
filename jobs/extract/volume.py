"""Days that lack events, each held against its own history: a lost day of a hundred is one per cent of the total, and all of it.

A day is compared with the same weekday of the eight weeks before. How far below it may lie follows from how much days differ
anyway: five robust standard deviations, on a logarithmic scale, and never less than the share that the recipe names; nor may
chance alone explain it, so days of under sixteen events are never judged.
"""

from __future__ import annotations

import datetime as dt
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

HISTORY_DAYS = 56
ENOUGH_DAYS = 14
"""Days of history from which on a day is judged."""
SPREAD = 5.0
"""Allowed distance in robust standard deviations."""
ENOUGH_EVENTS = 20
"""Events of a day from which on it is seen to shrink."""


@dataclass(frozen=True, kw_only=True)
class Short:
    """A day that lacks events."""

    day: int
    """Days since 1970."""
    events: int
    usual: int
    """What its weekday had, or what it had itself when it was last read."""
    why: str


def day_number(ds: str) -> int:
    """Days since 1970."""
    return (dt.date.fromisoformat(ds) - dt.date(1970, 1, 1)).days


def date(day: int) -> str:
    """A day as YYYY-MM-DD."""
    return f"{dt.date(1970, 1, 1) + dt.timedelta(days=day)}"


def short_days(days: Sequence[tuple[int, int]], after: int, until: int, share: float) -> list[Short]:
    """Those of the days `after` (left out) to `until` that lack events; `days` are (day, events), those without any left out."""
    count = dict(days)
    first = min(count, default=until)
    found = []
    for day in range(after + 1, until + 1):
        history = range(max(first, day - HISTORY_DAYS), day)
        if len(history) >= ENOUGH_DAYS and count.get(day, 0) < (bound := least(count, history, day, share))[0]:
            found.append(Short(day=day, events=count.get(day, 0), usual=round(bound[1]), why="of its weekday"))
    return found


def least(count: Mapping[int, int], history: range, day: int, share: float) -> tuple[float, float]:
    """(The fewest events that a day may have, what its weekday has)."""
    logs = {other: math.log1p(count.get(other, 0)) for other in history}
    medians = [statistics.median([logs[other] for other in history if (other - day) % 7 == weekday]) for weekday in range(7)]
    spread = 1.4826 * statistics.median([abs(value - medians[(other - day) % 7]) for other, value in logs.items()])
    usual = math.expm1(medians[0])
    by_chance = usual - 4 * math.sqrt(max(usual, 0.0))  # of a count, four standard deviations
    return min(math.expm1(medians[0] - max(-math.log(share), SPREAD * spread)), by_chance), usual


def shrunk_days(days: Sequence[tuple[int, int]], before: Mapping[str, int], until: int, share: float) -> list[Short]:
    """Days up to `until` with less than `share` of what they had when they were last read (`before`, by date)."""
    count = dict(days)
    now = {day: count.get(day_number(day), 0) for day in before if day_number(day) <= until}
    return [
        Short(day=day_number(day), events=now[day], usual=before[day], why="when it was last read")
        for day in sorted(now)
        if before[day] >= ENOUGH_EVENTS and now[day] < share * before[day]
    ]
