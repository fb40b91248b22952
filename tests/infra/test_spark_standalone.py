"""`extract` on a Spark standalone cluster, a master and two workers, with the shipped settings; a worker dies in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent.parent
DS = "2026-03-01"
ITEMS, USERS, EVENTS = 2_000, 3_000, 200_000


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: str, met: Callable[[], Any], patience: float = 90) -> Any:
    """Waits for a condition; gives what it gave."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            if found := met():
                return found
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited {patience} s for {what}")


class Cluster:
    """A master and its workers, each a process group of its own."""

    def __init__(self, folder: Path) -> None:
        from jobs.engines.spark import find_java

        find_java()
        import pyspark

        self.folder, self.home = folder, Path(pyspark.__file__).parent
        self.port, self.page = free_port(), free_port()
        self.settings = folder / "conf"
        shipped = (ROOT / "infra" / "spark" / "standalone" / "spark-defaults.conf").read_text()
        laptop = {
            r"spark://\S+": f"spark://127.0.0.1:{self.port}",
            r"(spark\.executor\.memory\s+)\S+": r"\g<1>512m",
            r"(spark\.executor\.cores\s+)\S+": r"\g<1>1",
            r"(spark\.driver\.memory\s+)\S+": r"\g<1>1g",
        }
        for pattern, value in laptop.items():
            shipped, count = re.subn(pattern, value, shipped)
            assert count == 1, pattern
        # a cluster of two cores: what a session set by itself before, its own settings say now
        self.shipped = f"{shipped}\nspark.sql.shuffle.partitions 8\nspark.ui.enabled false\n"
        self.settle(self.settings, "a secret of this test")
        self.environment = os.environ | {
            "SPARK_CONF_DIR": str(self.settings),
            "SPARK_LOCAL_IP": "127.0.0.1",
            "SPARK_HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
        }
        self.processes = [self.start("master.Master", "--port", str(self.port), "--webui-port", str(self.page))]
        until("the master", self.state)
        for number in range(2):
            work = str(folder / f"work{number}")
            arguments = ["--cores", "1", "--memory", "1g", "--webui-port", "0", "--work-dir", work]
            self.processes.append(self.start("worker.Worker", *arguments, f"spark://127.0.0.1:{self.port}"))
        until("two workers", lambda: self.alive() == 2)

    def settle(self, folder: Path, secret: str) -> None:
        """The shipped settings with a secret, as their comment says."""
        folder.mkdir(exist_ok=True)
        secrets = f"\nspark.authenticate true\nspark.authenticate.secret {secret}\n"
        (folder / "spark-defaults.conf").write_text(self.shipped + secrets)

    def start(self, role: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A master or a worker."""
        command = [str(self.home / "bin" / "spark-class"), f"org.apache.spark.deploy.{role}", "--host", "127.0.0.1", *arguments]
        log = (self.folder / f"{role}-{time.monotonic_ns()}.log").open("w")
        return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)

    def state(self) -> dict[str, Any]:
        """What the master knows."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/json/", timeout=5) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def alive(self) -> int:
        """Workers that live."""
        return sum(worker["state"] == "ALIVE" for worker in self.state()["workers"])

    def busy(self) -> int:
        """Workers whose core an application holds."""
        return sum(worker["coresused"] > 0 for worker in self.state()["workers"])

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Ends a process and what it started, at once: a machine that is gone."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running cluster."""
    running = Cluster(tmp_path_factory.mktemp("spark"))
    yield running
    for process in running.processes:
        if process.poll() is None:
            running.kill(process)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source tables as Parquet, and a recipe that leaves the master to the cluster's settings."""
    folder = tmp_path_factory.mktemp("source")
    draw = np.random.default_rng(1)
    titles = [f"Item {number}" for number in range(ITEMS)]
    pq.write_table(pa.table({"item_id": [f"i{n}" for n in range(ITEMS)], "title": titles}), folder / "items.parquet")
    events = {
        "user_id": [f"u{n}" for n in draw.integers(0, USERS, EVENTS)],
        "item_id": [f"i{n}" for n in draw.integers(0, ITEMS, EVENTS)],
        "timestamp": draw.integers(1_740_000_000, 1_772_000_000, EVENTS),
    }
    pq.write_table(pa.table(events), folder / "events.parquet", row_group_size=20_000)
    path = folder / "recipe.toml"
    path.write_text(
        '[run]\nlake = "$TEST_LAKE"\n'
        f'[extract.items]\ntable = "{folder}/items.parquet"\nattributes = ["title"]\n'
        f'[extract.interactions]\ntable = "{folder}/events.parquet"\n'
        '[extract.spark]\n"spark.sql.files.maxPartitionBytes" = "200000"\n'
    )
    return path


def start(recipe: Path, lake: Path, environment: dict[str, str], *settings: str) -> subprocess.Popen[str]:
    """`extract` into a lake of its own."""
    command = [sys.executable, "-m", "jobs", "extract", "--recipe", str(recipe), "--ds", DS]
    for setting in settings:
        command += ["--set", setting]
    environment = environment | {"TEST_LAKE": str(lake), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The Result of a job that ended well."""
    out, err = process.communicate(timeout=480)
    assert process.returncode == 0, err[-3000:]
    value: dict[str, Any] = json.loads(out.splitlines()[-1])
    return value


def rows(lake: Path, table: str) -> pa.Table:
    """A table of the snapshot. Files of two Java processes may list a column's encodings in another order."""
    folder = lake / table / f"ds={DS}"
    names = [file["name"] for file in json.loads((folder / "_commit.json").read_text())["files"]]
    return pa.concat_tables(pq.read_table(folder / name) for name in names)


@pytest.mark.timeout(900)  # three extracts, one on a cluster of processes; each wait in it has a deadline of its own
def test_extract_on_a_cluster_survives_a_worker_and_leaves_the_same_lake(cluster: Cluster, recipe: Path, tmp_path: Path) -> None:
    running = start(recipe, tmp_path / "cluster", cluster.environment)
    until("executors on both workers", lambda: cluster.busy() == 2)
    until("the first written files", lambda: list((tmp_path / "cluster").rglob("*")))
    assert running.poll() is None
    cluster.kill(cluster.processes[1])
    on_cluster = result(running)
    until("the master to miss the worker", lambda: cluster.alive() == 1)

    here = {name: value for name, value in os.environ.items() if name != "SPARK_CONF_DIR"}
    local = result(start(recipe, tmp_path / "local", here, 'extract.spark={"spark.master" = "local[2]"}'))
    assert on_cluster["rows"] == local["rows"] and on_cluster["rows"]["items"] == ITEMS
    for table in ("items", "interactions", "sequences"):
        assert rows(tmp_path / "cluster", table) == rows(tmp_path / "local", table), "the same rows in the same order"
