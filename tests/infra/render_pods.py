"""The pods that the DAGs would start, made by Airflow's own operator, as JSON; a process apart, as Airflow takes over logging."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DAGS = Path(__file__).parent.parent.parent / "dags"


class Platform:
    """As much of Kubernetes as the operator asks before it starts a pod: it lists pods by labels, and takes new ones."""

    def __init__(self) -> None:
        from kubernetes.client import ApiClient

        self.api_client = ApiClient()
        self.pods: list[Any] = []

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        """The pods that bear all labels; of what must be absent only `already_checked` ever occurs."""
        terms = [term for term in label_selector.split(",") if not term.startswith("!")]
        wanted = dict(term.split("=", 1) for term in terms if "!=" not in term)
        found = [
            pod for pod in self.pods if pod.metadata.namespace == namespace and wanted.items() <= pod.metadata.labels.items()
        ]
        return SimpleNamespace(items=[pod for pod in found if "already_checked" not in pod.metadata.labels])

    def create_namespaced_pod(self, body: dict[str, Any], namespace: str, **_: Any) -> Any:
        """A pod that runs from now on."""
        meta = SimpleNamespace(name=body["metadata"]["name"], namespace=namespace, labels=dict(body["metadata"]["labels"]))
        self.pods.append(SimpleNamespace(metadata=meta, status=SimpleNamespace(phase="Running", reason=None)))
        return self.pods[-1]


def started(task: Any, platform: Platform, run: str, number: int) -> str:
    """Name of the pod that a try of a task ends up with, on a worker that knows nothing of earlier tries."""
    operator = task.prepare_for_execution()
    vars(operator)["client"] = platform
    ti = SimpleNamespace(dag_id=task.dag_id, task_id=task.task_id, map_index=-1, try_number=number)
    context = {"ti": ti, "run_id": run, "dag": None}
    pod = operator.get_or_create_pod(operator.build_pod_request_obj(context, dry_run=True), context)
    return str(pod.metadata.name)


def tries(task: Any) -> list[str]:
    """Pods of: a first try, a second while the first's pod runs, a third after that pod's end was seen, and another run."""
    platform = Platform()
    names = [started(task, platform, "monday", number) for number in (1, 2)]
    platform.pods[0].metadata.labels["already_checked"] = "True"
    return [*names, started(task, platform, "monday", 3), started(task, platform, "tuesday", 1)]


def render() -> dict[str, Any]:
    """Every pod by `dag.task`, shards as `dag.task#N`; the GPU jobs; what retries do."""
    from airflow.dag_processing.dagbag import DagBag
    from job_pod import JobPod
    from job_process import JobProcess
    from job_task import GPU_JOBS
    from kubernetes.client import ApiClient

    bag = DagBag(str(DAGS))
    assert not bag.import_errors, bag.import_errors
    tasks: dict[str, Any] = {}
    for dag in bag.dags.values():
        for task in dag.tasks:
            assert task.task_type != JobProcess.__name__, "every job is a pod"
            if isinstance(task, JobPod):
                tasks[f"{dag.dag_id}.{task.task_id}"] = task
            elif task.task_type == JobPod.__name__:
                for shard, arguments in enumerate(task.expand_input.value["arguments"]):
                    tasks[f"{dag.dag_id}.{task.task_id}#{shard}"] = task.unmap({"arguments": arguments})
    plain = ApiClient().sanitize_for_serialization
    pods = {name: plain(task.build_pod_request_obj(dry_run=True)) for name, task in tasks.items()}
    deferred = {name: task.deferrable for name, task in tasks.items()}
    return {"pods": pods, "deferred": deferred, "gpu_jobs": GPU_JOBS, "tries": tries(tasks["nightly_embeddings.publish"])}


if __name__ == "__main__":
    sys.path.insert(0, str(DAGS))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        rendered = render()
    print(json.dumps(rendered), file=answers)
