"""A lost day, or half of one, is seen against its own history; what days do anyway is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jobs.extract.volume import date, day_number, short_days, shrunk_days

TODAY = day_number("2026-03-10")
Days = list[tuple[int, int]]


def days(level: float, weekend: float = 1.0, noise: float = 0.0, seed: int = 0) -> Days:
    """A hundred days up to TODAY of about `level` events; `weekend` is the level of Saturdays and Sundays, `noise` of all."""
    draw = np.random.default_rng(seed)
    scale = [level * (weekend if (day + 3) % 7 in (5, 6) else 1) for day in range(TODAY - 99, TODAY + 1)]
    return [(TODAY - 99 + n, int(draw.poisson(each * np.exp(draw.normal(0, noise))))) for n, each in enumerate(scale)]


def told(found: Days, after: int = TODAY - 1) -> list[str]:
    return [date(short.day) for short in short_days(found, after, TODAY, 0.5)]


@pytest.mark.parametrize("level", [50, 1_000, 1_000_000])
def test_a_lost_day_of_a_hundred_is_seen(level: float) -> None:
    found = days(level)
    assert told(found) == []
    assert told(found[:-1]) == ["2026-03-10"]
    assert told([*found[:-1], (TODAY, found[-1][1] // 4)]) == ["2026-03-10"]
    assert told([each for each in found if each[0] != TODAY - 2], after=TODAY - 5) == ["2026-03-08"]


def test_a_day_is_held_against_its_weekday() -> None:
    found = days(1_000, weekend=0.2)
    sunday = day_number("2026-03-08")
    until_sunday = [each for each in found if each[0] <= sunday]
    assert short_days(until_sunday, sunday - 1, sunday, 0.5) == [], "a fifth of a weekday's is usual"
    assert told([*found[:-1], (TODAY, 200)]) == ["2026-03-10"], "but not on a Tuesday"


def test_days_that_differ_much_anyway_do_not_alarm() -> None:
    worlds = itertools.product((3, 20, 1_000), (0.25, 1.0), (0.0, 0.5), range(50))
    alarms = sum(bool(told(days(*world))) for world in worlds)
    assert alarms <= 3, "of 600 nights"


def test_a_short_or_a_quiet_history_judges_nothing() -> None:
    assert told([each for each in days(1_000)[:-1] if each[0] >= TODAY - 13]) == []
    assert told(days(5)[:-1]) == []
    assert short_days([], TODAY - 1, TODAY, 0.5) == []


def test_a_day_that_lost_its_events_since_it_was_read_is_seen() -> None:
    before = {"2026-03-08": 100, "2026-03-09": 1_000, "2026-03-10": 12, "2026-03-11": 500}
    now = [(TODAY - 2, 60), (TODAY - 1, 400)]
    assert [(date(short.day), short.events, short.usual) for short in shrunk_days(now, before, TODAY, 0.5)] == [
        ("2026-03-09", 400, 1_000)
    ]
