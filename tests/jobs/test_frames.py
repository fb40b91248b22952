"""The front door: two frames in, three frames out, by the same jobs; the notebook that shows it runs in a kernel of its own."""

from __future__ import annotations

import importlib
import logging
import types
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from jobs import frames, logs
from jobs.run import InputError, Run

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
        (pd.concat([ITEMS, ITEMS[["title"]]], axis=1), EVENTS, "items has several columns named title: rename"),
        (None, EVENTS, "items is a NoneType, no DataFrame"),
        (ITEMS, [("u", "a", 1)], "events is a list, no DataFrame"),
        (ITEMS, EVENTS.assign(timestamp=1_767_312_000_000), "looks like milliseconds: divide by 1000,"),
        (ITEMS, EVENTS.assign(timestamp=1.767312e15), "looks like microseconds: divide by 1000000,"),
        (ITEMS, EVENTS.assign(timestamp=float("inf")), "timestamp inf is no time in unix seconds"),
        (
            ITEMS,
            EVENTS.assign(timestamp=float("nan")),
            r"1 of 1 values of timestamp are missing.*dropna\(subset=\['timestamp'\]\)",
        ),
        (ITEMS, EVENTS.assign(timestamp=pd.NaT), "1 of 1 values of timestamp are missing"),
        (ITEMS, EVENTS.assign(timestamp=""), "1 of 1 values of timestamp are missing"),
        (ITEMS, EVENTS.assign(timestamp="soon"), "timestamp has 'soon', which is no date.*2026-01-31 12:00:00"),
        (ITEMS, EVENTS.assign(datetime="soon").drop(columns="timestamp"), "datetime has 'soon'"),
        (
            pd.concat([ITEMS, ITEMS.assign(item_id=None)]),
            EVENTS,
            r"items: 1 of 2 values of item_id are missing: .*items\.dropna\(subset=\['item_id'\]\)",
        ),
        (ITEMS.assign(item_id=float("nan")), EVENTS, "items: 1 of 1 values of item_id are missing"),
        (ITEMS, EVENTS.assign(item_id=pd.NA), "events: 1 of 1 values of item_id are missing"),
        (ITEMS, EVENTS.assign(user_id=None), r"1 of 1 values of user_id .*events\.dropna\(subset=\['user_id'\]\)"),
    ],
)
def test_what_is_missing_is_named(items: pd.DataFrame, events: pd.DataFrame, says: str) -> None:
    with pytest.raises(InputError, match=says):
        frames.recommend_from_frames(items, events)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"foo.bar": 5}, "settings has 'foo.bar': write JOB.KEY, of one of run, backbone, extract"),
        ({"epochs": 5}, "settings has 'epochs': write JOB.KEY"),
        ({"promote.min_users": 5}, "settings has 'promote.min_users'"),  # a job, but none that runs here
        ({"run.lake": "lake"}, "of run only device, seed, exclude_seen can be set"),
        ({"run.seed": "x"}, r"run\.seed"),
        ({"rat.training.epoks": 5}, r"unknown key rat\.training\.epoks"),
        ({"backbone.widht": 5}, r"unknown key pretrain\.backbone\.widht"),
        ({"project.recommendr": "x"}, r"unknown key project\.recommendr"),  # of the last job
        ({"rat.hidden.width": 5}, r"rat\.hidden"),
        ({"scft.base.name": "x"}, "base is a value, not a table"),
    ],
)
def test_a_setting_that_no_job_has_is_refused_before_the_first_job(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], says: str
) -> None:
    monkeypatch.setattr(frames, "work", lambda *_: pytest.fail("a job was run"))
    with pytest.raises(InputError, match=says):
        frames.recommend_from_frames(ITEMS, EVENTS, settings=settings)


def test_a_setting_of_the_run_reaches_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[int, bool]] = {}
    monkeypatch.setattr(frames, "work", lambda job, config: seen.update({job: (config.run.seed, config.run.exclude_seen)}))
    monkeypatch.setattr(frames, "answered", lambda *_: None)
    frames.recommend_from_frames(ITEMS, EVENTS, settings={"run.seed": 7, "run.exclude_seen": False})
    assert seen == dict.fromkeys(frames.JOBS, (7, False))


def test_a_setting_of_one_training_is_none_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    monkeypatch.setattr(
        frames, "work", lambda job, config: seen.update({job: config.training.epochs} if job in ("pretrain", "rat") else {})
    )
    monkeypatch.setattr(frames, "answered", lambda *_: None)
    frames.recommend_from_frames(ITEMS, EVENTS, settings={"pretrain.training.epochs": 3})
    assert seen == {"pretrain": 3, "rat": 40}


@pytest.mark.parametrize("k", [0, 2.5, "5", True, None])
def test_a_k_that_is_no_number_of_items_is_refused(k: object) -> None:
    with pytest.raises(InputError, match="give a whole number of at least 1"):
        frames.recommend_from_frames(ITEMS, EVENTS, k=k)  # type: ignore[arg-type]


def test_a_column_of_several_types_is_named_with_the_remedy() -> None:
    mixed = pd.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"], "size": [7, "large"]})
    with pytest.raises(InputError, match=r"items: the values of size are of several types .*items\['size'\]\.astype\(str\)"):
        frames.recommend_from_frames(mixed, EVENTS)


@pytest.mark.parametrize(
    "times", [["2026-01-02"], pd.to_datetime(["2026-01-02"]), [1767312000], pd.Series([1767312000], dtype=object)]
)
def test_dates_texts_and_seconds_are_one_time(times: object) -> None:
    assert frames.as_seconds(pd.Series(times)).tolist() == [1767312000]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ([7, 12], ["7", "12"]),
        (pd.Series([7, None, 12]).dropna(), ["7", "12"]),  # floats by now
        ([7.5, 12.0], ["7.5", "12.0"]),
        (["007", "a"], ["007", "a"]),
    ],
)
def test_an_id_is_one_text_whether_pandas_made_a_float_of_it_or_not(given: object, texts: list[str]) -> None:
    assert frames.as_ids(pd.DataFrame({"item_id": given}), "events", "item_id").tolist() == texts


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run


def test_each_job_logs_and_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handlers: list[type] = []

    def run(config: Config) -> dict[str, str]:
        handlers.extend(type(handler) for handler in logging.getLogger().handlers)
        logging.getLogger("jobs.extract").info("three of four")
        return {"ds": config.run.ds}

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(Config=Config, run=run))
    assert frames.work("extract", Config(run=Run(ds="2026-01-01", lake=tmp_path))) == {"ds": "2026-01-01"}
    assert logs.SignsOfLife in handlers
    assert "extract: three of four" in capsys.readouterr().err


def test_a_refusal_tells_reasons_and_no_folder_that_is_gone() -> None:
    with pytest.raises(InputError) as told:
        frames.recommend_from_frames(ITEMS, pd.DataFrame({"user_id": ["u"], "item_id": ["b"], "datetime": ["2026-01-02"]}))
    assert "1 of 1 interactions records (100.0%) were refused" in str(told.value)
    assert "1 × " in str(told.value) and "/" not in str(told.value)
