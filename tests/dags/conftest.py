"""Airflow with a database of its own, and a stub in the place of the jobs."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STANDALONE = runpy.run_path(str(ROOT / "infra" / "standalone.py"))


class Stub:
    """What the jobs will do, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nSTUB="{folder}" exec "{sys.executable}" -SE "{HERE / "stub_jobs.py"}" "$@"\n')
        self.python.chmod(0o755)
        self.plan()

    def plan(self, results: dict[str, Any] | None = None, acts: dict[str, list[Any]] | None = None) -> None:
        """Sets what each job prints and does; forgets the calls so far."""
        usual = {
            "promote": {"decision": "promoted", "recommender_id": "r1", "reasons": []},
            "project": {"space_id": "s1"},
            "rat": {"recommender_id": "r1", "promoted": True},
            "report": {"refresh_encoder": ""},
        }
        (self.folder / "plan.json").write_text(json.dumps({"results": usual | (results or {}), "acts": acts or {}}))
        (self.folder / "calls.jsonl").write_text("")

    def calls(self) -> list[dict[str, Any]]:
        """Every call since the plan was set, in order."""
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]


class Worker:
    """The process that runs DAGs."""

    def __init__(self, environment: dict[str, str], stub: Stub) -> None:
        self.stub = stub
        self.log = stub.folder / "worker.log"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "airflow_worker.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def ask(self, what: str, settings: dict[str, str] | None = None, **request: Any) -> Any:
        """The worker's answer, with LLMEMB_… as in `settings`."""
        usual = {"PYTHON": str(self.stub.python), "DEADLINE_HOURS": "0", "RETRY_S": "0.1", "RECIPE": "recipe.toml"}
        environment = {f"LLMEMB_{name}": value for name, value in (usual | (settings or {})).items()}
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"ask": what, "environment": environment, **request}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the worker died"}
        if "error" in answer:
            raise AssertionError(f"{answer['error']}\n{self.log.read_text()[-3000:]}")
        return answer["answer"]

    def run(self, dag: str, date: str | None = "2026-03-01", conf: dict[str, Any] | None = None, **settings: str) -> Any:
        """Runs a DAG."""
        return self.ask("run", settings, dag=dag, logical_date=date, conf=conf)


def own_environment() -> dict[str, str]:
    """This process's variables but for settings of ours, of Airflow's and of pytest's."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLMEMB_", "AIRFLOW_", "PYTEST_"))}


def airflow_environment(home: Path) -> dict[str, str]:
    """The variables of an Airflow that knows our DAGs only and keeps everything in `home`."""
    return own_environment() | {
        "AIRFLOW_HOME": str(home),
        STANDALONE["DATABASE"]: STANDALONE["database"](home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
    }


def migrate(environment: dict[str, str]) -> None:
    """Makes Airflow's database, with the pools that the DAGs use."""
    words = [sys.executable, "-c", STANDALONE["MIGRATE"], str(ROOT / "infra" / "pools.json")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """The jobs' stub."""
    return Stub(tmp_path_factory.mktemp("jobs") / "stub")


@pytest.fixture(scope="session")
def worker(tmp_path_factory: pytest.TempPathFactory, stub: Stub) -> Iterator[Worker]:
    """A worker with a fresh database."""
    environment = airflow_environment(tmp_path_factory.mktemp("airflow"))
    migrate(environment)
    running = Worker(environment, stub)
    yield running
    assert running.process.stdin
    running.process.stdin.close()
    running.process.wait(60)
