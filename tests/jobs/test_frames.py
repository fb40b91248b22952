"""The front door: two frames in, three frames out, by the same jobs; the notebook that shows it runs in a kernel of its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from jobs import frames
from jobs.run import InputError

ROOT = Path(__file__).parents[2]
ITEMS = pd.DataFrame({"item_id": ["a"], "title": ["A"]})
EVENTS = pd.DataFrame({"user_id": ["u"], "item_id": ["a"], "timestamp": [1]})


HELD = """
import numpy as np
assert len(answer.embeddings) == len(items)
assert all(np.isfinite(vector).all() for vector in answer.embeddings["embedding"])
assert set(answer.embeddings.query("item_id == '79'")["group"]) == {"cold"}
counts = answer.recommendations.groupby("user_id").size()
assert (len(counts), set(counts)) == (60, {5})
had = set(zip(events["user_id"].astype(str), events["item_id"].astype(str), strict=True))
assert not had & set(zip(answer.recommendations["user_id"], answer.recommendations["item_id"], strict=True))
assert answer.recommendations["score"].groupby(answer.recommendations["user_id"]).is_monotonic_decreasing.all()
assert {"llmemb", "popularity"} <= set(answer.metrics["model"])
"""
"""What the notebook's frames must hold; a last cell of the test's own, since they live in the kernel."""


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    """The notebook as it is shipped."""
    return nbformat.read(ROOT / "docs" / "ten_lines.ipynb", as_version=4)


def test_the_notebook_of_the_documentation_runs_and_gives_three_frames(notebook: nbformat.NotebookNode) -> None:
    asked = nbformat.from_dict({**notebook, "cells": [*notebook.cells, nbformat.v4.new_code_cell(HELD)]})
    ran = NotebookClient(asked, timeout=280, resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = [
        cell.outputs[-1].data for cell in ran.cells if cell.cell_type == "code" and cell.outputs and "data" in cell.outputs[-1]
    ]
    assert len(shown) == 3 and all("<table" in data["text/html"] for data in shown), "three frames are shown as tables"


def test_the_notebook_is_shipped_without_outputs(notebook: nbformat.NotebookNode) -> None:
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None), "clear outputs before a commit"


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
