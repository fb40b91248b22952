"""One job as a pod. What the pod is like, image, resources, tolerations, volumes, secrets, stands in a template of the platform:
`pod-spark.yaml`, `pod-gpu.yaml`, `pod-store.yaml` or `pod-cpu.yaml` in the folder LLMEMB_PODS, or `pod-JOB.yaml` for a job that
is to be unlike the others of its kind. Here only the job's arguments are added."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk.exceptions import AirflowException
from job_process import ROOT, judge, setting
from job_redaction import redacted

STORE_JOBS = ("pin", "publish", "lookup", "recommend", "explain", "collect", "rollback", "forget")
"""Jobs that get the secrets of the online store; no other does."""
TAIL = 100
"""Raw log lines that are asked for: a node breaks a line at 16 KiB, and libraries that end may say more than the job does."""


def pod_arguments(job: str, *, gpu: bool) -> dict[str, Any]:
    """What the operator is told of a job's pod."""
    kind = "spark" if job == "extract" else "gpu" if gpu else "cpu"
    templates = Path(setting("PODS", str(ROOT / "infra" / "kubernetes")))
    own, of_kind = templates / f"pod-{job}.yaml", templates / f"pod-{kind}.yaml"
    if job in STORE_JOBS and (templates / "pod-store.yaml").exists():  # folders of an older version have none
        of_kind = templates / "pod-store.yaml"
    return {
        "name": f"llmemb-{job}",
        "labels": {"app.kubernetes.io/name": "llmemb", "app.kubernetes.io/component": job},
        "pod_template_file": str(own if own.exists() else of_kind),
        "image": os.environ.get(f"LLMEMB_IMAGE_{kind.upper()}"),
        "namespace": os.environ.get("LLMEMB_NAMESPACE"),
        "env_vars": {"LLMEMB_IMAGE_SPARK": setting("IMAGE_SPARK")} if kind == "spark" else {},  # its executors' image
        # a worker that died finds its pod again; one that was told to stop takes the pod with it
        "durable": True,
        "on_finish_action": "delete_pod",
        "startup_timeout_seconds": int(setting("POD_START_S", "1800")),
        "container_name_log_prefix_enabled": False,
        "log_pod_spec_on_failure": False,
        "log_events_on_failure": True,
    }


class JobPod(KubernetesPodOperator):  # type: ignore[misc]
    """Runs a job as a pod; waits in the worker, or in the triggerer if `operators.default_deferrable` is set."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lines: list[str] = []

    def execute(self, context: Any) -> Any:
        """The job's Result. Raises what `judge` makes of its exit status."""
        super().execute(context)
        return self.result(context)

    def trigger_reentry(self, context: Any, event: dict[str, Any]) -> Any:
        """The same, where the triggerer had waited."""
        super().trigger_reentry(context, event)
        return self.result(context)

    def result(self, context: Any) -> Any:
        """The Result that the job printed, as the XCom. No sidecar: that would take the right to run commands in pods."""
        value = next((json.loads(line) for line in reversed(self.lines) if line.startswith("{")), None)
        if value is None:  # the pod, or its log, was gone before it was read: a second run of a job that is done is short
            raise AirflowException(f"{self.arguments[0]} ended well, but its Result is in no line of the pod's log")
        context["ti"].xcom_push(key="return_value", value=value)
        return value

    def cleanup(self, pod: Any, remote_pod: Any, xcom_result: Any = None, context: Any = None) -> None:
        """Reads the last lines before the pod goes, and makes its exit status final or worth a retry."""
        if remote_pod and not self._killed:
            self.lines = self.last_lines(remote_pod)
        try:
            super().cleanup(pod, remote_pod, xcom_result, context)
        except AirflowException:
            code = exit_code(remote_pod, self.base_container_name)
            if code is not None:
                job = self.arguments[0]
                own = [line for line in self.lines if line.startswith(f"{job}: ")]
                judge(job, code, redacted((own or self.lines or [""])[-1]), context)
            raise

    def last_lines(self, pod: Any) -> list[str]:
        """The newest lines of the job's log, none where the log is gone."""
        from kubernetes.client.exceptions import ApiException

        where = {"name": pod.metadata.name, "namespace": pod.metadata.namespace, "container": self.base_container_name}
        try:
            lines = self.client.read_namespaced_pod_log(**where, tail_lines=TAIL).splitlines()
        except ApiException:
            return []
        return [line for line in lines if line.strip()]


def exit_code(pod: Any, container: str) -> int | None:
    """The exit status of a pod's container; None where it never ended by itself: evicted, or its node was lost."""
    for status in (pod.status.container_statuses if pod and pod.status else None) or []:
        if status.name == container and status.state and status.state.terminated:
            code: int = status.state.terminated.exit_code
            return code
    return None
