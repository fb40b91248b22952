"""generate: a writer of published codes beside the recommender that made the vectors; nothing that serves changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import codes, generate, project, rat
from jobs.lake import artifacts, partitions
from jobs.lake.tables import ITEM_CODES
from jobs.run import InputError, Run
from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.generative import Generative
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from tests.jobs.small_lake import DS, make, remember

BOOKS = Codes(books=2, entries=4, epochs=2, batch=8)
SMALL = Generative(width=8, layers=1, heads=2, history=3, steps=3, batch=4, beams=6)


@pytest.fixture
def coded(tmp_path: Path) -> Run:
    """A small lake after `rat`, `project` and `codes`."""
    run = make(tmp_path)
    settings = rat.Config(run=run, teacher="none", hidden=8, backbone=Backbone(width=8, max_len=6),
                          fusion=Fusion(parts=("llmemb",)), training=Training(epochs=1, batch=8))  # fmt: skip
    remember(run, "rat", rat.run(settings))
    project.run(project.Config(run=run, recommender="latest"))
    remember(run, "codes", codes.run(codes.Config(run=run, recommender="latest", training=BOOKS, publish=False, controls=False)))
    return run


def config(run: Run, **more: Any) -> generate.Config:
    return generate.Config(run=run, **{"recommender": "latest", "training": SMALL, "user_codes": BOOKS, **more})


def test_every_beam_is_an_item_nothing_drifted_and_nothing_changed(coded: Run) -> None:
    before = {path for path in coded.lake.rglob("*") if path.is_file()}
    result = generate.run(config(coded))
    assert result.items_share == 1.0 and result.drift == 0.0
    assert set(result.ndcg) == {"generated", "recommender"} and result.users == 23
    assert result.difference["value"] == pytest.approx(result.ndcg["generated"] - result.ndcg["recommender"], abs=2e-5)
    assert {path for path in coded.lake.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("beams", [20, 50])
def test_with_as_many_beams_as_items_or_more_every_item_comes_once(coded: Run, beams: int) -> None:
    result = generate.run(config(coded, training=dataclasses.replace(SMALL, beams=beams)))
    assert result.items_share == 1.0


def test_the_share_of_items_counts_each_once_and_no_empty_beam() -> None:
    found = [generate.items_share(torch.tensor([row]), 9) for row in ([3, 1, 2, 4], [3, 3, 2, 4], [3, 1, 0, 0], [5, 5, 0, 5])]
    assert found == [1.0, 0.75, 0.5, 0.25]


def test_equal_runs_give_equal_figures(coded: Run) -> None:
    assert generate.run(config(coded)).ndcg == generate.run(config(coded)).ndcg


def test_books_that_moved_under_the_codes_are_told_as_drift(coded: Run) -> None:
    known = generate.run(config(coded))
    rows = partitions.read(coded.lake, ITEM_CODES, f"books={known.books_id}/ds={DS}").to_pylist()
    for row in rows[:5]:
        row["codes"] = [(code + 1) % 4 for code in row["codes"]]
        row["number"] += 50
    table = ITEM_CODES.schema.empty_table().from_pylist(rows, ITEM_CODES.schema)
    partitions.write(coded.lake, ITEM_CODES, f"books={known.books_id}/ds={DS}", [table])
    assert generate.run(config(coded)).drift == pytest.approx(5 / 20)


def test_codes_that_are_missing_or_of_another_space_are_refused_by_name(coded: Run) -> None:
    known = generate.run(config(coded))
    rows = partitions.read(coded.lake, ITEM_CODES, f"books={known.books_id}/ds={DS}")
    partitions.write(coded.lake, ITEM_CODES, f"books={known.books_id}/ds={DS}", [rows.slice(2)])
    with pytest.raises(InputError, match=f"2 items have no codes, for example 'i00': run codes for {DS}"):
        generate.run(config(coded))
    home = artifacts.find(coded.lake, "books", known.books_id)
    told = json.loads((home / "books.json").read_text())
    (home / "books.json").write_text(json.dumps({**told, "source": "encoder beef"}))
    with pytest.raises(InputError, match=f"books {known.books_id} are of encoder beef, the vectors of space"):
        generate.run(config(coded))
    with pytest.raises(InputError, match="books 0000 is not in the lake"):
        generate.run(config(coded, books="0000"))


def test_too_few_users_for_their_books_are_refused_by_count(coded: Run) -> None:
    with pytest.raises(ValueError, match="different vectors, a book has 64 entries"):
        generate.run(config(coded, user_codes=Codes(entries=64)))
    with pytest.raises(InputError, match=r"generate.users must be at least 1"):
        config(coded, users=0)
