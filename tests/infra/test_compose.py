"""What only a container engine could run is held by a schema and rules: Compose."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.documents import COMPOSE, INFRA, KUBERNETES, ONCE, PODS, ROOT, SECRET, SERVICES, last, pinned, variables


def test_compose_is_what_the_compose_specification_says() -> None:
    files = [str(INFRA / name) for name in ("compose.yaml", "several.yaml")]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
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
    for name in ("dag-processor", "triggerer"):
        test = SERVICES[f"airflow-{name}"]["healthcheck"]["test"]
        assert test[4:] == [name.replace("-", "_")]
        states = {part: {"status": "healthy"} for part in ("scheduler", "dag_processor", "triggerer")}
        assert asked(test, states) == 0
        assert asked(test, states | {test[-1]: {"status": "unhealthy"}}) == 1
        assert asked(test, states | {"metadatabase": {"status": "unhealthy"}}) == 0


def test_each_scheduler_answers_for_itself() -> None:
    """The API server would say of a dead one that it lives, as long as another does."""
    given = variables(INFRA / "laptop.env")
    assert given["AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK"] == "True"
    assert given["AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_SERVER_HOST"] == "127.0.0.1"
    assert "http://127.0.0.1:8974/health" in SERVICES["airflow-scheduler"]["healthcheck"]["test"][-1]


def test_more_schedulers_than_one_run_on_a_machine() -> None:
    """`--scale` makes containers of one service: a name, or a port of the machine, could be one's alone."""
    assert not SERVICES["airflow-scheduler"].keys() & {"container_name", "ports", "hostname"}
    line = subprocess.run(["make", "-n", "up", "SCHEDULERS=2"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "up --build --detach --scale airflow-scheduler=2" in " ".join(line.split())


SEVERAL = yaml.safe_load((INFRA / "several.yaml").read_text())["services"]
CALLED = {"postgres": "5432", "redis": "6379", "object-storage": "9000", "mlflow": "5000", "airflow-api-server": "8080"}


def test_machines_share_services_and_no_folder() -> None:
    scheduler = SERVICES["airflow-scheduler"]["environment"] | SEVERAL["airflow-scheduler"]["environment"]
    assert scheduler["LLMEMB_LAKE"] == SEVERAL["serving"]["environment"]["LLMEMB_SERVING_ARTIFACTS"] == "s3://lake/llmemb"
    assert "LLMEMB_OFFLINE" not in scheduler, "Feast's offline tables lie below the lake"
    assert "/data/lake" in SERVICES["object-storage-init"]["command"][-1], "a bucket is a folder of the store's"
    # whatever a scheduler calls by name is the first machine's, at a port that this publishes there alone
    named = set(re.findall(r"(?:://|@|\"|')([a-z][a-z-]+)(?::\d+|/)", " ".join(map(str, scheduler.values()))))
    assert (
        {name for name in named if name in SERVICES}
        <= CALLED.keys()
        == {name.split(":")[0] for name in SEVERAL["airflow-scheduler"]["extra_hosts"]}
    )
    for name, port in CALLED.items():
        assert re.fullmatch(rf"\$\{{MAIN(:\?[^}}]+)?\}}:{port}:{port}", *SEVERAL[name]["ports"]), name
    # every part that writes logs of tasks, or shows them
    for name in ("airflow-scheduler", "airflow-triggerer", "airflow-api-server"):
        assert SEVERAL[name]["environment"]["LLMEMB_LOGS"] == "s3://lake/logs"
        assert SEVERAL[name]["environment"]["AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS"] == "bucket_logs.LOGGING"
    words = ["make", "-n", "up", "OVERRIDE=infra/several.yaml", "ONLY=airflow-scheduler"]
    line = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-f infra/several.yaml up --build --detach --no-deps airflow-scheduler" in " ".join(line.split())


@pytest.mark.skipif(not shutil.which("docker"), reason="no docker")
def test_docker_compose_lays_the_settings_of_several_machines_over_those_of_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(INFRA / "first_secrets.py"), str(tmp_path / ".env")], check=True, capture_output=True)
    files = [word for name in ("compose.yaml", "several.yaml") for word in ("-f", str(INFRA / name))]
    command = ["docker", "compose", "--env-file", str(tmp_path / ".env"), *files, "config", "--format", "json"]
    told = {
        main: subprocess.run(command, env=os.environ | {"MAIN": main}, capture_output=True, text=True, check=False)
        for main in ("", "10.0.0.1")
    }
    if "is not a docker command" in told[""].stderr:
        pytest.skip("docker has no Compose")
    assert "required variable MAIN" in told[""].stderr and not told[""].stdout
    services = json.loads(told["10.0.0.1"].stdout)["services"]
    assert {name: sorted(port["host_ip"] for port in services[name]["ports"]) for name in CALLED} == {
        name: ["10.0.0.1", "127.0.0.1"] if name in ("mlflow", "airflow-api-server") else ["10.0.0.1"] for name in CALLED
    }
    assert services["airflow-scheduler"]["environment"]["LLMEMB_LAKE"] == "s3://lake/llmemb"


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


def test_the_jobs_secrets_are_where_jobs_run_and_in_no_other_part_of_airflow() -> None:
    parts = {name: service["environment"] for name, service in SERVICES.items() if name.startswith("airflow-")}
    jobs = {"LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "SPARK_SECRET"}
    usual = set(parts["airflow-api-server"])
    assert {"AIRFLOW__CORE__FERNET_KEY", "LLMEMB_RECIPE"} <= usual and len(parts) == 5
    assert {name: set(variables) - usual for name, variables in parts.items() if set(variables) != usual} == {
        "airflow-scheduler": jobs
    }


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
