"""What Airflow is given on several machines: logs in a bucket, and an executor that counts its slots."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.dags.conftest import airflow_environment
from tests.infra.documents import INFRA
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store

MACHINE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from airflow import settings
from airflow.logging_config import get_remote_task_log
from airflow.configuration import conf

settings.initialize()
logs, folder = get_remote_task_log(), Path(conf.get("logging", "base_log_folder"))
for path, text in json.loads(sys.argv[1]):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)
    logs.upload(path)
    logs.upload("run/task/none.log")
left = [str(path) for path in folder.rglob("*.log*") if "run" in path.parts]
print(json.dumps([logs.read("run/task/attempt=1.log", SimpleNamespace()), left]))
"""


def machine(home: Path, store: ObjectStore, name: str, *written: tuple[str, str]) -> tuple[list[str], list[str]]:
    """A machine that writes these logs, one after the other; where it then finds those of the first try, and what they say."""
    environment = airflow_environment(home) | {
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(INFRA / "airflow_plugins"),
        "AIRFLOW__CORE__HOSTNAME_CALLABLE": f"machine.{name}",
        "AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS": "bucket_logs.LOGGING",
        "LLMEMB_LOGS": store.address("logs"),
        "PYTHONPATH": str(home),
    }
    (home / "machine.py").write_text("one = lambda: '10.0.0.1'\ntwo = lambda: '10.0.0.2'\n")
    words = [sys.executable, "-c", MACHINE, json.dumps(written)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found, said), left = json.loads(done.stdout.splitlines()[-1])
    assert not left, "a machine's disk does not fill up"
    return found, said


def test_a_try_s_log_is_read_whole_whatever_machines_it_ran_on(tmp_path: Path, object_store: ObjectStore) -> None:
    first = "run/task/attempt=1.log"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    machine(tmp_path / "one", object_store, "one", (first, "begun"), (first, "begun here once more"))
    more = [(first, "ended elsewhere"), (f"{first}.trigger.7.log", "waited"), ("run/task/attempt=10.log", "another try")]
    found, said = machine(tmp_path / "two", object_store, "two", *more, ("run/task_2/attempt=1.log", "another task"))
    assert said == ["begun", "begun here once more", "ended elsewhere", "waited"]
    assert [key.rpartition("Z.")[2] for key in found] == ["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2"]
    assert all(key.startswith(object_store.address(f"logs/{first}")) for key in found)


EXECUTOR = """
import ctypes, json, multiprocessing
from types import SimpleNamespace
from airflow import settings
from airflow.executors.executor_loader import ExecutorLoader
from airflow.utils.state import TaskInstanceState

settings.initialize()
executor = ExecutorLoader.get_default_executor()
executor.activity_queue = SimpleNamespace(put=print, empty=lambda: True)
executor._unread_messages = multiprocessing.Value(ctypes.c_uint)
process = SimpleNamespace(alive=True, close=lambda: None)
process.is_alive = lambda: process.alive
executor.workers = {1: process}
tasks = [SimpleNamespace(key=key) for key in "abc"]
executor.queued_tasks = {task.key: task for task in tasks}
left = [executor.slots_available]
executor._process_workloads(tasks)
left.append(executor.slots_available)
executor.change_state("b", TaskInstanceState.SUCCESS)
executor.sync = executor._check_workers
executor.sync()
left.append(executor.slots_available)
process.alive = False
executor.sync()
left.append(executor.slots_available)
print(json.dumps(left))
"""


def test_a_scheduler_takes_no_more_tasks_than_its_machine_has_slots_for(tmp_path: Path) -> None:
    """Where a process dies with its task, slots come back: a machine would be without work until it is started anew."""
    environment = airflow_environment(tmp_path) | {
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(INFRA / "airflow_plugins"),
        "AIRFLOW__CORE__EXECUTOR": "slots.LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
    }
    done = subprocess.run([sys.executable, "-c", EXECUTOR], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 1, 2, 4]
