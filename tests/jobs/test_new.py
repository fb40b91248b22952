"""new: the starter with a stranger's answers in it; safe, short, and read by every job."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tomllib
from pathlib import Path

import pytest

from jobs import new
from jobs.__main__ import main
from jobs.recipe import build, load_recipe, values_of
from jobs.run import Run

ANSWERS = ["shop.items", "sku", "title, brand", "shop.clicks", "visitor", "sku", "at", "ms", 'It is "good":', ""]


def test_answers_come_from_standard_input_and_empty_ones_keep_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ANSWERS) + "\n"))
    assert main(["new", str(tmp_path / "shop")]) == 0
    told = capsys.readouterr()
    path = Path(json.loads(told.out)["recipe"])
    recipe = tomllib.loads(path.read_text())
    assert recipe["extract"]["items"] == {"table": "shop.items", "item_id": "sku", "attributes": ["title", "brand"]}
    assert recipe["extract"]["interactions"]["unit"] == "ms"
    assert recipe["scft"]["policy"]["domain"] == 'It is "good":'
    assert recipe["run"]["lake"] == str(tmp_path / "shop" / "lake")
    assert recipe["run"]["tracking_uri"] == f"sqlite:///{tmp_path}/shop/lake/mlflow.db"
    assert "the most telling first" in path.read_text()  # comments stay
    assert "python -m jobs check" in told.err


def test_what_is_given_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["new", str(tmp_path / "shop"), "--set", "extract.items.table=shop.items"]) == 0
    assert "Table of your items" not in capsys.readouterr().err
    assert main(["new", str(tmp_path / "bucket"), "--set", "run.lake=s3://bucket/lake"]) == 0
    recipe = tomllib.loads((tmp_path / "bucket" / "recipe.toml").read_text())
    assert recipe["run"]["tracking_uri"] == f"sqlite:///{tmp_path}/bucket/mlflow.db"
    assert tomllib.loads((tmp_path / "shop" / "recipe.toml").read_text())["extract"]["items"]["table"] == "shop.items"


def test_a_recipe_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    assert main(["new", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "recipe.toml").read_text() == "mine"


@pytest.mark.parametrize("folder", ["notes", "notes/shop"])
def test_a_file_in_the_place_of_the_folder_is_named_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "notes").write_text("mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["new", str(tmp_path / folder)]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}/notes is a file: name a folder" in told and "Table of your items" not in told
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_folder_that_can_t_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["new", str(tmp_path / "shop")]) == 2
    assert "recipe.toml can't be written (Permission denied): name a folder" in capsys.readouterr().err


def test_a_key_that_the_starter_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", str(tmp_path / "shop"), "--set", "rat.hidden=5", *answered()]) == 2
    assert "rat.hidden" in capsys.readouterr().err
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("extract.interactions.unit=seconds", "Unit of the time, if it is a number: s, ms or us"),
        ("extract.items.attributes=5", "answer extract.items.attributes anew: Its columns that the LLM shall read, by commas"),
        ("extract.items.attributes=[1]", "answer extract.items.attributes anew"),
        ("scft.policy.domain=A toy of $5 or less:", "write it without $ (USD 5, say)"),
        ('extract.items.attributes=["title", "US$"]', "write it without $"),
        ("collect.grace_days=soon", "collect.grace_days: Input should be a valid number"),
        ("extract.items.attributes=[]", "extract.items.attributes is empty"),
    ],
)
def test_an_answer_that_no_job_would_read_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, says: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["new", str(tmp_path / "shop"), "--set", answer]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize(("said", "read"), [("title", ["title"]), ("title, brand,", ["title", "brand"])])
def test_attributes_given_as_a_text_are_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, read: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["new", str(tmp_path), "--set", f"extract.items.attributes={said}"]) == 0
    assert load_recipe(tmp_path / "recipe.toml")["extract"]["items"]["attributes"] == read


def test_a_variable_that_is_set_may_stand_in_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setenv("SHOP", "shop")
    assert main(["new", str(tmp_path), "--set", "extract.items.table=$SHOP.items"]) == 0
    assert load_recipe(tmp_path / "recipe.toml")["extract"]["items"]["table"] == "shop.items"


def answered() -> list[str]:
    """`--set` for every question, so that nothing is asked."""
    return [word for key in new.QUESTIONS for word in ("--set", f"{key}=x")]


def test_every_job_reads_the_starter_and_it_is_safe() -> None:
    recipe = load_recipe(new.STARTER)
    run = build(Run, {"ds": "2026-01-01", **recipe["run"]}, "run")
    for job in ("extract", "scft", "embed", "pretrain", "rat", "evaluate", "promote", "project", "publish", "lookup", "collect"):
        build(importlib.import_module(f"jobs.{job}").Config, {"run": run, **values_of(recipe, job)}, job)
    assert recipe["promote"] == {"always_ask": True}  # nobody approves by default
    assert recipe["scft"]["training"]["steps"] == 0  # thousands take hours on a laptop
    days = {key: value for key, value in new.flat(recipe).items() if "days" in key}
    assert days["collect.grace_days"] > 0 and all(value > 0 for value in days.values())
    assert len(new.flat(recipe)) <= 20
    assert all(len(line) <= 130 for line in new.STARTER.read_text().splitlines())
