"""Nights on a cluster's services: lake and MLflow's artifacts in a bucket, registries and Airflow on PostgreSQL, Redis online."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from mlflow.server import get_app_client

from feature_repo.reader import Reader
from feature_repo.serving.artifacts import open_index, recommender_folder
from feature_repo.serving.settings import Settings
from tests.dags.conftest import Stub, Worker, migrate
from tests.feature_repo.conftest import redis_port as redis_port  # for pytest, which looks fixtures up here
from tests.infra.mlflow_server import ADMIN, PASSWORD, mlflow_server
from tests.infra.test_postgresql import ROOT, Server
from tests.infra.test_postgresql import server as server
from tests.jobs.extract.small_spark import QUICK
from tests.models import tiny
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store
from tests.test_end_to_end import FIRST, ITEMS, RECIPE, SECOND, film, logs, runner

pytestmark = pytest.mark.timeout(900)
THIRD = "2026-03-12"
Call = Callable[..., dict[str, Any]]


@pytest.fixture
def services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, object_store: ObjectStore, redis_port: int, server: Server
) -> Iterator[None]:
    """The variables by which jobs find every service; MLflow by an account that is no administrator's."""
    redis.Redis(port=redis_port).flushall()
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}))
    monkeypatch.setenv("LLMEMB_REGISTRY", server.url("feast"))
    monkeypatch.delenv("LLMEMB_OFFLINE", raising=False)
    told = {"PGHOST": "127.0.0.1", "PGPORT": str(server.port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
    told |= {"PGPASSWORD": server.password("mlflow"), "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://"}
    told["MLFLOW_S3_ENDPOINT_URL"] = object_store.url
    # a password is made to be slow to check, and MLflow checks it at each of a model's many files
    ini = tmp_path / "mlflow-auth.ini"
    ini.write_text((ROOT / "infra" / "mlflow-auth.ini").read_text() + "auth_cache_ttl_seconds = 60\n")
    with mlflow_server(tmp_path, ini, told, object_store.address("mlflow")) as uri:
        with pytest.MonkeyPatch.context() as once:
            for name, value in (("USERNAME", ADMIN), ("PASSWORD", PASSWORD)):
                once.setenv(f"MLFLOW_TRACKING_{name}", value)
            get_app_client("basic-auth", tracking_uri=uri).create_user("jobs", "the password of jobs")
        for name, value in (("URI", uri), ("USERNAME", "jobs"), ("PASSWORD", "the password of jobs")):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        yield


@pytest.fixture
def here(tmp_path: Path, object_store: ObjectStore) -> Path:
    """The folder of a machine: its recipe, its base model; the tables of a warehouse come later."""
    folder = tmp_path / "machine"
    folder.mkdir()
    tiny.llama(folder / "base")
    written = RECIPE.format(tmp=folder).replace(f'"{folder}/lake"', f'"{object_store.address()}"')
    written = written.replace("spark = { ", "spark = { " + "".join(f'"{name}" = "{value}", ' for name, value in QUICK.items()))
    (folder / "recipe.toml").write_text(written.replace(f'"sqlite:///{folder}/mlflow.db"', '"$MLFLOW_TRACKING_URI"'))
    return folder


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], services: None, here: Path) -> Call:
    """Runs a job by its command line, each on a machine of its own, and gives the Result that it prints."""
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    machines, told = iter(range(1000)), runner(here / "recipe.toml", capsys)

    def run(job: str, *given: str, status: int = 0) -> dict[str, Any]:
        monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / "scratch" / f"machine {next(machines)}"))
        return told(job, *given, status=status)

    return run


def tables(home: Path, films: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(films), home / "items.parquet")
    pq.write_table(pa.Table.from_pylist(events), home / "events.parquet")


def test_nights_on_machines_that_share_nothing_but_services(
    tmp_path: Path, here: Path, call: Call, object_store: ObjectStore, server: Server
) -> None:
    films = [film(number) for number in range(ITEMS)]
    tables(here, films, logs(FIRST, ITEMS))
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
    models = [key for key in object_store.objects("mlflow/") if key.endswith(".safetensors")]
    assert models and not list(tmp_path.rglob("mlflow.db")) and not (tmp_path / "artifacts").exists()
    # the second night: one item changed, one new
    tables(here, [{**films[0], "title": "The director's cut"}, *films[1:], film(ITEMS)], logs(FIRST, ITEMS))
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
    coded = call("codes", SECOND, "codes.training.books=2", "codes.training.entries=4", "codes.training.epochs=2")
    assert coded["published"] == ITEMS
    assert f"feast/offline/item_codes/{published['space_id']}-{SECOND}.parquet" in object_store.objects()
    by_airflow(tmp_path, here, object_store, server)
    again = night(call, THIRD)
    assert (again["kind"], again["items"]) == ("nothing to do", ITEMS)
    assert call("lookup", THIRD)["compared"] == ITEMS


def night(call: Call, ds: str) -> dict[str, Any]:
    """project and publish of the champion; the Result of publish."""
    pinned = call("pin", ds)
    call("embed", ds, f"embed.encoder={pinned['encoder_id']}")
    call("project", ds, f"project.recommender={pinned['recommender_id']}")
    return call("publish", ds, f"publish.space={pinned['space_id']}")


TURN = """#!/bin/sh
# the next task is the other machine's, and this one's folder is not there meanwhile
cd "{home}" && mv machine gone && mv away machine && mv gone away && cd machine
echo "$3 $$ $(cat name)" >> ../turns
export HOME="$PWD/home" TMPDIR="$PWD/tmp" LLMEMB_CACHE="$PWD/cache" LLMEMB_SCRATCH="$PWD/scratch" PYTHONPATH="{root}"
exec "{python}" "$@"
"""


def by_airflow(home: Path, here: Path, object_store: ObjectStore, server: Server) -> None:
    """The third night, by Airflow: two machines take turns, three jobs are killed at some request and run again on the other."""
    films = [film(number) for number in range(ITEMS + 2) if number != 3]  # and 7 was forgotten
    tables(here, films, logs(FIRST, ITEMS))
    shutil.rmtree(home / "scratch")
    shutil.rmtree(home / "cache")
    shutil.copytree(here, home / "away")
    for machine in (here, home / "away"):
        (machine / "name").write_text(machine.name)
        (machine / "tmp").mkdir()
        (machine / "home").mkdir()
    turn = home / "turn"
    turn.write_text(TURN.format(home=home, root=ROOT, python=sys.executable))
    turn.chmod(0o755)
    environment = server.airflow(home / "airflow")
    migrate(environment)
    worker = Worker(environment, Stub(home / "stub"))
    object_store.fault = killer(home / "turns", {"embed": 12, "project": 20, "publish": 25})
    services = {name: os.environ[f"LLMEMB_{name}"] for name in ("ONLINE_STORE", "REGISTRY")}
    alike = "ATEN_CPU_CAPABILITY,OMP_NUM_THREADS"  # other kernels round otherwise, and all vectors would be written again
    done = worker.run("nightly_embeddings", None, {"ds": THIRD}, PYTHON=str(turn), RECIPE=str(here / "recipe.toml"),
                      PASS_ENV=f"AWS_*,{alike}", **services)  # fmt: skip
    assert worker.process.stdin
    worker.process.stdin.close()
    worker.process.wait(60)
    object_store.fault = lambda method, path: ""
    assert done["state"] == "success", done
    tries = {job.partition("#")[0]: tried for job, (_, tried) in done["tasks"].items()}
    assert {job for job, tried in tries.items() if tried == 2} == {"embed", "project", "publish"}
    turns = [line.split() for line in (home / "turns").read_text().splitlines()]
    assert [job for job, *_ in turns] == ["pin", "extract", "embed", "embed", "project", "project", "publish", "publish",
                                          "lookup", "report"]  # fmt: skip
    assert [name for *_, name in turns] == ["away", "machine"] * 5


def killer(turns: Path, most: dict[str, int]) -> Callable[[str, str], str]:
    """Kills the first process of each of these jobs at one of its first requests."""
    chance, asked, left = random.Random(5), dict[str, int](), {}
    left.update({job: chance.randint(1, count) for job, count in most.items()})

    def decide(method: str, path: str) -> str:
        job, pid, _ = turns.read_text().splitlines()[-1].split()
        if job not in left:
            return ""
        asked[job] = asked.get(job, 0) + 1
        if asked[job] < left[job]:
            return ""
        del left[job]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid), signal.SIGKILL)
        return "hang up"

    return decide


def test_without_a_store_for_serving_publish_is_refused_and_makes_no_file(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": "127.0.0.1:1"}))
    monkeypatch.delenv("LLMEMB_REGISTRY", raising=False)
    assert "set LLMEMB_REGISTRY" in runner(here / "recipe.toml", capsys)("publish", FIRST, status=2)["error"]
    assert not list(tmp_path.rglob("registry.db"))
