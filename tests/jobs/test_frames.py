"""The front door: two frames in, three frames out, by the same jobs; the page of documentation that shows it runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jobs import frames
from jobs.run import InputError

ROOT = Path(__file__).parents[2]
ITEMS = pd.DataFrame({"item_id": ["a"], "title": ["A"]})
EVENTS = pd.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]})


def test_the_example_of_the_documentation_runs_and_gives_three_frames() -> None:
    shown = runpy.run_path(str(ROOT / "docs" / "ten_lines.py"))
    answer, items = shown["answer"], shown["items"]
    assert len(answer.embeddings) == len(items)
    assert all(np.isfinite(vector).all() for vector in answer.embeddings["embedding"])
    assert set(answer.embeddings.query("item_id == '79'")["group"]) == {"cold"}
    counts = answer.recommendations.groupby("user_id").size()
    assert (len(counts), set(counts)) == (60, {5})
    had = set(zip(shown["events"]["user_id"].astype(str), shown["events"]["item_id"].astype(str), strict=True))
    assert not had & set(zip(answer.recommendations["user_id"], answer.recommendations["item_id"], strict=True))
    assert answer.recommendations["score"].groupby(answer.recommendations["user_id"]).is_monotonic_decreasing.all()
    assert {"llmemb", "popularity"} <= set(answer.metrics["model"])


@pytest.mark.parametrize(
    ("items", "events", "says"),
    [
        (ITEMS.rename(columns={"item_id": "sku"}), EVENTS, "items has no column 'item_id'; it has sku, title"),
        (ITEMS, EVENTS.drop(columns="timestamp"), "events has no column 'timestamp'"),
        (ITEMS[["item_id"]], EVENTS, "at least a title"),
        (ITEMS, EVENTS[:0], "there are 0 events"),
    ],
)
def test_what_is_missing_is_named(items: pd.DataFrame, events: pd.DataFrame, says: str) -> None:
    with pytest.raises(InputError, match=says):
        frames.recommend_from_frames(items, events)


@pytest.mark.parametrize("times", [["2026-01-02"], pd.to_datetime(["2026-01-02"]), [1767312000]])
def test_dates_texts_and_seconds_are_one_time(times: object) -> None:
    assert frames.as_seconds(pd.Series(times)).tolist() == [1767312000]
