"""Each job's pod, as the operator builds it from the DAGs and the cluster's settings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from tests.infra.documents import INFRA, KUBERNETES, Document, check_hardened, variables


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All DAGs parsed with the cluster's settings, each job's pod built by the operator.

    The platform's folder holds the shipped templates, and one for `scft` alone that trains on four GPUs of a node.
    """
    folder = tmp_path_factory.mktemp("rendered")
    for path in KUBERNETES.glob("pod-*.yaml"):
        shutil.copy(path, folder)
    many = (KUBERNETES / "pod-gpu.yaml").read_text()
    many = many.replace("[python, -m, jobs]", "[python, -m, jobs.torchrun, --standalone, --nproc-per-node=gpu, -m, jobs]")
    (folder / "pod-scft.yaml").write_text(many.replace('nvidia.com/gpu: "1"', 'nvidia.com/gpu: "4"'))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LLMEMB_", "AIRFLOW_", "PYTEST_"))}
    environment = clean | variables(KUBERNETES / "cluster.env") | {"LLMEMB_PODS": str(folder), "AIRFLOW_HOME": str(folder)}
    environment |= {"AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(folder / "logs")}
    environment["AIRFLOW__CORE__PLUGINS_FOLDER"] = str(INFRA / "airflow_plugins")
    command = [sys.executable, str(Path(__file__).parent / "render_pods.py")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def job_of(pod: Document) -> str:
    """The job that a pod runs."""
    return str(pod["spec"]["containers"][0]["args"][0])


def test_every_job_of_every_dag_becomes_a_pod_by_one_setting(rendered: dict[str, Any]) -> None:
    jobs = {job_of(pod) for pod in rendered["pods"].values()}
    assert jobs >= {
        "extract",
        "scft",
        "embed",
        "pretrain",
        "rat",
        "evaluate",
        "promote",
        "project",
        "publish",
        "lookup",
        "report",
    }
    assert jobs >= {"collect", "rollback", "forget"}
    shards = [name for name in rendered["pods"] if name.startswith("nightly_embeddings.embed#")]
    assert len(shards) == int(variables(KUBERNETES / "cluster.env")["LLMEMB_SHARDS"])
    assert all(rendered["deferred"].values()), "waiting for a pod costs no process"


def test_a_job_s_pod_is_what_kubernetes_takes_and_no_less_hardened_than_its_template(rendered: dict[str, Any]) -> None:
    for name, pod in rendered["pods"].items():
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        check_hardened(pod["spec"])
        assert len(pod["spec"]["containers"]) == 1, f"{name}: no sidecar, so no right to run commands in pods"
        assert pod["spec"]["restartPolicy"] == "Never" and pod["metadata"]["namespace"] == "llmemb"


def test_a_job_s_pod_runs_the_command_line_of_every_other_place(rendered: dict[str, Any]) -> None:
    for pod in rendered["pods"].values():
        container = pod["spec"]["containers"][0]
        assert container["command"][-2:] == ["-m", "jobs"]
        assert container["args"][1:4:2] == ["--recipe", "--ds"] and container["args"][2] == "/opt/llmemb/jobs/recipes/prod.toml"


def test_gpus_go_to_the_jobs_that_train_and_embed_and_to_no_other(rendered: dict[str, Any]) -> None:
    for pod in rendered["pods"].values():
        limits = pod["spec"]["containers"][0]["resources"]["limits"]
        tolerated = [toleration["key"] for toleration in pod["spec"].get("tolerations") or []]
        if job_of(pod) in rendered["gpu_jobs"]:
            assert limits["nvidia.com/gpu"] == ("4" if job_of(pod) == "scft" else "1") and tolerated == ["nvidia.com/gpu"]
        else:
            assert "nvidia.com/gpu" not in limits and not tolerated


def test_a_job_with_a_template_of_its_own_trains_on_several_gpus(rendered: dict[str, Any]) -> None:
    commands = {job_of(pod): pod["spec"]["containers"][0]["command"] for pod in rendered["pods"].values()}
    assert commands.pop("scft")[:3] == ["python", "-m", "jobs.torchrun"]
    assert {tuple(command) for command in commands.values()} == {("python", "-m", "jobs")}


REGISTRY, STORES = {"llmemb-registry"}, {"llmemb-registry", "llmemb-stores"}
SECRETS_OF = {
    "extract": {"llmemb-sources"},
    **dict.fromkeys(("scft", "embed", "pretrain", "rat", "evaluate"), REGISTRY),
    **dict.fromkeys(("promote", "project", "report"), REGISTRY | {"llmemb-lineage"}),
    **dict.fromkeys(("pin", "publish", "lookup", "collect", "rollback", "forget"), STORES),
}


def test_secrets_come_from_the_platform_and_images_from_settings(rendered: dict[str, Any]) -> None:
    settings = variables(KUBERNETES / "cluster.env")
    for pod in rendered["pods"].values():
        container = pod["spec"]["containers"][0]
        secrets = {one["secretRef"]["name"] for one in container["envFrom"] if "secretRef" in one}
        assert secrets == SECRETS_OF[job_of(pod)] | {"llmemb-lake"}
        kind = "SPARK" if job_of(pod) == "extract" else "GPU" if job_of(pod) in rendered["gpu_jobs"] else "CPU"
        assert container["image"] == settings[f"LLMEMB_IMAGE_{kind}"]
    spark = next(pod for pod in rendered["pods"].values() if job_of(pod) == "extract")["spec"]
    told = {variable["name"]: variable.get("value") for variable in spark["containers"][0]["env"]}
    assert told["LLMEMB_IMAGE_SPARK"] == settings["LLMEMB_IMAGE_SPARK"], "the driver starts executors of the same image"
    assert told["SPARK_CONF_DIR"].endswith("infra/spark/kubernetes") and spark["serviceAccountName"] == "llmemb-spark"


def test_a_retried_task_finds_its_pod_again(rendered: dict[str, Any]) -> None:
    first, while_it_runs, after_its_end, another_run = rendered["tries"]
    assert while_it_runs == first
    assert len({first, after_its_end, another_run}) == 3
