"""Nights whose lake is on an object store, whose online store is Redis, and whose machines share no folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from feature_repo.reader import Reader
from feature_repo.serving.artifacts import open_index, recommender_folder
from feature_repo.serving.settings import Settings
from tests.feature_repo.conftest import redis_port as redis_port  # for pytest, which looks fixtures up here
from tests.models import tiny
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store
from tests.test_end_to_end import FIRST, ITEMS, RECIPE, SECOND, film, logs, runner

pytestmark = pytest.mark.timeout(900)
Call = Callable[..., dict[str, Any]]


@pytest.fixture
def call(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    object_store: ObjectStore,
    redis_port: int,
) -> Call:
    """Runs a job by its command line, each on a machine of its own, and gives the Result that it prints."""
    redis.Redis(port=redis_port).flushall()
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}))
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.delenv("LLMEMB_OFFLINE", raising=False)
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    tiny.llama(tmp_path / "base")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(tmp=tmp_path).replace(f'"{tmp_path}/lake"', f'"{object_store.address()}"'))
    machines, told = iter(range(1000)), runner(recipe, capsys)

    def run(job: str, *given: str, status: int = 0) -> dict[str, Any]:
        monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / f"machine {next(machines)}"))
        return told(job, *given, status=status)

    return run


def tables(home: Path, films: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(films), home / "items.parquet")
    pq.write_table(pa.Table.from_pylist(events), home / "events.parquet")


def test_two_nights_on_machines_that_share_nothing_but_the_bucket(tmp_path: Path, call: Call, object_store: ObjectStore) -> None:
    films = [film(number) for number in range(ITEMS)]
    tables(tmp_path, films, logs(FIRST, ITEMS))
    assert call("extract")["rows"]["items"] == ITEMS
    encoder = call("scft")
    assert call("embed")["embedded"] == ITEMS
    assert call("embed")["embedded"] == 0
    call("pretrain")
    recommender = call("rat")
    call("evaluate")
    assert call("promote")["decision"] == "promoted"
    night(call, FIRST)
    assert call("lookup")["compared"] == ITEMS
    assert len(call("recommend", FIRST, "recommend.user=u1")["item_ids"]) == 10
    assert call("report")["path"] == f"{object_store.address()}/reports/ds={FIRST}/report.html"
    there = object_store.objects()
    assert len(there[f"reports/ds={FIRST}/report.html"]) > 10_000
    assert {key.split("/")[2] for key in there if key.startswith("feast/offline/")} >= {"item_embedding", "serving_pointer"}
    assert {f"models/recommender/{recommender['recommender_id']}", f"models/encoder/{encoder['encoder_id']}"} <= {
        "/".join(key.split("/")[:3]) for key in there
    }
    # the second night: one item changed, one new
    tables(tmp_path, [{**films[0], "title": "The director's cut"}, *films[1:], film(ITEMS)], logs(FIRST, ITEMS))
    assert call("extract", SECOND)["new_items"] == 1
    assert not call("scft", SECOND)["due"]
    assert call("embed", SECOND, "embed.encoder=champion")["embedded"] == 2
    published = night(call, SECOND)
    assert (published["kind"], published["written"]) == ("delta", 2)
    assert call("lookup", SECOND)["compared"] == ITEMS + 1
    # the serving process maps the same index and recommender, fetched from the bucket
    serving, pointer = Settings(artifacts=object_store.address(), cache=str(tmp_path / "serving")), Reader.open().pointer()
    assert len(open_index(serving, pointer).item_ids) == ITEMS + 1
    assert recommender_folder(serving, pointer.recommender_id).is_dir()
    # again: the same digests, nothing to do
    again = night(call, SECOND)
    assert (again["kind"], again["outputs"]["index"]) == ("nothing to do", published["outputs"]["index"])
    assert call("collect", SECOND)["lake_removed"] == []  # what was replaced stays for a day: somebody may be reading it
    assert call("collect", SECOND, "collect.snapshot_days=9")["lake_removed"] == []  # all was put within these days
    verdicts = {link["step"]: link["verdict"] for link in call("explain", SECOND, "explain.item=i1")["links"]}
    assert {verdicts[step] for step in ("item_embeddings", "items", "llm_embeddings", "recommender", "encoder")} == {"verified"}
    assert call("forget", SECOND, "forget.item=i7")["left_in_lake"] == []
    assert call("lookup", SECOND)["compared"] == ITEMS
    assert "does not work on a lake on an object store" in call("codes", SECOND, status=2)["error"]


def night(call: Call, ds: str) -> dict[str, Any]:
    """project and publish of the champion; the Result of publish."""
    pinned = call("pin", ds)
    call("embed", ds, f"embed.encoder={pinned['encoder_id']}")
    call("project", ds, f"project.recommender={pinned['recommender_id']}")
    return call("publish", ds, f"publish.space={pinned['space_id']}")


def test_without_a_store_for_serving_publish_is_refused_and_makes_no_file(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMEMB_REGISTRY")
    assert "set LLMEMB_REGISTRY" in call("publish", status=2)["error"]
    assert not list(tmp_path.rglob("registry.db"))
