"""Events for OpenLineage: one pair a run, the same for equal manifests, sent with the key that the environment holds."""

from __future__ import annotations

import datetime as dt
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from jobs.lake import nights
from jobs.report import openlineage
from jobs.run import InputError, Run
from tests.jobs.report.small_night import DS, record, tell, whole_night

Endpoint = tuple[str, list[tuple[dict[str, Any], str | None]]]
KEY = "k3y-[of-the-endpoint"


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """An OpenLineage endpoint, and the (event, Authorization header) that it received; no setting of the client from outside."""
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        monkeypatch.delenv(name)
    received: list[tuple[dict[str, Any], str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            event = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            received.append((event, self.headers["Authorization"]))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api/v1/lineage", received
    server.shutdown()


def test_every_run_is_an_openlineage_event_with_digests_and_the_endpoint_gets_them(tmp_path: Path, endpoint: Endpoint) -> None:
    whole_night(tmp_path)
    record(tmp_path, "lookup", None, status="failed", error="store is down")
    result, _ = tell(tmp_path, openlineage_url=endpoint[0])
    events = [json.loads(line) for line in Path(result.path).with_name("openlineage.jsonl").read_text().splitlines()]
    sent = [event for event, _ in endpoint[1]]
    for event in sent:
        tags = event["run"]["facets"].pop("tags")["tags"]
        assert [tag["key"] for tag in tags] == ["openlineage_client_version"], "all that the client adds of its own"
    assert sent == events
    assert result.sent == len(events) == 20
    by_job = {event["job"]["name"]: event for event in events if event["eventType"] != "START"}
    assert by_job["lookup"]["eventType"] == "FAIL"
    assert by_job["lookup"]["run"]["facets"]["errorMessage"]["message"] == "store is down"
    (written,) = by_job["extract"]["outputs"]
    assert written["name"] == "items", "as those name it that read it, whatever the date"
    assert written["facets"]["version"]["datasetVersion"] == "1" * 64
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 40
    for event in events:
        assert {"eventType", "eventTime", "run", "job", "inputs", "outputs", "producer", "schemaURL"} == set(event)
        assert dt.datetime.fromisoformat(event["eventTime"]).tzinfo is not None
    starts = [event["run"]["runId"] for event in events if event["eventType"] == "START"]
    assert len(set(starts)) == 10


def test_an_endpoint_that_is_down_costs_the_events_there_not_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole_night(tmp_path)
    result, _ = tell(tmp_path, openlineage_url="http://127.0.0.1:9/lineage")
    assert result.sent == 0
    assert "did not take the events" in caplog.text


def test_equal_manifests_give_equal_events_under_the_night_as_their_parent(tmp_path: Path) -> None:
    whole_night(tmp_path)
    night = nights.read_night(tmp_path, DS)
    written = openlineage.lines(openlineage.events(night, "llmemb"))
    assert openlineage.lines(openlineage.events(nights.read_night(tmp_path, DS), "llmemb")) == written
    parents = {json.dumps(json.loads(line)["run"]["facets"]["parent"], sort_keys=True) for line in written.splitlines()}
    (parent,) = (json.loads(text) for text in parents)
    assert parent["job"] == {"namespace": "llmemb", "name": "night", "facets": {}}
    assert parent["run"]["runId"] == openlineage.identity("llmemb", DS)
    other = openlineage.lines(openlineage.events(nights.Night(ds="2026-03-11", runs=night.runs), "llmemb"))
    ids = [{json.loads(line)["run"]["runId"] for line in lines.splitlines()} for lines in (written, other)]
    assert not ids[0] & ids[1], "another night has other runs"


@pytest.mark.parametrize(
    ("written", "named"),
    [
        (f"items/ds={DS}", ("llmemb", "items")),
        ("encoder", ("llmemb", "encoder")),
        ("shop.films", ("llmemb", "shop.films")),
        ("/data/films.parquet", ("file", "/data/films.parquet")),
        ("data/films/", ("file", "data/films")),
        ("file:///data/films", ("file", "/data/films")),
        ("/", ("file", "/")),
        ("s3a://shop/films/2026/", ("s3://shop", "films/2026")),
        ("s3a://user:secret@shop/films", ("s3://shop", "films")),
        ("s3a://AKIA:sec/ret@shop/films", ("s3://shop", "films")),
        ("s3a://***@shop/films", ("s3://shop", "films")),
        ("s3a://shop/films/a@b", ("s3://shop", "films/a@b")),
        ("shop.catalogue TIMESTAMP AS OF '2026-03-10 23:59:59'", ("llmemb", "shop.catalogue")),
        ("shop.catalogue timestamp as of '2026/03/11'", ("llmemb", "shop.catalogue")),
        ("lake.shop.catalogue VERSION AS OF 'night/2026-03-10'", ("llmemb", "lake.shop.catalogue")),
        ("shop.catalogue VERSION AS OF 7 ", ("llmemb", "shop.catalogue")),
        ("`shop`.`catalogue`", ("llmemb", "shop.catalogue")),
        ("parquet.`s3a://shop/films/`", ("s3://shop", "films")),
        (" parquet.`s3a://shop/films` ", ("s3://shop", "films")),
        ("delta.`s3a://shop/films` VERSION AS OF 7", ("s3://shop", "films")),
        ("delta.`/data/films`", ("file", "/data/films")),
        ("delta.`s3a://AKIA:sec/ret@shop/films`", ("s3://shop", "films")),
        ("s3://shop", ("s3://shop", "/")),
        ("gs://shop/films", ("gs://shop", "/films")),
        ("hdfs://name:8020/films", ("hdfs://name:8020", "/films")),
        ("abfss://films@shop.dfs.core.windows.net/a", ("abfss://films@shop.dfs.core.windows.net", "/a")),
    ],
)
def test_whatever_was_read_has_a_valid_name_as_a_data_set(written: str, named: tuple[str, str]) -> None:
    assert openlineage.data_set(written, "llmemb") == named


def test_a_source_path_is_named_in_the_events_of_extract(tmp_path: Path) -> None:
    record(tmp_path, "extract", {"inputs": {"/data/films.parquet": "40:1", "": "2", "no.digest": ""}})
    (start, _) = openlineage.events(nights.read_night(tmp_path, DS), "llmemb")
    assert [(found.namespace, found.name) for found in start.inputs or []] == [("file", "/data/films.parquet")]


def test_the_endpoint_gets_the_key_of_the_environment_and_neither_log_nor_lake_does(
    tmp_path: Path, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", KEY)
    # a setting that the client can't read, which it would quote
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__CUSTOM_HEADERS__X", KEY)
    whole_night(tmp_path)
    result, _ = tell(tmp_path, openlineage_url=endpoint[0])
    assert result.sent == 20
    assert {key for _, key in endpoint[1]} == {f"Bearer {KEY}"}
    assert KEY not in caplog.text
    assert KEY not in repr(result)
    assert not any(KEY in path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "url",
    ["marquez:5000", "ftp://marquez/lineage", "http://user:hunter2@marquez/lineage", "https://marquez/lineage?code=hunter2"],
)
def test_an_address_that_is_none_or_holds_a_secret_is_refused_without_repeating_it(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"report\.openlineage_url") as refused:
        report.Config(run=Run(ds=DS, lake=tmp_path), openlineage_url=url)
    assert "hunter2" not in str(refused.value)
