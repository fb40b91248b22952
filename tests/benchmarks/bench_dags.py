"""What orchestration costs: seconds to import each DAG file, seconds that Airflow adds to a task, and its share of a real night.

    python tests/benchmarks/bench_dags.py --runs 5 --demo .demo

Import times are medians over processes of their own, less a bare `import airflow.sdk`, which is told beside them. Tasks are those
of `nightly_embeddings` under `dag.test()` with a stub for the jobs. With `--demo` the folder of a finished `make demo` is read:
what its DAGs took, less what their jobs, by their own manifests, worked. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.dags.conftest import Stub, airflow_environment, migrate  # noqa: E402

FILES = sorted(path.stem for path in (ROOT / "dags").glob("*.py") if not path.stem.startswith("job_"))
TIMED = """
import json, sys, time
start = time.perf_counter()
import airflow.sdk
bare = time.perf_counter()
__import__(sys.argv[1])
print(json.dumps([bare - start, time.perf_counter() - bare]))
"""
TESTED = """
import json, sys, time
import pendulum
from airflow.dag_processing.dagbag import DagBag
start = time.perf_counter()
dag = DagBag(sys.argv[1]).dags["nightly_embeddings"]
parsed = time.perf_counter()
seconds = []
for day in range(int(sys.argv[2])):
    begun = time.perf_counter()
    run = dag.test(logical_date=pendulum.datetime(2026, 1, 1).add(days=day))
    assert run.state == "success", run.state
    seconds.append(time.perf_counter() - begun)
print(json.dumps([parsed - start, len(run.get_task_instances()), seconds]))
"""


def last_line(program: str, *words: str, environment: dict[str, str]) -> Any:
    """The JSON that a program printed last."""
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def imports(runs: int, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds of each DAG file on top of Airflow's own."""
    found = {name: [last_line(TIMED, name, environment=environment) for _ in range(runs)] for name in FILES}
    return {
        "bare_airflow_s": round(statistics.median(bare for times in found.values() for bare, _ in times), 3),
        "dag_file_s": {name: round(statistics.median(own for _, own in times), 4) for name, times in found.items()},
    }


def stubbed(runs: int, environment: dict[str, str], stub: Stub) -> dict[str, Any]:
    """Seconds that a task takes when its job does nothing, and what of them is the stub's process."""
    parsed, tasks, seconds = last_line(TESTED, str(ROOT / "dags"), str(runs), environment=environment)
    jobs = [call["words"] for call in stub.calls()][-6:]
    begun = time.perf_counter()
    for words in jobs:
        subprocess.run([str(stub.python), *words], capture_output=True, check=True)
    own = time.perf_counter() - begun
    night = statistics.median(seconds)
    return {
        "tasks": tasks,
        "parse_s": round(parsed, 3),
        "night_s": round(night, 3),
        "stub_processes_s": round(own, 3),
        "per_task_s": round((night - own) / tasks, 4),
    }


def moment(text: str) -> dt.datetime:
    """A time of Airflow's database or of a manifest."""
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


def demo(folder: Path) -> dict[str, Any]:
    """A finished demo: seconds of its DAGs from their first task to their end, and the seconds of their jobs."""
    with closing(sqlite3.connect(f"file:{folder / 'airflow' / 'airflow.db'}?mode=ro", uri=True)) as database:
        query = "select dag_id, task_id, start_date, end_date from task_instance where state = 'success' order by start_date"
        tasks = [(dag, task, moment(start), moment(end)) for dag, task, start, end in database.execute(query)]
        ends = dict(database.execute("select dag_id, max(end_date) from dag_run group by dag_id"))
    manifests = [json.loads(path.read_text()) for path in (folder / "lake" / "manifests").glob("ds=*/*.json")]
    runs = [run for manifest in manifests for run in (manifest | {"earlier": []}, *with_job(manifest))]
    begun = {dag: min(start for name, _, start, _ in tasks if name == dag) for dag in ends}
    wall = sum((moment(ends[dag]) - begun[dag]).total_seconds() for dag in ends)
    in_tasks, matched, worked = 0.0, 0.0, 0.0
    for _, task, start, end in tasks:
        taken = (end - start).total_seconds()
        in_tasks += taken
        own = [run["seconds"] for run in runs if task.startswith(run["job"]) and start <= moment(run["started_at"]) <= end]
        if own:
            matched, worked = matched + taken, worked + own[0]
    return {
        "dags_s": round(wall, 2),
        "tasks_s": round(in_tasks, 2),
        "between_tasks_s": round(wall - in_tasks, 2),
        "between_tasks_share": round((wall - in_tasks) / in_tasks, 4),
        # tasks of which a manifest is left: one that ran again for the same date may have replaced the earlier one's
        "matched_tasks_s": round(matched, 2),
        "matched_jobs_s": round(worked, 2),
        "start_and_end_of_processes_share": round((matched - worked) / worked, 4),
        "overhead_share": round((wall - in_tasks + (matched - worked) * in_tasks / matched) / (in_tasks * worked / matched), 4),
    }


def with_job(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a manifest's own one followed."""
    return [{**run, "job": manifest["job"]} for run in manifest.get("earlier", [])]


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--demo", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        stub = Stub(Path(home) / "stub")
        environment = airflow_environment(Path(home)) | {
            "PYTHONPATH": str(ROOT / "dags"),
            "LLMEMB_PYTHON": str(stub.python),
            "LLMEMB_DEADLINE_HOURS": "0",
        }
        migrate(environment)
        found = {"imports": imports(arguments.runs, environment), "stubbed": stubbed(arguments.runs, environment, stub)}
    if arguments.demo:
        found["demo"] = demo(arguments.demo)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
