"""What only a container engine could run is held by schemas, linters and rules: Kubernetes, the job's pods, images, Compose."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
BIN = Path(sys.executable).parent
CLIENT_SIDE = {"Kustomization"}
"""Kinds that kubectl reads and no API server ever sees; of custom resources (CRDs) there are none."""
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|KEY(?!_ID)")
"""Variables that hold a secret; a key's id is a user's name."""
OLDEST = "1.31"
"""Kubernetes before that is out of everybody's support."""

Document = dict[str, Any]


def documents() -> Iterator[tuple[str, Document]]:
    """Every document of infra/kubernetes, with a name to show."""
    for path in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}:{document['kind']}/{document.get('metadata', {}).get('name', '')}", document


def variables(path: Path) -> dict[str, str]:
    """An environment file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


DOCUMENTS = dict(documents())
KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
RESOURCES = {name: document for name, document in DOCUMENTS.items() if document["kind"] not in CLIENT_SIDE}
PODS = {
    name: document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
    for name, document in RESOURCES.items()
    if document["kind"] == "Pod" or "template" in document.get("spec", {})
}

# ------------------------------------------------------------------------------------------------------------- kubernetes


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", RESOURCES)
def test_a_document_is_what_kubernetes_published_schema_says(name: str, version: str) -> None:
    kubernetes_validate.validate(RESOURCES[name], version, strict=True)


def test_the_schema_refuses_a_field_that_is_misspelt() -> None:
    pod = json.loads(json.dumps(RESOURCES["pod-cpu.yaml:Pod/llmemb-cpu"]))
    pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_kustomize_takes_every_file_but_the_templates_of_pods() -> None:
    known = {"apiVersion", "kind", "namespace", "labels", "resources", "configMapGenerator", "images"}
    assert set(KUSTOMIZATION) <= known
    others = {path.name for path in KUBERNETES.glob("*.yaml") if not path.name.startswith("pod-")} - {"kustomization.yaml"}
    assert set(KUSTOMIZATION["resources"]) == others
    for made in KUSTOMIZATION["configMapGenerator"]:
        assert all((KUBERNETES / file).exists() for file in made["envs"])


def image(name: str) -> str:
    """An image as kustomize leaves it."""
    for known in KUSTOMIZATION["images"]:
        if name == known["name"]:
            return f"{known['newName']}:{known['newTag']}"
    return name


def check_hardened(spec: Document, *, resources: bool = True) -> None:
    """What the restricted pod standard asks, and a root that is read-only, memory that is bounded, an image that is pinned."""
    inside = spec["securityContext"]
    assert inside["runAsNonRoot"] is True and inside["runAsUser"] > 0 and inside["seccompProfile"]["type"] == "RuntimeDefault"
    assert not spec.get("hostNetwork") and not spec.get("hostPID") and not any("hostPath" in volume for volume in spec["volumes"])
    assert spec["automountServiceAccountToken"] in (True, False), "said, not left to the cluster"
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]} and not rights.get("privileged")
        assert pinned(image(container["image"])), container["image"]
        if resources:
            bounds = container["resources"]
            assert bounds["requests"].keys() >= {"cpu", "memory"}
            # no limit of CPU: it would slow a job on a node that has nothing else to do
            assert bounds["limits"]["memory"] == bounds["requests"]["memory"], "what is promised is what may be used"
        for variable in container.get("env") or []:
            assert "valueFrom" in variable or not SECRET.search(variable["name"]), variable
        assert not any("://" in part and "@" in part for part in container.get("command") or []), "an address with a password"


def pinned(name: str) -> bool:
    """Whether an image's name has a version's tag or a digest."""
    return bool(re.search(r"@sha256:[0-9a-f]{64}$|:[^:/]*\d[^:/]*$", name)) and not name.endswith(":latest")


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
        *("llmemb-lineage", "llmemb-serving"),
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


def test_airflow_s_people_come_in_by_an_auth_manager_that_is_installed() -> None:
    settings = variables(KUBERNETES / "cluster.env")
    module, _, name = settings["AIRFLOW__CORE__AUTH_MANAGER"].rpartition(".")
    assert "Simple" not in name
    code = f"import importlib; print(getattr(importlib.import_module({module!r}), {name!r}).__mro__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BaseAuthManager" in done.stdout, done.stderr[-2000:]
    assert "login" in re.search(r"scheduler=([\w,-]+)", (ROOT / "Makefile").read_text())[1].split(",")  # type: ignore[index]


LOGIN = """
import json, sys
from types import SimpleNamespace
from urllib.parse import urljoin

from flask import Flask
from airflow.providers.fab.auth_manager.security_manager.override import FabAirflowSecurityManagerOverride as Fab

asked = []


class Remote:  # what Authlib registers: an address that is none of its own lies below api_base_url
    def __init__(self, *, client_id, client_secret, server_metadata_url, client_kwargs, api_base_url=""):
        self.base = api_base_url

    def get(self, url):
        asked.append(urljoin(self.base, url))
        person = {"preferred_username": "anna", "groups": ["llmemb-operators"]}
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: person)


class People(Fab):
    def __init__(self):  # without a database
        self.oauth_remotes = {one["name"]: Remote(**one["remote_app"]) for one in self.oauth_providers}


app = Flask("airflow")
assert app.config.from_pyfile(sys.argv[1])
with app.app_context():
    people = People()
    found = {name: getattr(people, name) for name in sys.argv[2:]}
    (provider,) = people.oauth_providers
    found["token"] = people.get_oauth_token_key_name(provider["name"])
    found["person"] = people.get_oauth_user_info(provider["name"], {})
found |= {"provider": provider, "asked": asked, "roles": [one["role"] for one in Fab.ROLE_CONFIGS]}
print(json.dumps(found))
"""
"""FAB reads its file as it does in Airflow, without Authlib (it is not installed here) and without a provider."""


def test_the_login_that_the_page_shows_is_one_that_fab_takes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?AUTH_TYPE.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "webserver_config.py").write_text(block)
    names = set(re.findall(r'os\.environ\["(\w+)"\]', block))
    assert names == {"OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET", "OIDC_ISSUER"}
    values = {name: f"https://stub.example/{name}" for name in names}
    read = [
        name.lower() for name in re.findall(r"^([A-Z_]+) = ", block, re.MULTILINE)
    ]  # FAB has a property for each, so no other name
    command = [sys.executable, "-c", LOGIN, str(tmp_path / "webserver_config.py"), *read]
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), **values}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["auth_type"] == 4, "AUTH_OAUTH"
    assert found["auth_user_registration"] and found["auth_roles_sync_at_login"]
    assert found["auth_user_registration_role"] == "Viewer"
    assert found["auth_roles_mapping"] == {"llmemb-admins": ["Admin"], "llmemb-operators": ["Op"]}
    assert {"Viewer", *(role for roles in found["auth_roles_mapping"].values() for role in roles)} <= set(found["roles"])
    remote = found["provider"]["remote_app"]
    assert (found["provider"]["name"], found["token"]) == ("keycloak", "access_token")
    assert (remote["client_id"], remote["client_secret"]) == (values["OIDC_CLIENT_ID"], values["OIDC_CLIENT_SECRET"])
    assert remote["server_metadata_url"] == values["OIDC_ISSUER"] + "/.well-known/openid-configuration"
    assert "openid" in remote["client_kwargs"]["scope"].split()
    assert found["asked"] == [values["OIDC_ISSUER"] + "/protocol/openid-connect/userinfo"]
    assert (found["person"]["username"], found["person"]["role_keys"]) == ("anna", ["llmemb-operators"])
    lacks = not re.search(r"^authlib==", (INFRA / "requirements" / "scheduler.txt").read_text(), re.MULTILINE)
    assert lacks == ("needs Authlib in the image" in page)


def test_no_secret_stands_in_the_login_that_the_page_shows() -> None:
    (block,) = re.findall(
        r"^```python\n(.*?AUTH_TYPE.*?)^```$", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL | re.MULTILINE
    )
    pairs: list[tuple[str, ast.expr]] = []
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Dict):
            pairs += [(ast.literal_eval(key), value) for key, value in zip(node.keys, node.values, strict=True) if key]
        elif isinstance(node, ast.Assign):
            pairs += [(ast.unparse(target), node.value) for target in node.targets]
    secret = {name: ast.unparse(value) for name, value in pairs if SECRET.search(name.upper()) and name != "token_key"}
    assert secret.keys() == {"client_secret"}
    assert all(re.fullmatch(r"os\.environ\['\w+'\]", value) for value in secret.values()), secret
    assert "://" not in block, "no provider's address"


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


# ------------------------------------------------------------------------------------------------------------ pods of jobs


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
        assert secrets == SECRETS_OF[job_of(pod)]
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


# ----------------------------------------------------------------------------------------------------------------- images

DOCKERFILE = (INFRA / "Dockerfile").read_text()


def stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, rest) of each stage of the Dockerfile, continued lines joined; what precedes the first is stage ''."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if line.strip() and not line.startswith("#"))
    stage = ""
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            found[stage] = []
        found[stage].append((word, rest))
    return found


STAGES = stages()


def last(stage: str, word: str) -> str | None:
    """The instruction of that name which holds at a stage's end: its own last one, or that of the stage it is built on."""
    if stage not in STAGES:
        return None
    own = [rest for name, rest in STAGES[stage] if name == word]
    return own[-1] if own else last(STAGES[stage][0][1].split(" AS ")[0], word)


def test_hadolint_finds_nothing_and_little_is_excused() -> None:
    command = [str(BIN / "hadolint"), "--no-color", "--failure-threshold", "style", "--format", "json", str(INFRA / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout) == [], done.stdout + done.stderr
    # versions of Debian's packages go with the base image, which is pinned
    assert set(re.findall(r"hadolint ignore=(\S+)", DOCKERFILE)) == {"DL3008"}


@pytest.mark.parametrize("target", ["scheduler", "spark", "gpu", "serving", "laptop"])
def test_an_image_runs_as_nobody_in_particular(target: str) -> None:
    assert last(target, "USER") == "10001:10001"
    assert last(target, "HEALTHCHECK")
    # what comes after the last USER of a stage would be made by root and read by nobody
    assert STAGES[target][-1][0] == "CMD"


def test_base_images_are_pinned_and_stages_are_named() -> None:
    defaults = dict(rest.split("=", 1) for word, rest in STAGES[""] if word == "ARG")
    for name in filter(None, STAGES):
        base = STAGES[name][0][1].split(" AS ")[0]
        base = re.sub(r"\$\{(\w+)\}", lambda variable: defaults[variable[1]], base)
        assert base in STAGES or pinned(base), base


def test_an_image_holds_one_environment_and_pulls_nothing_to_be_read() -> None:
    assert not DOCKERFILE.startswith("# syntax"), "it would be pulled before anything is built"
    for target in ("scheduler", "spark", "gpu", "serving", "laptop"):
        stage, copied = target, 0
        while stage in STAGES:
            copied += sum(word == "COPY" and rest.split()[-1] == "/opt/venv" for word, rest in STAGES[stage])
            stage = STAGES[stage][0][1].split(" AS ")[0]
        assert copied == 1, target


def test_no_secret_goes_into_an_image() -> None:
    for instructions in STAGES.values():
        for word, rest in instructions:
            if word in ("ARG", "ENV"):
                assert not any(SECRET.search(name) for name in re.findall(r"(\w+)=", rest + "=")), rest
            assert not (word == "ADD" or re.search(r"COPY .*\.env\b", f"{word} {rest}")), "nothing comes from afar, nor settings"


def test_what_the_images_install_and_copy_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r'"\.\[([a-z,]+)\]"', DOCKERFILE):
        assert set(named.split(",")) <= extras.keys(), named
    let_in = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    for instructions in STAGES.values():
        for word, rest in instructions:
            if word == "COPY" and "--from" not in rest:
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists() and source.split("/")[0] in let_in, source


# ---------------------------------------------------------------------------------------------------------------- compose

COMPOSE = (INFRA / "compose.yaml").read_text()
SERVICES: dict[str, Document] = yaml.safe_load(COMPOSE)["services"]
ONCE = {"airflow-init", "object-storage-init"}
"""Services that do one thing and end."""


def test_compose_is_what_the_compose_specification_says() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(INFRA / "compose.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_has_every_part_that_a_cluster_has() -> None:
    airflow = {f"airflow-{part}" for part in ("init", "api-server", "scheduler", "dag-processor", "triggerer")}
    assert (
        airflow | {"serving", "mlflow", "redis", "postgres", "object-storage", "spark-master", "spark-worker"} <= SERVICES.keys()
    )


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_and_has_no_right_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert pinned(service["image"]), service["image"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and not service.get("privileged")
    # a fresh volume is root's: one service gives it away, without a network, and ends
    assert re.match(r"[1-9]\d*:[1-9]\d*$", service.get("user", "")) or name == "object-storage-init"
    assert set(service.get("cap_add", [])) <= ({"CHOWN", "DAC_OVERRIDE"} if name == "object-storage-init" else set())
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "nobody outside this machine"


@pytest.mark.parametrize("name", sorted(SERVICES.keys() - ONCE))
def test_a_service_that_stays_is_asked_for_its_health(name: str) -> None:
    service = SERVICES[name]
    of_image = last(service["build"]["target"], "HEALTHCHECK") if "build" in service else None
    assert service.get("healthcheck", {}).get("test") or of_image
    assert service["restart"] == "unless-stopped" and service["deploy"]["resources"]["limits"]["memory"]


def test_airflow_s_parts_are_asked_for_their_health_without_starting_airflow() -> None:
    """`airflow jobs check` takes seconds of a core each time, and on a busy machine more than its time limit."""
    for name in ("scheduler", "dag-processor", "triggerer"):
        test = SERVICES[f"airflow-{name}"]["healthcheck"]["test"]
        assert test[4:] == [name.replace("-", "_")]
        states = {part: {"status": "healthy"} for part in ("scheduler", "dag_processor", "triggerer")}
        assert asked(test, states) == 0
        assert asked(test, states | {test[-1]: {"status": "unhealthy"}}) == 1
        assert asked(test, states | {"metadatabase": {"status": "unhealthy"}}) == 0


def asked(test: list[str], states: dict[str, Any]) -> int:
    """The exit status of a health check of Compose where the API server says so."""
    server = f"import io, urllib.request as u; u.urlopen = lambda *a, **k: io.StringIO({json.dumps(states)!r}); "
    assert test[:3] == ["CMD", "python", "-c"] and "http://airflow-api-server:8080/api/v2/monitor/health" in test[3]
    return subprocess.run([sys.executable, "-c", server + test[3], *test[4:]], check=False).returncode


def test_postgresql_is_not_healthy_while_its_first_start_makes_the_databases() -> None:
    """Until then it listens at its socket alone, and starts once more."""
    assert SERVICES["postgres"]["healthcheck"]["test"][:3] == ["CMD", "pg_isready", "-h"]


def test_serving_lives_before_there_is_anything_to_serve() -> None:
    """Before the first night no start helps; who sends requests asks whether it is ready."""
    probes = PODS["serving.yaml:Deployment/serving"]["containers"][0]
    assert "/healthz" in str(last("serving", "HEALTHCHECK"))
    paths = {name: probes[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}


def test_compose_tells_an_image_its_revision_and_takes_settings_of_one_s_own() -> None:
    for name, service in SERVICES.items():
        assert "build" not in service or service["build"]["args"] == {"REVISION": "${REVISION:-unknown}"}, name
    words = ["make", "-n", "up", "RECIPE=shop/mine.toml", "OVERRIDE=shop/more.yaml"]
    line = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "docker compose -f infra/compose.yaml -f shop/more.yaml" in line and 'REVISION="$(git describe' in line


def test_a_service_waits_for_what_it_needs() -> None:
    for service in SERVICES.values():
        for needed, how in service.get("depends_on", {}).items():
            assert how["condition"] == ("service_completed_successfully" if needed in ONCE else "service_healthy")


def test_compose_takes_every_secret_from_outside_and_names_them_all() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable):
                assert re.match(r"\$\{[A-Z0-9_]+(:\?[^}]*)?\}$", value), f"{name}: {variable}"
    assert not re.search(r"://\w+:[^$@/\s]+@", COMPOSE), "an address with a password"
    named = re.search(r"with\n#\s+([A-Z0-9_ ]+)\n", COMPOSE)
    assert named
    wanted = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)(?!\w*:-)", COMPOSE))
    assert set(named[1].split()) == wanted
    assert all(f"${{{name}:?" in COMPOSE for name in wanted), "a secret that is missing is told, not taken for empty"


def test_spark_in_compose_is_local_or_the_cluster_beside_it() -> None:
    folder = SERVICES["airflow-scheduler"]["environment"]["SPARK_CONF_DIR"]
    assert folder.replace("${SPARK:-local}", "standalone") == SERVICES["spark-worker"]["environment"]["SPARK_CONF_DIR"]
    settings = (INFRA / "spark" / "standalone" / "spark-defaults.conf").read_text()
    assert re.search(r"^spark\.master\s+spark://spark-master:7077$", settings, re.M)
    assert re.search(r"^spark\.master\.rest\.enabled\s+false$", settings, re.M), "its other door asks nobody for a secret"
    assert "7077" in SERVICES["spark-master"]["command"] and "spark://spark-master:7077" in SERVICES["spark-worker"]["command"]


SPARK_RUNS = ("airflow-scheduler", "spark-master", "spark-worker")


@pytest.mark.parametrize("name", SPARK_RUNS)
def test_spark_may_load_its_codecs_and_has_a_secret_that_is_no_argument(name: str) -> None:
    service = SERVICES[name]
    assert "/tmp:exec" in service["tmpfs"], "Docker's tmpfs is noexec: zstd and snappy would not load"
    assert service["command"][:2] == ["sh", "/opt/llmemb/infra/spark/secret.sh"]
    assert service["environment"]["SPARK_SECRET"].startswith("${SPARK_SECRET")


def test_spark_s_health_is_asked_at_its_own_ports() -> None:
    for name, port in (("spark-master", 7077), ("spark-worker", 8081)):
        assert f", {port})" in SERVICES[name]["healthcheck"]["test"][-1], name
    assert SERVICES["spark-worker"]["command"][-3:-1] == ["--webui-port", "8081"]


@pytest.mark.parametrize("crypto", [True, False])
def test_spark_s_secret_is_written_where_its_owner_alone_reads(crypto: bool, tmp_path: Path) -> None:
    settings = tmp_path / "conf"
    settings.mkdir()
    shipped = (INFRA / "spark" / "standalone" / "spark-defaults.conf").read_text()
    (settings / "spark-defaults.conf").write_text(shipped if crypto else "spark.ui.enabled false\n")
    command = ["sh", str(INFRA / "spark" / "secret.sh"), "sh", "-c", 'echo "$SPARK_CONF_DIR ${SPARK_SECRET:-gone}"']
    given = os.environ | {"SPARK_CONF_DIR": str(settings), "TMPDIR": str(tmp_path), "SPARK_SECRET": "a long text"}
    for _ in range(2):  # a container that starts again
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    folder, left = done.stdout.split()
    assert left == "gone" and folder == str(tmp_path / "spark-conf" if crypto else settings)
    if crypto:
        file = Path(folder) / "spark-defaults.conf"
        assert file.stat().st_mode & 0o077 == 0 and file.read_text().count("spark.authenticate.secret a long text") == 1
        del given["SPARK_SECRET"]
        refused = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
        assert refused.returncode and "SPARK_SECRET: set it" in refused.stderr


def test_mlflow_s_server_runs_no_jobs_that_its_memory_has_no_room_for() -> None:
    assert SERVICES["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert variables(KUBERNETES / "mlflow.env")["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_mlflow_s_page_knows_the_name_under_which_its_port_is_published() -> None:
    command = SERVICES["mlflow"]["command"]
    assert {"mlflow:5000", "localhost:5000"} <= set(command[command.index("--allowed-hosts") + 1].split(","))
    assert SERVICES["mlflow"]["ports"] == ["127.0.0.1:5000:5000"]


def test_a_recipe_of_one_s_own_runs_in_compose() -> None:
    assert SERVICES["airflow-scheduler"]["environment"]["LLMEMB_RECIPE"] == "/recipes/${RECIPE:-prod.toml}"
    for name in SPARK_RUNS:  # tables beside the recipe are read where Spark's tasks run
        assert "${RECIPES:-../jobs/recipes}:/recipes:ro" in SERVICES[name]["volumes"], name
    made = {}
    for target in ("up", "night"):
        words = ["make", "-n", target, "RECIPE=shop/mine.toml", "DS=2026-01-31", "IN=compose", "SPARK=standalone"]
        made[target] = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f'RECIPES="{ROOT}/shop" RECIPE="mine.toml" SPARK="standalone" docker compose' in made[target]
    assert "infra/first_secrets.py infra/.env" in made["up"] and "--profile spark up" in made["up"]
    assert 'python -m jobs night --recipe "/recipes/mine.toml" --ds "2026-01-31"' in made["night"]


def test_the_first_secrets_are_all_that_compose_asks_for_and_stay(tmp_path: Path) -> None:
    target = tmp_path / ".env"
    target.write_text("S3_PASSWORD=mine")
    for _ in range(2):
        subprocess.run([sys.executable, str(INFRA / "first_secrets.py"), str(target)], check=True, capture_output=True)
    found = variables(target)
    assert found.keys() == set(re.findall(r"\$\{([A-Z0-9_]+):\?", COMPOSE)) and found["S3_PASSWORD"] == "mine"
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for name, value in found.items() if name not in ("S3_PASSWORD", "FERNET_KEY"))
    from cryptography.fernet import Fernet

    Fernet(found["FERNET_KEY"])


def test_every_volume_of_compose_is_declared() -> None:
    declared = set(yaml.safe_load(COMPOSE)["volumes"])
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert {name for name in used if "/" not in name and not name.startswith("$")} == declared
