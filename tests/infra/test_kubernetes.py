"""What only a cluster could run is held by schemas and rules: the files of infra/kubernetes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import kubernetes_validate
import pytest

from tests.infra.documents import (
    INFRA,
    KUBERNETES,
    KUSTOMIZATION,
    OLDEST,
    PODS,
    RESOURCES,
    ROOT,
    SECRET,
    SERVICES,
    check_hardened,
    variables,
)


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", RESOURCES)
def test_a_document_is_what_kubernetes_published_schema_says(name: str, version: str) -> None:
    kubernetes_validate.validate(RESOURCES[name], version, strict=True)


def test_the_schema_refuses_a_field_that_is_misspelt() -> None:
    pod = json.loads(json.dumps(RESOURCES["pod-cpu.yaml:Pod/llmemb-cpu"]))
    pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


LABELS = {
    name: (document if document["kind"] == "Pod" else document["spec"]["template"])["metadata"]["labels"]
    for name, document in RESOURCES.items()
    if name in PODS
}


def found(selector: dict[str, str]) -> list[str]:
    """Names of the pods that bear these labels."""
    return [name for name, labels in LABELS.items() if selector.items() <= labels.items()]


def ports(names: list[str]) -> set[str | int]:
    """Numbers and names of the ports on which these pods listen."""
    every = [port for name in names for container in PODS[name]["containers"] for port in container.get("ports", [])]
    return {port[key] for port in every for key in ("name", "containerPort")}


def test_whatever_selects_pods_finds_some_and_a_port_on_which_they_listen() -> None:
    """No schema tells: a label that is misspelt selects nothing, and a policy then shuts everybody out."""
    for name, document in RESOURCES.items():
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= ports(found(spec["selector"])), name
        elif document["kind"] in ("Deployment", "PodDisruptionBudget"):
            assert found(spec["selector"]["matchLabels"]), name
        elif document["kind"] == "HorizontalPodAutoscaler":
            target = spec["scaleTargetRef"]
            assert any(key.endswith(f":{target['kind']}/{target['name']}") for key in RESOURCES), name
        elif document["kind"] == "NetworkPolicy":
            for rule in spec.get("ingress", []):
                let_in = [source["podSelector"]["matchLabels"] for source in rule["from"] if "podSelector" in source]
                assert all(map(found, let_in)), name
                listens = ports(found(spec["podSelector"]["matchLabels"]))
                assert {port["port"] for port in rule.get("ports", [])} <= listens, name


def test_kustomize_takes_every_file_but_the_templates_of_pods() -> None:
    known = {"apiVersion", "kind", "namespace", "labels", "resources", "configMapGenerator", "images"}
    assert set(KUSTOMIZATION) <= known
    others = {path.name for path in KUBERNETES.glob("*.yaml") if not path.name.startswith("pod-")} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == others
    for made in KUSTOMIZATION["configMapGenerator"]:
        assert all((KUBERNETES / file).exists() for file in made["envs"])


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_no_right_that_it_does_not_need(name: str) -> None:
    # memory and cores of executors are Spark's to set, from spark-defaults.conf
    check_hardened(PODS[name], resources="spark-executor" not in name)


def test_rules_cover_every_pod_that_runs_on_the_cluster() -> None:
    assert {name.split(":")[0] for name in PODS} == {
        *("airflow.yaml", "mlflow.yaml", "serving.yaml"),
        *("pod-cpu.yaml", "pod-gpu.yaml", "pod-store.yaml", "pod-spark.yaml", "pod-spark-executor.yaml"),
    }


@pytest.mark.parametrize("name", [name for name in PODS if RESOURCES[name]["kind"] == "Deployment"])
def test_what_runs_for_long_is_asked_whether_it_lives(name: str) -> None:
    selectors = [document["spec"]["selector"] for document in RESOURCES.values() if document["kind"] == "Service"]
    labels = RESOURCES[name]["spec"]["template"]["metadata"]["labels"]
    called = any(selector.items() <= labels.items() for selector in selectors)
    for container in PODS[name]["containers"]:
        assert "livenessProbe" in container
        # being ready means to be sent requests: only behind a Service
        assert called == ("readinessProbe" in container)


def test_the_parts_that_people_and_jobs_call_stand_behind_a_service() -> None:
    assert {name for name in RESOURCES if ":Service/" in name} == {
        "airflow.yaml:Service/airflow-api-server",
        "mlflow.yaml:Service/mlflow",
        "serving.yaml:Service/serving",
    }


def test_every_name_that_a_pod_uses_is_made_here_or_asked_of_the_platform() -> None:
    made = {(document["kind"], document["metadata"]["name"]) for document in RESOURCES.values()}
    made |= {("ConfigMap", generated["name"]) for generated in KUSTOMIZATION["configMapGenerator"]}
    asked = set(re.findall(r"^#   (llmemb-\w+)  ", (KUBERNETES / "kustomization.yaml").read_text(), re.M))
    assert asked == {
        *("llmemb-airflow", "llmemb-login", "llmemb-mlflow", "llmemb-registry", "llmemb-stores", "llmemb-sources"),
        *("llmemb-lineage", "llmemb-serving", "llmemb-lake", "llmemb-logs"),
    }
    made |= {("Secret", name) for name in asked}
    for spec in PODS.values():
        used = {("ServiceAccount", spec["serviceAccountName"])}
        for volume in spec["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                used.add(("PersistentVolumeClaim", claim["claimName"]))
            if secret := volume.get("secret"):
                used.add(("Secret", secret["secretName"]))
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            for source in container.get("envFrom", []):
                used |= {(kind[0].upper() + kind[1:-3], reference["name"]) for kind, reference in source.items()}
        assert used <= made, used - made


def test_the_lake_is_a_bucket_that_no_pod_mounts() -> None:
    lake = variables(KUBERNETES / "jobs.env")["LLMEMB_LAKE"]
    assert lake.startswith("s3://") and "LLMEMB_OFFLINE" not in variables(KUBERNETES / "jobs.env")
    for name, spec in PODS.items():
        for container in spec["containers"]:
            assert not any("lake" in mount["name"] or mount["mountPath"] == "/lake" for mount in container["volumeMounts"]), name
            let_in = {source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source}
            assert ("llmemb-lake" in let_in) == name.startswith("pod-"), name
    assert not any("lake" in name for name in RESOURCES if ":PersistentVolumeClaim/" in name)
    (serving,) = PODS["serving.yaml:Deployment/serving"]["containers"]
    assert {"name": "LLMEMB_SERVING_ARTIFACTS", "value": lake} in serving["env"]
    scratch, (cpu,) = variables(KUBERNETES / "jobs.env")["LLMEMB_SCRATCH"], PODS["pod-cpu.yaml:Pod/llmemb-cpu"]["containers"]
    assert any(scratch.startswith(f"{mount['mountPath']}/") for mount in cpu["volumeMounts"] if mount["name"] == "tmp")


def test_no_volume_is_asked_for_that_many_pods_mount() -> None:
    assert not [name for name in RESOURCES if ":PersistentVolumeClaim/" in name]
    for name, spec in PODS.items():
        assert all(volume.keys() & {"emptyDir", "secret", "configMap"} for volume in spec["volumes"]), name
    base = variables(KUBERNETES / "jobs.env")["LLMEMB_BASE"]
    for name in ("pod-gpu.yaml:Pod/llmemb-gpu", "pod-cpu.yaml:Pod/llmemb-cpu"):
        assert not [mount for mount in PODS[name]["containers"][0]["volumeMounts"] if f"{base}/".startswith(mount["mountPath"])]


def test_logs_of_tasks_lie_in_a_bucket_and_those_of_what_runs_are_asked_for_by_address() -> None:
    given = variables(KUBERNETES / "cluster.env")
    assert given["AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS"] == "bucket_logs.LOGGING" and given["LLMEMB_LOGS"].startswith("s3://")
    assert given["AIRFLOW__CORE__PLUGINS_FOLDER"] == "/opt/llmemb/infra/airflow_plugins"
    assert given["AIRFLOW__CORE__HOSTNAME_CALLABLE"] == "airflow.utils.net.get_host_ip_address", "a pod's name is known to nobody"
    assert "AIRFLOW__API__SECRET_KEY" in (KUBERNETES / "kustomization.yaml").read_text(), (
        "who asks for a log shows that it knows it"
    )
    (policy,) = RESOURCES["network.yaml:NetworkPolicy/airflow-logs"]["spec"]["ingress"]
    open_ = {port["port"] for port in policy["ports"]}
    for part, port in (("scheduler", 8793), ("triggerer", 8794), ("api-server", None)):
        (container,) = PODS[f"airflow.yaml:Deployment/airflow-{part}"]["containers"]
        assert {"secretRef": {"name": "llmemb-logs", "optional": True}} in container["envFrom"], part
        assert port is None or (port in open_ and {"name": "logs", "containerPort": port} in container["ports"])


def test_a_lost_node_takes_one_scheduler_of_two() -> None:
    spec = RESOURCES["airflow.yaml:Deployment/airflow-scheduler"]["spec"]
    (spread,) = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spec["replicas"] == 2 and spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"] == spec["selector"]["matchLabels"]


def test_spark_s_driver_may_delete_no_volume() -> None:
    role = RESOURCES["accounts.yaml:Role/llmemb-spark"]
    assert {resource for rule in role["rules"] for resource in rule["resources"]} == {"pods", "services", "configmaps"}
    settings = (INFRA / "spark" / "kubernetes" / "spark-defaults.conf").read_text()
    for name in ("own", "reuse"):  # else Spark looks for volumes of its own when it ends
        assert re.search(rf"^spark\.kubernetes\.driver\.{name}PersistentVolumeClaim +false$", settings, re.MULTILINE)


def test_pods_of_two_runs_never_have_the_same_name() -> None:
    settings = (INFRA / "spark" / "kubernetes" / "spark-defaults.conf").read_text()
    assert not re.search(r"^spark\.kubernetes\.executor\.podNamePrefix", settings, re.MULTILINE)


def test_a_second_apply_changes_nothing_that_kubernetes_keeps_as_it_is() -> None:
    """A Job's template can't be changed, so an upgrade's `kubectl apply` would fail: the database is migrated at each start."""
    assert not [
        name for name, document in RESOURCES.items() if document["kind"] in ("Job", "Pod") and not name.startswith("pod-")
    ]
    for name in ("api-server", "dag-processor", "triggerer"):
        (wait,) = PODS[f"airflow.yaml:Deployment/airflow-{name}"]["initContainers"]
        assert wait["args"][:2] == ["db", "check-migrations"]
    assert RESOURCES["airflow.yaml:Deployment/airflow-scheduler"]["spec"]["strategy"] == {"type": "Recreate"}


def test_a_fault_can_t_take_the_whole_cluster() -> None:
    hard = RESOURCES["namespace.yaml:ResourceQuota/llmemb"]["spec"]["hard"]
    assert hard.keys() >= {"pods", "requests.cpu", "requests.memory", "limits.memory", "requests.nvidia.com/gpu"}
    assert int(hard["requests.nvidia.com/gpu"]) == int(variables(KUBERNETES / "cluster.env")["LLMEMB_SHARDS"])
    assert hard["services.loadbalancers"] == hard["services.nodeports"] == "0"
    claims = [name for name in RESOURCES if ":PersistentVolumeClaim/" in name]
    assert len(claims) <= int(hard["persistentvolumeclaims"])
    executors = int(re.search(r"maxExecutors\s+(\d+)", (INFRA / "spark/kubernetes/spark-defaults.conf").read_text())[1])  # type: ignore[index]
    assert int(hard["pods"]) > executors + int(hard["requests.nvidia.com/gpu"])


def test_mlflow_asks_everybody_for_an_account_and_knows_all_its_names() -> None:
    settings = variables(KUBERNETES / "mlflow.env")
    command = PODS["mlflow.yaml:Deployment/mlflow"]["containers"][0]["command"]
    for words in (command, SERVICES["mlflow"]["command"]):
        assert words[words.index("--app-name") + 1] == "basic-auth"
        assert not [word for word in words if "://" in word and "@" in word]
    hosts = settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    service = "mlflow.llmemb.svc.cluster.local"
    names = [service.rsplit(".", cut)[0] if cut else service for cut in range(5)]
    assert set(hosts) >= {name + port for name in names if not name.endswith(".cluster") for port in ("", ":5000")}
    probes = PODS["mlflow.yaml:Deployment/mlflow"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert probes[probe]["httpGet"]["httpHeaders"][0]["value"] in hosts
    assert variables(KUBERNETES / "jobs.env")["MLFLOW_TRACKING_URI"].removeprefix("http://") in hosts
    assert any("example" in host for host in hosts), "the ingress's name is the platform's to put"
    ini = (INFRA / "mlflow-auth.ini").read_text()
    assert "default_permission = READ" in ini and "password" not in re.sub(r"^#.*$", "", ini, flags=re.MULTILINE).lower()


def test_no_password_is_in_an_argument_list() -> None:
    """Whoever is on the machine reads them."""
    for name, service in SERVICES.items():
        words = service.get("command", [])
        text = words if isinstance(words, str) else " ".join(words)
        assert not re.search(r"\$\$?\{?\w*(PASSWORD|SECRET|TOKEN)", text), name
    for script in INFRA.glob("*.sh"):
        for line in script.read_text().splitlines():
            outer = re.sub(r"^\s*\w+=\S+ ", "", line)  # an assignment before a command is its environment
            if re.match(r"\s*(psql|redis-cli|exec|airflow|mlflow)\b", outer):
                assert not re.search(r'PASSWORD|"\$2"', outer), line


def test_as_many_gpu_tasks_run_at_once_as_there_are_shards() -> None:
    command = PODS["airflow.yaml:Deployment/airflow-scheduler"]["initContainers"][0]["command"][-1]
    assert '--include-deferred gpu "$LLMEMB_SHARDS"' in command
    assert command.index("pools import") < command.index("pools set"), "the file has a laptop's one slot"


@pytest.mark.parametrize("path", sorted([*KUBERNETES.glob("*.env"), INFRA / "laptop.env"]), ids=lambda path: path.name)
def test_an_environment_file_holds_no_secret(path: Path) -> None:
    for name, value in variables(path).items():
        assert not SECRET.search(name), name
        assert not re.search(r"://[^/]*:[^/]*@|password=", value), name


def test_the_production_recipe_finds_its_variables_on_a_cluster_and_in_compose() -> None:
    recipe = "\n".join(line.split("#")[0] for line in (ROOT / "jobs" / "recipes" / "prod.toml").read_text().splitlines())
    wanted = set(re.findall(r"\$\{?([A-Z_]+)", recipe))
    assert wanted <= variables(KUBERNETES / "jobs.env").keys()
    assert wanted <= SERVICES["airflow-scheduler"]["environment"].keys() | variables(INFRA / "laptop.env").keys()


def test_the_page_on_clusters_names_every_file_of_infra() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    for path in INFRA.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.name in page, path.relative_to(ROOT)
