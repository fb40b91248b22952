"""Runs DAGs with `dag.test()` in a process of its own, on request: one JSON line in, one out.

Airflow reads its settings when it is imported and takes over logging, so the tests keep it out of their own process.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DAGS = Path(__file__).parent.parent.parent / "dags"


def bag(environment: dict[str, str]) -> dict[str, Any]:
    """The DAGs as parsed under these settings."""
    from airflow.dag_processing.dagbag import DagBag

    for name in [name for name in os.environ if name.startswith("LLMEMB_")]:
        del os.environ[name]
    os.environ.update(environment)
    for name in ("job_task", "job_pod"):
        sys.modules.pop(name, None)
    found = DagBag(str(DAGS))
    if found.import_errors:
        raise RuntimeError(str(found.import_errors))
    return dict(found.dags)


def describe(environment: dict[str, str]) -> dict[str, Any]:
    """The tasks of every DAG and what they were given."""
    return {
        name: {
            "max_active_runs": dag.max_active_runs,
            "tags": sorted(dag.tags),
            "deadline_hours": [alert.interval.total_seconds() / 3600 for alert in dag.deadline or []],
            "waits_for": [asset.name for asset in getattr(dag.timetable.asset_condition, "objects", [])],
            "any": type(dag.timetable.asset_condition).__name__,
            "tasks": {task.task_id: describe_task(task) for task in dag.tasks},
        }
        for name, dag in bag(environment).items()
    }


def describe_task(task: Any) -> dict[str, Any]:
    """One task."""
    from airflow.sdk.bases.notifier import BaseNotifier

    return {
        "type": task.task_type,
        "retries": task.retries,
        "backoff": task.retry_exponential_backoff,
        "hours": task.execution_timeout.total_seconds() / 3600 if task.execution_timeout else None,
        "pool": task.pool,
        "alerts": [isinstance(found, BaseNotifier) for found in task.on_failure_callback],
        "owner": task.owner,
        "downstream": sorted(task.downstream_task_ids),
    }


def run(environment: dict[str, str], dag: str, logical_date: str | None, conf: dict[str, Any] | None) -> dict[str, Any]:
    """One run: its state, and each task instance's state and tries."""
    import pendulum

    date = pendulum.parse(logical_date) if logical_date else None
    done = bag(environment)[dag].test(logical_date=date, run_conf=conf)
    tasks = {
        ti.task_id if ti.map_index < 0 else f"{ti.task_id}#{ti.map_index}": [str(ti.state), ti.try_number]
        for ti in done.get_task_instances()
    }
    return {"state": str(done.state), "tasks": tasks, "run_after": done.run_after.isoformat()}


def snapshot_date(
    environment: dict[str, str], params: dict[str, Any], logical_date: str | None, told: list[str], run_type: str
) -> str:
    """`job_task.snapshot_date` of a run that starts at 2026-03-02 01:00 UTC; the interval of a scheduled one ends then."""
    bag(environment)
    from job_task import snapshot_date as date

    parsed = dt.datetime.fromisoformat(logical_date) if logical_date else None
    start = dt.datetime(2026, 3, 2, 1, tzinfo=dt.UTC)
    dag_run = SimpleNamespace(logical_date=parsed, run_after=start, run_type=run_type, data_interval_end=start)
    return str(date(params, dag_run, {"asset": [SimpleNamespace(extra={"ds": ds} if ds else {}) for ds in told]}))


def judge(
    environment: dict[str, str],
    job: str,
    status: int,
    run_type: str,
    asked: int = 0,
    hours: float = 0,
    assets: Sequence[str] = (),
) -> str:
    """What `job_process.judge` raises for a task that was asked so often in so many hours; and when it is asked next."""
    bag(environment)
    from job_process import judge as ruling

    now = dt.datetime.now(dt.UTC)
    try:
        context = waiting(run_type, asked, now - dt.timedelta(hours=hours) if asked else None)
        ruling(job, status, "last line", context | {"triggering_asset_events": events_of(assets)})
    except Exception as error:
        later = getattr(error, "reschedule_date", None)
        return type(error).__name__ + (f" {(later - now).total_seconds():.0f} s" if later else "")
    return ""


def events_of(assets: Sequence[str]) -> Any:
    """What started a run, as Airflow tells it: these assets were made."""
    from airflow.sdk import Asset
    from airflow.sdk.execution_time.context import TriggeringAssetEventsAccessor

    made = [Asset(name=name, uri=f"llmemb://{name}") for name in assets]
    return TriggeringAssetEventsAccessor.build(SimpleNamespace(asset=one, source_aliases=[], extra={}) for one in made)


def waiting(run_type: str, asked: int = 0, began: dt.datetime | None = None) -> dict[str, Any]:
    """The context of a task that was asked so often since then."""
    ti = SimpleNamespace(
        **{"dag_id": "d", "task_id": "t", "run_id": "r", "try_number": 1},
        get_first_reschedule_date=lambda context: began,
        xcom_push=lambda key, value: None,
    )
    return {"dag_run": SimpleNamespace(run_type=run_type), "ti": ti, "task_reschedule_count": asked}


def pod_end(environment: dict[str, str], status: int | None, lines: list[str]) -> list[Any]:
    """What becomes of a pod of `scft` that ended with a status (None: evicted) and these last lines: [exception, text, XCom]."""
    bag(environment)
    import job_pod
    from airflow.sdk.exceptions import AirflowException

    def ended(*_: Any, **__: Any) -> None:
        if status != 0:
            raise AirflowException("Pod returned a failure")

    job_pod.KubernetesPodOperator.cleanup = ended
    pod = job_pod.JobPod(task_id="scft", arguments=["scft"])
    vars(pod)["client"] = SimpleNamespace(read_namespaced_pod_log=lambda **_: "\n".join(lines))
    terminated = None if status is None else SimpleNamespace(exit_code=status)
    container = SimpleNamespace(name="base", state=SimpleNamespace(terminated=terminated))
    remote = SimpleNamespace(
        metadata=SimpleNamespace(name="p", namespace="n"), status=SimpleNamespace(container_statuses=[container])
    )
    pushed: list[Any] = []
    context = waiting("manual")
    context["ti"].xcom_push = lambda key, value: pushed.append(value)
    try:
        pod.cleanup(remote, remote, context=context)
        pod.result(context)
    except Exception as error:
        return [type(error).__name__, str(error), None]
    return ["", "", pushed[0]]


def pod_run(environment: dict[str, str], how: str, status: int | None, lines: list[str]) -> dict[str, Any]:
    """A pod of `scft` run by the operator's own two ways in, `execute` or `trigger_reentry`, the cluster stubbed.

    The pod ends with a status and these last lines; None: it is gone. What came back, was pushed, was raised, and what was given.
    """
    bag(environment)
    import job_pod
    from airflow.sdk.exceptions import AirflowException

    container = SimpleNamespace(name="base", state=SimpleNamespace(terminated=SimpleNamespace(exit_code=status)))
    remote = SimpleNamespace(
        metadata=SimpleNamespace(name="p", namespace="n"), status=SimpleNamespace(container_statuses=[container])
    )
    given: list[Any] = []

    def ended(self: Any, *_: Any, **__: Any) -> None:
        if status != 0:
            raise AirflowException("Pod returned a failure")

    def way(self: Any, context: Any, *event: Any) -> None:
        given.append([*event])
        if status is not None:
            self.cleanup(remote, remote, context=context)

    base = job_pod.KubernetesPodOperator
    saved = {name: base.__dict__.get(name) for name in ("execute", "trigger_reentry", "cleanup")}
    base.execute = base.trigger_reentry = way
    base.cleanup = ended
    pushed: list[Any] = []
    context = waiting("manual")
    context["ti"].xcom_push = lambda key, value: pushed.append([key, value])
    try:
        pod = job_pod.JobPod(task_id="scft", arguments=["scft"])
        vars(pod)["client"] = SimpleNamespace(read_namespaced_pod_log=lambda **_: "\n".join(lines))
        event = [{"status": "success"}] if how == "trigger_reentry" else []
        value = getattr(pod, how)(context, *event)
        return {"value": value, "pushed": pushed, "raised": "", "given": given}
    except Exception as error:
        return {"value": None, "pushed": pushed, "raised": f"{type(error).__name__}: {error}", "given": given}
    finally:
        for name, value in saved.items():
            setattr(base, name, value)


def answered(environment: dict[str, str], answer: dict[str, Any]) -> dict[str, str]:
    """The settings of `promote` that come of a person's answer, rendered as Airflow does."""
    dag = bag(environment)["rat_training"]
    command = dag.get_task("promote_by_hand").command
    given = {"ti": SimpleNamespace(xcom_pull=lambda _: answer)}
    templates = [word.split("=", 1) for word in command if word.startswith("promote.")]
    return {key: dag.get_template_env().from_string(text).render(given) for key, text in templates}


def questions(environment: dict[str, str]) -> dict[str, Any]:
    """What each question to a person does: its default, its time, what follows, and what its notifiers say."""
    dag, found = bag(environment)["rat_training"], {}
    for name in ("ask", "ask_again"):
        task = dag.get_task(name)
        for notifier in task.notifiers:
            ti = SimpleNamespace(
                dag_id=dag.dag_id, task_id=name, run_id="r", try_number=1, xcom_pull=lambda _: {"recommender_id": "r7"}
            )
            notifier.text = dag.get_template_env().from_string(notifier.text).render(ti=ti)
            with heard() as told:
                notifier.notify({"ti": ti})
        days = task.response_timeout.days
        found[name] = {"default": task.defaults, "days": days, "downstream": sorted(task.downstream_task_ids), "told": told}
    return found


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What the DAGs' own code logs meanwhile."""
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore
    logging.getLogger("airflow.task.job").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("airflow.task.job").removeHandler(handler)


def logged(environment: dict[str, str], by: str, **request: Any) -> list[str]:
    """What one of the other answers logs."""
    bag(environment)  # Airflow sets logging up when it is imported, and takes handlers off
    with heard() as lines:
        ANSWERS[by](environment, **request)
    return lines


def announces(
    environment: dict[str, str],
    dag: str,
    task: str,
    results: list[Any],
    run_type: str = "scheduled",
    assets: Sequence[str] = (),
    published: Any = None,
) -> list[bool]:
    """Whether a task tells other DAGs of each of these Results, in a run of a kind whose `publish` had the Result `published`."""
    said: list[Any] = []
    context = {
        "dag_run": SimpleNamespace(run_type=run_type),
        "ti": SimpleNamespace(xcom_pull=lambda task_id: published if task_id == "publish" else None),
        "triggering_asset_events": events_of(assets),
        "task": SimpleNamespace(command=["scft", "--ds", "2026-03-01"]),
        "outlet_events": defaultdict(lambda: SimpleNamespace(add=lambda made, extra: said.append(made), extra=None)),
    }  # fmt: skip
    found = []
    for result in results:
        said.clear()
        bag(environment)[dag].get_task(task)._post_execute_hook(context, result)
        found.append(bool(said))
    return found


def rendered(environment: dict[str, str], dag: str, task: str, run_type: str, assets: Sequence[str] = ()) -> list[str]:
    """A task's command as Airflow renders it in a run of a kind, 2026-03-02 01:00 UTC, that these assets started."""
    found = bag(environment)[dag]
    start = dt.datetime(2026, 3, 2, 1, tzinfo=dt.UTC)
    given = {
        "dag_run": SimpleNamespace(logical_date=None, run_after=start, run_type=run_type, data_interval_end=start),
        "params": {}, "triggering_asset_events": events_of(assets), "ti": SimpleNamespace(xcom_pull=lambda _: None),
        **found.user_defined_macros,
    }  # fmt: skip
    return [found.get_template_env().from_string(word).render(given) for word in found.get_task(task).command]


def announced(environment: dict[str, str], asset: str) -> list[Any]:
    """What the events of an asset told, newest first."""
    from airflow.models.asset import AssetEvent, AssetModel
    from airflow.utils.session import create_session

    with create_session() as session:
        events = session.query(AssetEvent).join(AssetModel, AssetEvent.asset_id == AssetModel.id)
        return [event.extra for event in events.filter(AssetModel.name == asset).order_by(AssetEvent.id.desc()).limit(5)]


ANSWERS: dict[str, Callable[..., Any]] = {
    "describe": describe,
    "run": run,
    "snapshot_date": snapshot_date,
    "judge": judge,
    "pod_end": pod_end,
    "pod_run": pod_run,
    "answered": answered,
    "questions": questions,
    "announces": announces,
    "rendered": rendered,
    "announced": announced,
    "logged": logged,
}


if __name__ == "__main__":
    sys.path.insert(0, str(DAGS))
    answers = sys.stdout
    pause = time.sleep
    # dag.test() looks once a second whether a task may start
    time.sleep = lambda seconds: pause(min(float(seconds), 0.05))
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.redirect_stdout(sys.stderr):
            try:
                answer = {"answer": ANSWERS[request.pop("ask")](**request)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
