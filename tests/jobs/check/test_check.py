"""check: says in words what a night would fail on hours later, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.check import all_findings, tables
from jobs.recipe import load_recipe


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A recipe over two Parquet tables that are as they should be."""
    ids = [f"sku{number}" for number in range(20)]
    pq.write_table(pa.table({"sku": ids, "title": ids}), tmp_path / "items.parquet")
    events(tmp_path, ids)
    path = tmp_path / "recipe.toml"
    path.write_text(f"""
[run]
lake = "{tmp_path}/lake"
tracking_uri = "sqlite:///{tmp_path}/lake/mlflow.db"
[extract.items]
table = "{tmp_path}/items.parquet"
item_id = "sku"
attributes = ["title"]
[extract.interactions]
table = "{tmp_path}/events.parquet"
item_id = "sku"
timestamp = "at"
[scft.training]
steps = 0
""")
    return path


def events(folder: Path, ids: list[str], second: int = 1_700_000_000) -> None:
    rows = {"user_id": ["u"] * len(ids), "sku": ids, "at": [second + number for number in range(len(ids))]}
    pq.write_table(pa.table(rows), folder / "events.parquet")


def levels(recipe: Path, *settings: str) -> dict[str, tuple[str, str]]:
    return {one.what: (one.level, one.text) for one in all_findings(load_recipe(recipe, settings))}


def test_a_recipe_that_will_run_has_nothing_wrong_and_nothing_is_written(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(shop.parent.rglob("*"))
    assert main(["check", "--recipe", str(shop)]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["wrong"] == 0
    assert "100.0% of 20 events" in told.err
    assert "2023-11-14" in told.err
    assert sorted(shop.parent.rglob("*")) == before


def test_ids_that_do_not_meet_are_shown_side_by_side(shop: Path) -> None:
    events(shop.parent, [str(number) for number in range(20)])
    level, text = levels(shop)["overlap of ids"]
    assert level == "wrong"
    assert "'0'" in text and "'sku0'" in text


@pytest.mark.parametrize(("factor", "name"), [(1_000, "ms"), (1_000_000, "us")])
def test_another_unit_of_time_is_named(shop: Path, factor: int, name: str) -> None:
    events(shop.parent, [f"sku{number}" for number in range(20)], 1_700_000_000 * factor)
    level, text = levels(shop)["unit of time"]
    assert (level, f'unit = "{name}"' in text) == ("wrong", True)
    assert levels(shop, f"extract.interactions.unit={name}")["unit of time"][0] == "ok"


def test_a_date_column_needs_no_unit() -> None:
    assert tables.unit(pa.chunked_array([pa.array([0], pa.timestamp("us"))]), "s").level == "ok"


@pytest.mark.parametrize(
    ("setting", "what", "says"),
    [
        ('extract.items.attributes=["title", "brand"]', "items", "no column 'brand'; it has sku, title"),
        ("embed.encodr=latest", "recipe", "unknown key embed.encodr"),
        ('run.tracking_uri=""', "MLflow", "promote needs it"),
        ("run.device=cuda:9", "device", "sees no GPU"),
    ],
)
def test_what_would_fail_later_is_wrong_now(shop: Path, setting: str, what: str, says: str) -> None:
    import torch

    if "cuda" in setting and torch.cuda.is_available():
        pytest.skip("a machine with a GPU has that device")
    wrong = [one for one in all_findings(load_recipe(shop, [setting])) if one.level == "wrong"]
    assert [(one.what, says in one.text) for one in wrong] == [(what, True)]


@pytest.mark.parametrize("setting", ["extract.interactions.unit=seconds", "extract.items.attributes=title"])
def test_a_job_is_not_valid_and_wrong_at_once(shop: Path, setting: str) -> None:
    told = {one.level: one.text for one in all_findings(load_recipe(shop, [setting])) if one.what == "recipe"}
    assert "extract" in told["wrong"]
    assert told["ok"] == "the tables of these jobs are valid: scft"
    alone = {"extract": load_recipe(shop, [setting])["extract"]}
    assert [one.level for one in all_findings({**alone, "run": {"lake": str(shop.parent / "lake")}}) if one.what == "recipe"] == [
        "wrong"
    ]


def test_one_bad_table_hides_nothing_of_the_other(shop: Path) -> None:
    events(shop.parent, [f"sku{number}" for number in range(20)], 1_700_000_000_000)
    wrong = [one for one in all_findings(load_recipe(shop, ['extract.items.attributes=["brand"]'])) if one.level == "wrong"]
    assert [one.what for one in wrong] == ["items", "unit of time"]
    assert "no column 'brand'" in wrong[0].text
    without = {name: value for name, value in load_recipe(shop)["extract"].items() if name != "items"}
    assert [one.what for one in tables.look(without) if one.level == "wrong"] == ["items", "unit of time"]


def test_settings_of_the_demo_are_shown(shop: Path) -> None:
    demo = load_recipe(shop, ["collect.grace_days=0", "promote.approved_by=me"])
    assert [one.level for one in all_findings(demo) if one.what == "safety"] == ["look", "look"]


def test_something_wrong_ends_with_2(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--recipe", str(shop), "--set", "embed.encodr=latest"]) == 2
    last: Any = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("wrong")
