"""One job as an Airflow task, always the command `python -m jobs NAME --recipe FILE --ds DATE [--set job.key=value]`.

Settings are environment variables, read when the DAG files are parsed, so that a laptop and a cluster run the same files:
LLMEMB_RECIPE, LLMEMB_PYTHON, LLMEMB_EXECUTOR (`process` or `kubernetes`), LLMEMB_SHARDS, LLMEMB_RETRIES, LLMEMB_RETRY_S,
LLMEMB_WAIT_HOURS, LLMEMB_DEADLINE_HOURS, LLMEMB_ALERT_URL, LLMEMB_OWNER, LLMEMB_NIGHTLY_CRON, LLMEMB_HOURLY_CRON,
LLMEMB_SCFT_CRON, LLMEMB_RAT_CRON, LLMEMB_MAINTENANCE_CRON; for pods also LLMEMB_PODS, LLMEMB_NAMESPACE and LLMEMB_IMAGE_SPARK,
_GPU, _CPU.
"""

from __future__ import annotations

import datetime as dt
import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from airflow.sdk import DAG, Asset, AssetAlias, AssetAny, AssetOrTimeSchedule, CronDataIntervalTimetable, Param
from airflow.sdk.bases.notifier import BaseNotifier
from airflow.sdk.definitions.callback import SyncCallback
from airflow.sdk.definitions.deadline import DeadlineAlert, DeadlineReference
from job_process import ROOT, JobProcess, log, setting
from job_redaction import redacted

GPU_JOBS = ("scft", "embed", "pretrain", "rat", "evaluate")
HOURS = {"extract": 6, "scft": 24, "embed": 12, "pretrain": 12, "rat": 12, "evaluate": 4, "publish": 6}
"""How long a try may take; two hours for the others."""
TAGS = {"scft_refresh": "training", "rat_training": "training", "nightly_embeddings": "serving",
        "hourly_items": "serving", "maintenance": "upkeep"}  # fmt: skip
"""What a DAG is for; the others are started by a person."""
DATE = "{{ snapshot_date(params, dag_run, triggering_asset_events) }}"

# --------------------------------------------------------------------------------------------------------------- settings


def asset(name: str) -> Asset:
    """What one DAG makes and another waits for."""
    return Asset(name=name, uri=f"llmemb://{name}")


def schedule(variable: str, cron: str, *assets: Asset) -> Any:
    """At the times of the setting LLMEMB_VARIABLE (UTC), `cron` unless it says otherwise, and when any of the assets is made.

    A run covers the interval that ends when it starts, and works on the last day of it. An empty setting leaves the times out.
    """
    cron = setting(variable, cron)
    made = AssetAny(*assets) if assets else None  # a list would wait for all of them
    if not cron:
        return made
    timetable = CronDataIntervalTimetable(cron, timezone="UTC")
    return AssetOrTimeSchedule(timetable=timetable, assets=made) if made else timetable


# ------------------------------------------------------------------------------------------------------------ DAG and task


def job_dag(dag_id: str, *, schedule: Any, doc: str, params: Mapping[str, Param] | None = None) -> DAG:
    """A DAG whose runs each have one explicit date, one at a time, with alerts on failure and on lateness."""
    return DAG(
        dag_id,
        schedule=schedule,
        doc_md=doc,
        tags={"llmemb", TAGS.get(dag_id, "on demand")},
        # backfills and tests may go back as far as the logs do: a task before its start date would silently not run
        start_date=dt.datetime(1970, 1, 1, tzinfo=dt.UTC),
        catchup=False,
        max_active_runs=1,
        params={"ds": Param(None, type=["null", "string"], format="date", description="Date of the snapshot"), **(params or {})},
        user_defined_macros={"snapshot_date": snapshot_date},
        user_defined_filters={"toml": toml},
        default_args={
            "retries": int(setting("RETRIES", "3")),
            "retry_delay": dt.timedelta(seconds=float(setting("RETRY_S", "30"))),
            "retry_exponential_backoff": 2.0,
            "max_retry_delay": dt.timedelta(minutes=30),
            "execution_timeout": dt.timedelta(hours=2),
            "pool": "default_pool",
            "on_failure_callback": Failed(),
            "owner": setting("OWNER", "llmemb"),
        },
        deadline=deadline(dag_id),
    )


def deadline(dag_id: str) -> DeadlineAlert | None:
    """An alert where a run has not ended in time; none at LLMEMB_DEADLINE_HOURS=0, as `airflow dags test` (3.3) needs it."""
    hours = float(setting("DEADLINE_HOURS", "6" if dag_id == "nightly_embeddings" else "48"))
    if dag_id == "hourly_items":
        hours = min(hours, 1.0)
    if not hours:
        return None
    return DeadlineAlert(
        name="late",
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=dt.timedelta(hours=hours),
        callback=SyncCallback(late, kwargs={"dag_id": dag_id, "hours": hours}),
    )


def job_task(
    name: str,
    *,
    task_id: str = "",
    shards: int = 0,
    makes: Asset | None = None,
    when: Callable[[Mapping[str, Any]], bool] | None = None,
    settings: Mapping[str, str] | None = None,
    ds: str = "",
    pool: str = "",
    **airflow: Any,
) -> Any:
    """The task of a job: a process here, or a pod where LLMEMB_EXECUTOR is `kubernetes`.

    `ds` is the date, the run's own (`snapshot_date`) unless an earlier task says it. `pool` is Airflow's, if not the usual one.
    `shards` of at least 1 maps the task, one shard a task instance. `settings` are the command's `--set job.key=value`;
    what people or jobs fill in goes through the filter `toml`, or item 405 would be a number, and space 12e45678 a large one.
    `makes` tells other DAGs of a success, and with `when` only of one whose Result passes it.
    """
    command = [name, "--recipe", setting("RECIPE", str(ROOT / "jobs" / "recipes" / "prod.toml")), "--ds", ds or DATE]
    for key, value in (settings or {}).items():
        command += ["--set", f"{name}.{key}={value}"]
    if makes:
        airflow["outlets"] = [AssetAlias(makes.name) if when else makes]
        airflow["post_execute"] = partial(announce, makes=makes, when=when)
    airflow |= {
        "task_id": task_id or name,
        "execution_timeout": dt.timedelta(hours=HOURS.get(name, 2)),
        "pool": pool or ("gpu" if name in GPU_JOBS else "default_pool"),
    }
    operator, argument = JobProcess, "command"
    if setting("EXECUTOR", "process") == "kubernetes":
        from job_pod import JobPod, pod_arguments  # brings the Kubernetes client: only where it is used

        operator, argument = JobPod, "arguments"
        airflow |= pod_arguments(name, gpu=name in GPU_JOBS)
    if not shards:
        return operator(**airflow, **{argument: command})
    portions = [[*command, "--set", f"{name}.shards={shards}", "--set", f"{name}.shard={shard}"] for shard in range(shards)]
    return operator.partial(**airflow).expand(**{argument: portions})


def told_by(task_id: str) -> dict[str, str]:
    """Settings of `lookup`: which space, and which write of the pointer, the Result of an earlier task says that serves."""
    result = f"(ti.xcom_pull('{task_id}') or {{}})"
    return {
        "space": f"{{{{ {result}.get('space_id', '') | toml }}}}",
        "sequence": f"{{{{ {result}.get('sequence', 0) | toml }}}}",
    }


def toml(value: Any) -> str:
    """A value as the command line reads it, in ASCII: what JSON or a shell, a pod or Jinja could change is escaped.

    Raises ValueError for half a character (a lone surrogate), and for what is no text, number, truth or list of those.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml(one) for one in value)}]"
    if not isinstance(value, str) or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{value!r} can't be written as TOML: give a whole text")
    return '"' + "".join(letter if plain(letter) else f"\\U{ord(letter):08x}" for letter in value) + '"'


def plain(letter: str) -> bool:
    """Whether a letter stands for itself everywhere: Kubernetes would replace `$(NAME)`, Jinja `{{`."""
    return " " <= letter <= "~" and letter not in '"\\${}'


def snapshot_date(params: Mapping[str, Any], dag_run: Any, asset_events: Any = None) -> str:
    """The date a run works on: its parameter `ds`, the last day of the interval that it covers on schedule or in a backfill, its
    logical date, the newest date of the assets that triggered it, or else the last day that was over when it was to start. The
    same for every task and every retry of the run."""
    if params.get("ds"):
        return str(params["ds"])
    if dag_run.run_type in ("scheduled", "backfill") and dag_run.data_interval_end:
        # not the first: a weekly run would work on logs a week old, older than what a night has promoted since
        return f"{dag_run.data_interval_end - dt.timedelta(days=1):%Y-%m-%d}"
    if dag_run.logical_date:
        return f"{dag_run.logical_date:%Y-%m-%d}"
    told = [event.extra["ds"] for events in (asset_events or {}).values() for event in events if event.extra.get("ds")]
    return max(told, default=f"{dag_run.run_after - dt.timedelta(days=1):%Y-%m-%d}")


def announce(context: Any, result: Any, *, makes: Asset, when: Callable[[Mapping[str, Any]], bool] | None) -> None:
    """Tells the DAGs that wait for an asset, with the date it was made for: the one that the job was called with."""
    task = context["task"]
    words = getattr(task, "command", None) or task.arguments
    extra = {"ds": words[words.index("--ds") + 1]}
    if when is None:
        context["outlet_events"][makes].extra = extra
    elif when(result):
        context["outlet_events"][AssetAlias(makes.name)].add(makes, extra=extra)


# ------------------------------------------------------------------------------------------------------------------ alerts


class Failed(BaseNotifier):  # type: ignore[misc]
    """Tells that a task failed for good: one line in the log, and to LLMEMB_ALERT_URL where it is set."""

    def notify(self, context: Any) -> None:
        """The task, and why."""
        ti = context["ti"]
        why = " ".join(str(context.get("exception") or "no reason given").split())[:500]
        facts = {"dag": ti.dag_id, "task": ti.task_id, "run": ti.run_id, "try": ti.try_number}
        tell(f"{ti.dag_id}.{ti.task_id} failed: {why}", facts)


class Told(BaseNotifier):  # type: ignore[misc]
    """Tells people of a question that waits for them, in the log and at LLMEMB_ALERT_URL."""

    template_fields: Sequence[str] = ("text",)

    def __init__(self, *, text: str) -> None:
        super().__init__()
        self.text = text

    def notify(self, context: Any) -> None:
        """The text, with where to answer."""
        ti = context["ti"]
        tell(
            f"{ti.dag_id}.{ti.task_id}: {self.text}",
            {"dag": ti.dag_id, "task": ti.task_id, "run": ti.run_id, "try": ti.try_number},
        )


def late(dag_id: str, hours: float, **_: Any) -> None:
    """A run did not end in time: what serves grows old."""
    tell(f"{dag_id} has not ended within {hours:g} h: what serves grows old", {"dag": dag_id})


def tell(text: str, facts: Mapping[str, Any]) -> None:
    """Logs an alert and posts it as JSON, with a `text` as chat systems take it; never fails the caller."""
    text = redacted(text)
    log.error("ALERT %s", text)
    if url := setting("ALERT_URL"):
        try:
            body = json.dumps({"text": text, **facts}).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=10).close()
        except Exception as error:  # whatever it is: its text may quote the address, and whoever has that may post there
            log.error("the alert did not reach LLMEMB_ALERT_URL: %s %s", type(error).__name__, getattr(error, "code", ""))
