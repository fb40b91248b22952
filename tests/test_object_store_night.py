"""Nights on a cluster's services: lake and MLflow's artifacts in a bucket, registries and Airflow on PostgreSQL, Redis online."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import requests
from mlflow.server import get_app_client

from feature_repo.reader import Reader
from feature_repo.serving.artifacts import open_index, recommender_folder
from feature_repo.serving.settings import Settings
from jobs.lake import partitions
from jobs.lake.place import place
from tests.dags.machines import Machine, missing
from tests.feature_repo.conftest import redis_port as redis_port  # for pytest, which looks fixtures up here
from tests.feature_repo.sentinels import free_port
from tests.infra.mlflow_server import ADMIN, PASSWORD, mlflow_server, wait
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
    if why := missing():
        pytest.skip(why)
    alone = object_store.copied("lake", "alone")
    by_airflow(tmp_path, here, object_store, server)
    again = night(call, THIRD)
    assert (again["kind"], again["items"]) == ("nothing to do", ITEMS + 10)
    assert call("lookup", THIRD)["compared"] == ITEMS + 10
    # one machine alone makes the same of the same lake
    at = f'run.lake="{alone}"'
    call("extract", THIRD, at)
    for shard in range(2):
        call("embed", THIRD, at, f"embed.encoder={encoder['encoder_id']}", "embed.shards=2", f"embed.shard={shard}")
    call("project", THIRD, at, f"project.recommender={recommender['recommender_id']}")
    for name in ("items", "interactions", "sequences", "quarantine", "llm_embeddings", "item_embeddings"):
        assert rows(object_store.address(), name) == rows(alone, name), name


def night(call: Call, ds: str) -> dict[str, Any]:
    """project and publish of the champion; the Result of publish."""
    pinned = call("pin", ds)
    call("embed", ds, f"embed.encoder={pinned['encoder_id']}")
    call("project", ds, f"project.recommender={pinned['recommender_id']}")
    return call("publish", ds, f"publish.space={pinned['space_id']}")


def rows(address: str, name: str) -> list[str]:
    """The rows of a table's newest night, in some order."""
    lake = place(Path(address))
    of = [one for one in partitions.committed(lake, name) if f"ds={THIRD}" in one or name == "llm_embeddings"]
    return sorted(str(row) for one in of for file in partitions.read_files(lake, name, one) for row in file.read().to_pylist())


TOGETHER = """
import sys
from airflow.__main__ import main
for words in (["db", "migrate"], ["pools", "import", sys.argv[1]], ["pools", "set", "gpu", "2", "A GPU in each machine"],
              ["dags", "reserialize"], ["dags", "unpause", "nightly_embeddings", "--yes"],
              ["dags", "trigger", "nightly_embeddings", "--conf", sys.argv[2]]):
    sys.argv[1:] = words
    main()
"""
"""What is done once for all machines, in one process, as Airflow takes seconds to import."""


@contextlib.contextmanager
def machines(home: Path, here: Path, environment: dict[str, str]) -> Iterator[dict[str, Machine]]:
    """Two machines by name, each with a scheduler that runs tasks on it, one at a time, and the API server that both ask; THIRD's
    run waits. A machine's folder is a copy of `here` and lies there for whoever is on it; the other's is nowhere."""
    told = [str(ROOT / "infra" / "pools.json"), json.dumps({"ds": THIRD})]
    done = subprocess.run([sys.executable, "-c", TOGETHER, *told], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    airflow = [sys.executable, "-m", "airflow"]
    api = [*airflow, "api-server", "--host", "127.0.0.1", "--port", str(urlsplit(environment[API]).port)]
    with contextlib.ExitStack() as running:
        log = running.enter_context((home / "api.log").open("w"))
        process = running.enter_context(subprocess.Popen(api, env=environment, stdout=log, stderr=log, start_new_session=True))
        running.callback(lambda: os.killpg(process.pid, signal.SIGKILL))
        wait(environment[API].replace("execution/", "api/v2/version"), process, home / "api.log")
        found = {}
        for name in ("one", "two"):
            shutil.copytree(here, own := home / name)
            its = {
                "AIRFLOW_HOME": "airflow",
                "HOME": "home",
                "TMPDIR": "tmp",
                "LLMEMB_CACHE": "cache",
                "LLMEMB_SCRATCH": "scratch",
            }
            for folder in its.values():
                (own / folder).mkdir()
            its = {variable: str(here / folder) for variable, folder in its.items()}
            its["AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT"] = str(free_port())
            found[name] = running.enter_context(Machine(name, own, here, environment | its, *airflow, "scheduler"))
        yield found


API = "AIRFLOW__CORE__EXECUTION_API_SERVER_URL"


def settings(home: Path, here: Path, server: Server, logs: str) -> dict[str, str]:
    """The variables of all parts of an Airflow of several machines."""
    return server.airflow(home / "airflow") | {
        "AIRFLOW__CORE__EXECUTOR": "slots.LocalExecutor",
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "infra" / "airflow_plugins"),
        "AIRFLOW__CORE__PARALLELISM": "1",
        API: f"http://127.0.0.1:{free_port()}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS": "bucket_logs.LOGGING",
        "LLMEMB_LOGS": logs,
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": "socket.gethostname",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "True",
        "AIRFLOW__API_AUTH__JWT_SECRET": "a secret that all parts have, as long as " + "its algorithm asks for " * 3,
        # a machine that fell is known by its silence; by itself Airflow waits 30 s, and looks every 300 s
        "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "15",
        "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "2",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
        "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",  # so often it is looked whether a task has ended
        **{f"LLMEMB_{name}": os.environ[f"LLMEMB_{name}"] for name in ("ONLINE_STORE", "REGISTRY")},
        "LLMEMB_RECIPE": str(here / "recipe.toml"),
        "LLMEMB_SHARDS": "2",
        "LLMEMB_NIGHTLY_CRON": "",
        "LLMEMB_DEADLINE_HOURS": "0",
        "LLMEMB_RETRY_S": "0.1",
        # other kernels round otherwise, and all vectors would be written again
        "LLMEMB_PASS_ENV": "AWS_*,ATEN_CPU_CAPABILITY,OMP_NUM_THREADS",
        "PYTHONPATH": str(ROOT),
    }


def by_airflow(home: Path, here: Path, object_store: ObjectStore, server: Server) -> None:
    """The third night, by Airflow on two machines at once: a job is killed, and the machine that publishes falls."""
    tables(here, [film(number) for number in range(ITEMS + 12) if number != 3], logs(FIRST, ITEMS))  # and 7 was forgotten
    for folder in ("scratch", "cache"):
        shutil.rmtree(home / folder)
    environment = settings(home, here, server, object_store.address("logs"))
    with machines(home, here, environment) as running:
        object_store.fault = faults = Faults(server, running, here / "recipe.toml")
        state = ended(server, running)
        for machine in running.values():
            machine.fall()  # who reads logs needs none of them
        logs_told = [log(server, environment[API], shard) for shard in range(2)]
    object_store.fault = lambda method, path: ""
    last = {(task, shard): (state, machine) for task, shard, state, machine in tries(server)}
    assert state == "success", last
    assert all("embed: done in" in told for told in logs_told) and logs_told[0] != logs_told[1]
    (stays,) = {"one", "two"} - {faults.fell}
    assert {machine for (task, _), (_, machine) in last.items() if task == "embed"} == {"one", "two"}
    assert [machine for (task, _), (_, machine) in last.items() if task in ("publish", "lookup", "report")] == [stays] * 3
    before = {(task, machine) for task, _, _, machine in tries(server, "_history")}
    assert before >= {("project", faults.killed), ("publish", faults.fell)}


def tries(server: Server, of: str = "") -> list[tuple[str, int, str, str]]:
    """(task, shard, state, machine) of the last try of each task that a machine ran; with `_history` of those before."""
    columns = f"SELECT task_id, map_index, state, hostname FROM task_instance{of}"
    found = server.rows(
        "airflow", f"{columns} WHERE dag_id = 'nightly_embeddings' AND hostname <> '' ORDER BY task_id, map_index"
    )
    return [(task, shard, state, machine) for task, shard, state, machine in found]


def log(server: Server, execution: str, shard: int) -> str:
    """What Airflow's page shows of a shard's log."""
    ((run,),) = server.rows("airflow", "SELECT run_id FROM dag_run WHERE dag_id = 'nightly_embeddings'")
    api = execution.removesuffix("/execution/")
    token = requests.get(f"{api}/auth/token", timeout=30).json()["access_token"]
    path = f"dags/nightly_embeddings/dagRuns/{quote(run)}/taskInstances/embed/logs/1?map_index={shard}&full_content=true"
    return requests.get(f"{api}/api/v2/{path}", headers={"Authorization": f"Bearer {token}"}, timeout=60).text


def ended(server: Server, running: Mapping[str, Machine], patience_s: float = 400) -> str:
    """The state in which the run ended."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        ((state,),) = server.rows("airflow", "SELECT state FROM dag_run WHERE dag_id = 'nightly_embeddings'")
        if state in ("success", "failed"):
            return str(state)
        time.sleep(0.5)
    raise AssertionError("\n".join(machine.log.read_text()[-4000:] for machine in running.values()))


class Faults:
    """What happens to requests: shards wait for each other, at one `project` is killed, at one the machine that publishes."""

    def __init__(self, server: Server, running: Mapping[str, Machine], recipe: Path) -> None:
        self.server, self.running, self.recipe = server, running, recipe
        chance = random.Random(5)
        self.left = {"project": chance.randint(1, 20), "publish": chance.randint(1, 25)}
        self.alone, self.together, self.until = threading.Lock(), False, time.monotonic() + 120
        self.killed = self.fell = ""

    def __call__(self, method: str, path: str) -> str:
        """What happens to a request, whichever machine's it is."""
        if "/logs/" in path:
            return ""
        while method == "PUT" and "/llm_embeddings/" in path and not self.together and time.monotonic() < self.until:
            self.together = len(self.at_work()) == 2
            time.sleep(0.2)
        with self.alone:
            at_work = self.at_work()
            for job in at_work.keys() & self.left.keys():
                self.left[job] -= 1
                if self.left[job] == 0:
                    del self.left[job]
                    self.end(job, at_work[job])
                    return "hang up"
        return ""

    def at_work(self) -> dict[str, str]:
        """What runs now, by job, or by its shard; on which machine."""
        running = [(task, shard, machine) for task, shard, state, machine in tries(self.server) if state == "running"]
        return {task if shard < 0 else f"{task}#{shard}": machine for task, shard, machine in running}

    def end(self, job: str, machine: str) -> None:
        """Ends a job: its process, or the whole machine that it runs on."""
        if job == "publish":
            self.fell = machine
            self.running[machine].fall()
            return
        self.killed = machine
        for process in psutil.process_iter(["cmdline"]):
            if (process.info["cmdline"] or [])[1:6] == ["-m", "jobs", job, "--recipe", str(self.recipe)]:
                process.kill()


def test_without_a_store_for_serving_publish_is_refused_and_makes_no_file(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": "127.0.0.1:1"}))
    monkeypatch.delenv("LLMEMB_REGISTRY", raising=False)
    assert "set LLMEMB_REGISTRY" in runner(here / "recipe.toml", capsys)("publish", FIRST, status=2)["error"]
    assert not list(tmp_path.rglob("registry.db"))
