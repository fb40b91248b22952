"""The whole path on a tiny catalogue with a tiny model: every job through the command line, as a shell or a scheduler runs it."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.__main__ import main
from jobs.engines.spark import session
from jobs.lake import manifests
from tests.models import tiny

pytestmark = pytest.mark.timeout(900)  # some thirty jobs, one after the other

FIRST, SECOND = "2026-03-10", "2026-03-11"
GENRES = ("war", "love", "space", "crime")
ITEMS, USERS, EVENTS = 60, 90, 12
RECIPE = """
[run]
lake = "{tmp}/lake"
tracking_uri = "sqlite:///{tmp}/mlflow.db"
device = "cpu"

[extract]
max_quarantine_share = 0.2
items = {{ table = "{tmp}/items.parquet", attributes = ["title", "genre"] }}
interactions = {{ table = "{tmp}/events.parquet" }}
spark = {{ "spark.master" = "local[1]", "spark.sql.shuffle.partitions" = "2" }}

[scft]
base = "{tmp}/base"
max_tokens = 96
policy = {{ domain = "Film:" }}
lora = {{ r = 2, alpha = 4, dropout = 0.0 }}
gates = {{ recall_drop = 1.0, mean_cosine = 0.999 }}
training = {{ steps = 4, batch = 8, learning_rate = 5e-3, validate_every = 2, validation_items = 8, candidates = 40 }}

[embed]
encoder = "latest"

[pretrain]
backbone = {{ width = 16, max_len = 10 }}
training = {{ epochs = 3, patience = 3, batch = 32 }}

[rat]
backbone = {{ width = 16, max_len = 10 }}
training = {{ epochs = 3, patience = 3, batch = 32 }}
hidden = 16

[promote]
approved_by = "a test"

[collect]
grace_days = 0
"""


def film(number: int) -> dict[str, Any]:
    """An item that likes its own genre."""
    return {"item_id": f"i{number}", "title": f"The {GENRES[number % 4]} film, part {number}", "genre": [GENRES[number % 4]]}


def logs(day: str, films: int) -> list[dict[str, Any]]:
    """Users who stay with a genre, up to a day, and two records that no one can use."""
    random, end = np.random.default_rng(0), dt.datetime.fromisoformat(day).replace(tzinfo=dt.UTC)
    rows = [
        {"user_id": f"u{user}", "item_id": f"i{4 * random.integers(films // 4) + user % 4}", "timestamp": int(moment.timestamp())}
        for user in range(USERS)
        for moment in (end - dt.timedelta(hours=6 * int(step) + user % 6) for step in range(EVENTS))
    ]
    return [*rows, {"user_id": None, "item_id": "i1", "timestamp": 1}, {"user_id": "u1", "item_id": "nobody", "timestamp": 1}]


def runner(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a job of a recipe by its command line and gives the Result that it prints."""

    def run(job: str, ds: str = FIRST, *settings: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        sets = [part for setting in settings for part in ("--set", setting)]
        code, told = main([job, "--recipe", str(recipe), "--ds", ds, *sets]), capsys.readouterr()
        assert code == status, told.err
        found: dict[str, Any] = json.loads(told.out) if code == 0 else {"error": told.err.splitlines()[-1]}
        return found

    return run


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs a job by its command line and gives the Result that it prints."""
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    tiny.llama(tmp_path / "base")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(tmp=tmp_path))

    return runner(recipe, capsys)


def test_two_nights_from_tables_to_recommendations(tmp_path: Path, call: Callable[..., dict[str, Any]]) -> None:
    def tables(films: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(films), tmp_path / "items.parquet")
        pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")

    films = [film(number) for number in range(ITEMS)]
    tables(films, logs(FIRST, ITEMS))

    # the first night: an encoder, a recommender, a space
    snapshot = call("extract")
    assert snapshot["rows"] == {"items": ITEMS, "interactions": USERS * EVENTS, "sequences": USERS, "quarantine": 2}
    assert call("embed", status=2)["error"].startswith("embed: error: ")  # no encoder yet: said in a line
    encoder = call("scft")
    assert encoder["due"] and encoder["version"] == "1"
    assert call("embed")["embedded"] == ITEMS
    assert call("embed")["embedded"] == 0
    call("pretrain")
    recommender = call("rat")
    judged = call("evaluate")
    assert judged["recommender_id"] == recommender["recommender_id"] and {"popularity", "llmemb"} <= judged["values"].keys()
    assert call("promote")["decision"] == "promoted"
    champion = ("embed.encoder=champion", "project.recommender=champion")
    space = call("project", FIRST, champion[1])["space_id"]
    published = call("publish", FIRST, f"publish.space={space}")
    assert published["space_id"] == space
    assert call("lookup")["compared"] == ITEMS
    advice = call("recommend", FIRST, "recommend.user=u1")
    assert len(advice["item_ids"]) == 10 and not set(advice["titles"]) & set(advice["recent"])
    chain = call("explain", FIRST, "explain.item=i1")
    assert (chain["encoder_id"], chain["recommender_id"]) == (encoder["encoder_id"], recommender["recommender_id"])
    assert Path(call("report")["path"]).stat().st_size > 10_000

    # the logs only grow; what came later is of the day between
    before, until = logs(FIRST, ITEMS), dt.datetime.fromisoformat(FIRST).replace(tzinfo=dt.UTC).timestamp()
    later = [row for row in logs(SECOND, ITEMS) if row["timestamp"] > until]
    # the second night: one item changed, one new; only these are embedded, into the space that serves
    tables([{**films[0], "title": "The director's cut"}, *films[1:], film(ITEMS)], [*before, *later])
    assert call("extract", SECOND)["new_items"] == 1
    assert not call("scft", SECOND)["due"]
    assert call("embed", SECOND, champion[0])["embedded"] == 2
    assert call("project", SECOND, champion[1])["space_id"] == space
    call("publish", SECOND, f"publish.space={space}")
    served = call("lookup", SECOND)
    assert (served["space_id"], served["serves_ds"], served["compared"]) == (space, SECOND, ITEMS + 1)
    call("forget", SECOND, "forget.item=i7")
    assert "i7" not in call("recommend", SECOND, "recommend.user=u3", "recommend.k=40")["item_ids"]
    assert call("lookup", SECOND)["compared"] == ITEMS
    assert "was forgotten" in call("lookup", SECOND, "lookup.item=i7", status=2)["error"]
    night = manifests.parsed(manifests.runs(tmp_path / "lake", SECOND, "lookup")[-1])
    assert night["status"] == "done"  # a question asked by hand is no part of the night's record
    assert "first that was published" in call("rollback", SECOND, status=3)["error"]
    session("test", {}).stop()
