"""`make airflow`, with a stub for the jobs: the pages, and the DAGs under a real scheduler, dag processor and triggerer."""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dags.conftest import ROOT, STANDALONE, Stub, own_environment

PATIENCE_S = 240
pytestmark = pytest.mark.timeout(900)  # each wait has a deadline of its own


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Standalone:
    """A running Airflow, spoken to through its REST API, and the pages beside it."""

    def __init__(self, home: Path, ports: dict[str, int], log: Path, stub: Stub) -> None:
        self.home, self.ports, self.log, self.stub = home, ports, log, stub
        self.url = f"http://127.0.0.1:{ports['airflow']}"
        self.token = ""
        self.scheduled: dict[str, Any] = {}
        self.first_calls: list[dict[str, Any]] = []

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The API's answer."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        for waited in range(PATIENCE_S):
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return json.load(response)
            except urllib.error.HTTPError as refused:
                # 503: the scheduler holds SQLite's write lock, and the request did nothing
                if refused.code != 503 or waited == PATIENCE_S - 1:
                    raise
                time.sleep(1)
        raise AssertionError("never here")

    def page(self, name: str, path: str) -> str:
        """What a person's browser is given."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[name]}{path}", timeout=60) as response:
            return str(response.read().decode())

    def until(self, what: str, met: Callable[[], Any]) -> Any:
        """Waits for a condition; gives what it gave."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                if found := met():
                    return found
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(0.3)
        raise AssertionError(f"waited {PATIENCE_S} s for {what}\n{self.told()}")

    def told(self) -> str:
        """The newest lines of each part: one that talks much hides none of the others."""
        lines: dict[str, list[str]] = {}
        for line in self.log.read_text().splitlines():
            lines.setdefault(line.partition("|")[0], []).append(line[:400])
        return "\n".join(line for part in lines.values() for line in part[-25:])

    def runs(self, dag: str) -> list[dict[str, Any]]:
        """Every run of a DAG."""
        return list(self.call("GET", f"/api/v2/dags/{dag}/dagRuns")["dag_runs"])

    def ended(self, dag: str, kind: str, but: Collection[str] = ()) -> list[dict[str, Any]]:
        """The runs of one kind, but for some, once one of them has ended."""

        def met() -> list[dict[str, Any]]:
            mine = [run for run in self.runs(dag) if run["run_type"] == kind and run["dag_run_id"] not in but]
            return [run for run in mine if run["state"] in ("success", "failed")]

        done: list[dict[str, Any]] = self.until(f"a {kind} run of {dag}", met)
        return done

    def states(self, dag: str, run_id: str) -> dict[str, str]:
        """State of each task of a run."""
        path = f"/api/v2/dags/{dag}/dagRuns/{urllib.request.quote(run_id)}/taskInstances"
        return {task["task_id"]: task["state"] for task in self.call("GET", path)["task_instances"]}


class Inbox(http.server.BaseHTTPRequestHandler):
    """Keeps the alerts."""

    texts: list[str] = []  # noqa: RUF012 — http.server makes an instance for each request

    def do_POST(self) -> None:
        Inbox.texts.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    """All that `make airflow` starts, with a stub in the place of the jobs."""
    home = tmp_path_factory.mktemp("standalone")
    (home / "recipe.toml").write_text(f'[run]\nlake = "{home}/lake"\ntracking_uri = "sqlite:///{home}/lake/mlflow.db"\n')
    stub = Stub(home / "stub")
    inbox = http.server.HTTPServer(("127.0.0.1", 0), Inbox)
    threading.Thread(target=inbox.serve_forever, daemon=True).start()
    ports = {name: free_port() for name in STANDALONE["PORTS"]}
    environment = own_environment() | {
        "AIRFLOW__CORE__PARALLELISM": "3",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        # no second is waited between two looks, and no DAG file is read again
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
        "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "3600",
        # a task that its executor lost is started anew after this, by itself after ten minutes
        "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "60",
        "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "20",
        **{f"LLMEMB_PORT_{name.upper()}": str(port) for name, port in ports.items()},
        "LLMEMB_PYTHON": str(stub.python),
        "LLMEMB_SCFT_CRON": "",
        "LLMEMB_RAT_CRON": "",
        "LLMEMB_RETRY_S": "1",
        # a deadline that every run misses
        "LLMEMB_DEADLINE_HOURS": "0.0003",
        "LLMEMB_ALERT_URL": f"http://127.0.0.1:{inbox.server_port}/",
    }
    running = Standalone(home / "lake" / "airflow", ports, home / "log", stub)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "infra" / "standalone.py"), str(home / "recipe.toml")],
        env=environment,
        stdout=running.log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        running.until("the pages", lambda: process.poll() is not None or "Ctrl-C ends all" in running.log.read_text())
        assert process.poll() is None, running.told()
        running.until("a healthy scheduler", lambda: healthy(running))
        running.token = token(running)
        running.until("the DAGs", lambda: running.call("GET", "/api/v2/dags")["total_entries"] == 7)
        # the night on schedule runs first, by itself: no test's plan may reach into it, in whatever order they run
        stub.plan()
        running.call("PATCH", "/api/v2/dags/nightly_embeddings", {"is_paused": False})
        running.scheduled = running.ended("nightly_embeddings", "scheduled")[0]
        running.first_calls = stub.calls()
        for dag in ("scft_refresh", "rat_training"):
            running.call("PATCH", f"/api/v2/dags/{dag}", {"is_paused": False})
        yield running
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, running.told()
        for port in ports.values():
            socket.create_server(("127.0.0.1", port)).close()
    finally:
        process.terminate()
        process.wait(120)
        inbox.shutdown()


def healthy(running: Standalone) -> bool:
    """Whether every part that runs DAGs reports."""
    health = running.call("GET", "/api/v2/monitor/health")
    return all(health[part]["status"] == "healthy" for part in ("scheduler", "dag_processor", "triggerer", "metadatabase"))


def token(running: Standalone) -> str:
    """A token of the administrator, by the password that is Airflow's own."""
    (name, password), *_ = json.loads((running.home / STANDALONE["PASSWORDS"]).read_text()).items()
    return str(running.call("POST", "/auth/token", {"username": name, "password": password})["access_token"])


def test_the_pages_of_airflow_mlflow_and_feast_answer(standalone: Standalone) -> None:
    assert '"metadatabase":{"status":"healthy"}' in standalone.page("airflow", "/api/v2/monitor/health")
    assert "<title>Airflow</title>" in standalone.page("airflow", "/")
    assert "<title>MLflow</title>" in standalone.page("mlflow", "/")
    assert "llmemb" in standalone.page("feast", "/projects-list.json")
    assert "Feast" in standalone.page("feast", "/")
    with contextlib.closing(sqlite3.connect(standalone.home / "airflow.db")) as database:
        pools = {name for (name,) in database.execute("SELECT pool FROM slot_pool")}
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",), "readers keep nobody from writing"
    assert pools >= set(json.loads((ROOT / "infra" / "pools.json").read_text()))


# before others: where the scheduler is at work, Airflow may take back what it made of a backfill (503: SQLite's lock), and by a
# run whose deadline is gone its scheduler ends
def test_a_backfill_beside_the_night_fills_each_date_and_leaves_both_whole(standalone: Standalone) -> None:
    older, today = ("2025-11-01", "2025-11-02"), "2026-01-07"
    standalone.stub.plan(acts={f"extract@{older[0]}": ["pause"]} | {f"publish@{ds}": [5] for ds in older})
    dates = {"from_date": f"{older[0]}T00:00:00Z", "to_date": f"{older[1]}T23:00:00Z", "max_active_runs": 1}
    standalone.call("POST", "/api/v2/backfills", {"dag_id": "nightly_embeddings", **dates})
    standalone.until("the backfill's first job", lambda: standalone.stub.calls())
    body = {"logical_date": None, "conf": {"ds": today}}
    night = standalone.call("POST", "/api/v2/dags/nightly_embeddings/dagRuns", body)["dag_run_id"]

    def ended() -> dict[str, str]:
        every = {run["dag_run_id"]: run["state"] for run in standalone.runs("nightly_embeddings")}
        mine = {name: state for name, state in every.items() if name == night or name.startswith("backfill__2025-11")}
        return mine if len(mine) == 3 and not {*mine.values()} & {"queued", "running"} else {}

    runs = standalone.until("the night and both dates", ended)
    assert {*runs.values()} == {"success"}
    for run in {*runs} - {night}:
        states = standalone.states("nightly_embeddings", run)
        assert states["project"] == states["report"] == "success" and states["publish"] == states["lookup"] == "skipped"
    calls = [(call["ds"], call["job"]) for call in standalone.stub.calls()]
    jobs = ["pin", "extract", "embed", "project", "publish", "report"]
    assert [call for call in calls if call[0] in older] == [(ds, job) for ds in older for job in jobs]
    assert [job for ds, job in calls if ds == today] == ["pin", "extract", "embed", "project", "publish", "lookup", "report"]
    # each worked on its own date, though the night began before the backfill had ended
    assert calls.index((today, "extract")) < calls.index((older[1], "report"))


def test_a_refresh_runs_on_to_a_served_space_and_asks_a_person_between(standalone: Standalone) -> None:
    asked = {
        "decision": "undecided",
        "recommender_id": "r1",
        "encoder_id": "e1",
        "champion_id": "c1",
        "reasons": [{"gate": "not worse on tail", "verdict": "undecided", "text": "NDCG -0.0015 (95 % -0.0025 to -0.0005)"}],
    }
    trained = {"job": "scft", "due": True}
    standalone.stub.plan(results={"scft": trained, "promote": [asked, {**asked, "decision": "promoted"}]})
    body = {"logical_date": None, "conf": {"ds": "2026-01-05"}}
    nights = {run["dag_run_id"] for run in standalone.runs("nightly_embeddings")}  # another test may have started some
    standalone.call("POST", "/api/v2/dags/scft_refresh/dagRuns", body)
    assert standalone.ended("scft_refresh", "manual")[0]["state"] == "success"

    training = standalone.until("the training that the encoder triggers", lambda: standalone.runs("rat_training"))[0]
    where = f"/api/v2/dags/rat_training/dagRuns/{training['dag_run_id']}"

    def waiting() -> bool:
        return standalone.states("rat_training", training["dag_run_id"])["ask"] == "awaiting_input"

    standalone.until("the question", waiting)
    question = standalone.call("GET", f"{where}/taskInstances/ask/-1/hitlDetails")
    assert "r1" in question["subject"] and "Challenger r1 (encoder e1) against\nc1, on the same" in question["body"]
    assert "| gate | verdict | figures |\n|---|---|---|\n| not worse on tail | undecided | NDCG -0.0015 (95 %" in question["body"]
    time.sleep(3)  # an answer within the second in which it was asked counts as a lost task: Airflow then asks again
    answer = {"chosen_options": ["Approve"], "params_input": {}}
    standalone.call("PATCH", f"{where}/taskInstances/ask/-1/hitlDetails", answer)
    assert standalone.ended("rat_training", "asset_triggered")[0]["state"] == "success"

    assert standalone.ended("nightly_embeddings", "asset_triggered", nights)[0]["state"] == "success"
    calls = [call for call in standalone.stub.calls() if call["ds"] == "2026-01-05"]
    chain = ["extract", "scft", "embed", "pretrain", "rat", "embed", "embed", "evaluate", "promote", "promote", "rat"]
    assert [call["job"] for call in calls] == [*chain, "pin", "extract", "embed", "project", "publish", "lookup", "report"]
    assert [call["set"] for call in calls if call["job"] == "pin"] == [{"pin.newest": "true"}]
    assert [call["set"] for call in calls if call["job"] == "promote"] == [
        {},
        {"promote.approved_by": '"admin"', "promote.overruled_by": '"admin"', "promote.rejected_by": '""'},
    ]


def test_the_night_on_schedule_is_green_and_works_on_the_day_before(standalone: Standalone) -> None:
    night = standalone.scheduled
    assert night["state"] == "success"
    start = dt.datetime.fromisoformat(night["data_interval_start"])
    assert start.date() < dt.datetime.now(dt.UTC).date()
    assert [call["job"] for call in standalone.first_calls if call["ds"] == f"{start:%Y-%m-%d}"][-1] == "report"


def test_logs_start_a_night_of_their_own_date_and_it_serves_only_if_none_is_newer(standalone: Standalone) -> None:
    standalone.stub.plan(results={"report": {"refresh_encoder": "moved"}}, acts={"publish@2026-01-12": [5]})
    assets = {one["name"]: one["id"] for one in standalone.call("GET", "/api/v2/assets")["assets"]}
    before = {run["dag_run_id"] for run in standalone.runs("nightly_embeddings")}
    standalone.call("POST", "/api/v2/assets/events", {"asset_id": assets["logs"], "extra": {"ds": "2026-01-12"}})

    night = standalone.ended("nightly_embeddings", "asset_triggered", before)[0]["dag_run_id"]
    states = standalone.states("nightly_embeddings", night)
    assert (states["project"], states["publish"], states["lookup"], states["report"]) == (
        "success",
        "skipped",
        "skipped",
        "success",
    )
    calls = [call for call in standalone.stub.calls() if call["job"] == "pin"]
    assert [(call["ds"], call["set"]) for call in calls] == [("2026-01-12", {"pin.newest": "false"})]
    told = standalone.call("GET", f"/api/v2/assets/events?asset_id={assets['encoder_due']}")["asset_events"]
    assert [event for event in told if event["source_run_id"] == night] == [], "an old date says nothing of the encoder"


def test_a_night_whose_logs_come_late_waits_under_a_scheduler_too(standalone: Standalone) -> None:
    ds = "2026-01-11"
    standalone.stub.plan(acts={f"extract@{ds}": [4, 4]})
    body = {"logical_date": None, "conf": {"ds": ds}}
    night = standalone.call("POST", "/api/v2/dags/nightly_embeddings/dagRuns", body)["dag_run_id"]

    def ended() -> str:
        state = next(run["state"] for run in standalone.runs("nightly_embeddings") if run["dag_run_id"] == night)
        return state if state in ("success", "failed") else ""

    assert standalone.until("the night", ended) == "success"
    jobs = [call["job"] for call in standalone.stub.calls() if call["ds"] == ds]
    assert jobs == ["pin", "extract", "extract", "extract", "embed", "project", "publish", "lookup", "report"]
    where = f"/api/v2/dags/nightly_embeddings/dagRuns/{urllib.request.quote(night)}/taskInstances/extract"
    assert standalone.call("GET", where)["try_number"] == 1


def test_a_run_that_is_late_is_told(standalone: Standalone) -> None:
    text = "nightly_embeddings has not ended within 0.0003 h: what serves grows old"
    standalone.until("the alert", lambda: text in Inbox.texts)
