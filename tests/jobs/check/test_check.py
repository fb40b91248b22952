"""check: says in words what a night would fail on hours later, and writes nothing."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.date32(), pa.date64()], ids=str)
def test_a_date_column_needs_no_unit(kind: pa.DataType) -> None:
    found = tables.unit(pa.chunked_array([pa.array([0], kind)]), "s")
    assert (found.level, "needs no unit" in found.text) == ("ok", True)


SECOND = 1_700_000_000


@pytest.mark.parametrize(
    ("column", "level", "says"),
    [
        (pa.array([SECOND], pa.decimal128(12, 0)), "ok", "2023-11-14"),
        (pa.array([SECOND * 1_000], pa.decimal128(15, 0)), "wrong", 'unit = "ms"'),
        (pa.array([f" {SECOND}"], pa.large_string()), "ok", "2023-11-14"),
        (pa.array([f"{SECOND}"]).dictionary_encode(), "ok", "2023-11-14"),
        (pa.array(["2026-01-31", "2026-02-01"]), "wrong", "texts such as '2026-01-31'"),
        (pa.array([f"{SECOND}"] * 20 + ["?"]), "ok", "2023-11-14"),  # fewer than extract takes
        (pa.array([True]), "wrong", "type bool, which is no time"),
        (pa.array([1], pa.time32("s")), "wrong", "type time32[s], which is no time"),
        (pa.array([None], pa.int64()), "wrong", "every time in the sample is missing"),
    ],
    ids=str,
)
def test_a_time_of_another_type_is_read_as_extract_reads_it(column: pa.Array, level: str, says: str) -> None:
    found = tables.unit(pa.chunked_array([column]), "s")
    assert (found.level, says in found.text) == (level, True), found.text


def test_a_table_without_rows_is_told(shop: Path) -> None:
    events(shop.parent, [])
    assert levels(shop)["events"] == ("wrong", f"{shop.parent}/events.parquet has no rows: extract needs events")
    pq.write_table(
        pa.table({"sku": pa.array([], pa.string()), "title": pa.array([], pa.string())}), shop.parent / "items.parquet"
    )
    assert "has no row with an sku" in levels(shop)["items"][1]


def test_a_folder_without_files_is_told(shop: Path) -> None:
    (shop.parent / "empty").mkdir()
    found = levels(shop, f"extract.interactions.table={shop.parent}/empty")["events"]
    assert (found[0], "is a folder without a Parquet file" in found[1]) == ("wrong", True)


def test_one_column_for_two_things_is_told(shop: Path) -> None:
    found = levels(shop, "extract.interactions.user_id=sku")["events"]
    assert found == (
        "wrong",
        "extract.interactions.user_id, item_id and timestamp are the columns sku, sku, at: name three of them",
    )


def test_two_columns_of_one_name_are_told(shop: Path) -> None:
    table = pq.read_table(shop.parent / "events.parquet")
    pq.write_table(table.append_column("sku", table["sku"]), shop.parent / "events.parquet")
    assert "events.parquet' cannot be read (Can't unify schema with duplicate" in levels(shop)["events"][1]


@pytest.mark.parametrize(
    ("strange", "settings", "level"),
    [
        (1, [], "ok"),  # 5 %, which extract takes
        (2, [], "wrong"),
        (2, ["extract.max_quarantine_share=0.2"], "look"),
        (12, ["extract.max_quarantine_share=0.7"], "look"),
        (1, ["extract.max_quarantine_share=0.01"], "wrong"),
    ],
)
def test_ids_that_extract_would_refuse_too_many_of_are_wrong(shop: Path, strange: int, settings: list[str], level: str) -> None:
    events(shop.parent, [f"sku{number}" for number in range(20 - strange)] + ["?"] * strange)
    found = levels(shop, *settings)["overlap of ids"]
    assert (found[0], "extract fails where more" in found[1]) == (level, level == "wrong")


def test_a_typo_in_a_shared_table_is_found_though_no_job_is_named(shop: Path) -> None:
    found = [one.text for one in all_findings(load_recipe(shop, ["backbone.widht=5"])) if one.level == "wrong"]
    assert [text.split(";")[0] for text in found] == [f"recipe: unknown key {job}.backbone.widht" for job in ("pretrain", "rat")]
    assert levels(shop, "backbone.width=32")["recipe"] == (
        "ok",
        "the tables of these jobs are valid: extract, scft, pretrain, rat",
    )


@pytest.mark.parametrize("setting", ["extract.items=5", "extract.interactions=5", "scft.training=5"])
def test_a_value_in_the_place_of_a_table_is_told_in_words(shop: Path, setting: str) -> None:
    found = [one for one in all_findings(load_recipe(shop, [setting])) if one.level == "wrong"]
    assert found and not [one for one in found if "object" in one.text], found


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


def test_mlflow_that_is_down_is_asked_again_once(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Down(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it's undone afterwards
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Down) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        level, text = levels(shop, f"run.tracking_uri=http://127.0.0.1:{server.server_port}")["MLflow"]
        server.shutdown()
    assert (level, len(asked), "is it running" in text) == ("wrong", 2, True), (text, asked)


def test_something_wrong_ends_with_2(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--recipe", str(shop), "--set", "embed.encodr=latest"]) == 2
    last: Any = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("wrong")
