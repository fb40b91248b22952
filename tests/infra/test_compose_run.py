"""The images and Compose for real: built, brought up, a night run in them, and each container looked at from outside.

It takes half an hour and an engine with Compose, so it runs where LLMEMB_TEST_IMAGES says so: `pull` takes the images of others
as infra/ names them, `stand-ins` those that tests/infra/stand_ins/build.sh makes of Debian's packages. With `pytest -s` it prints
its figures as one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.models import tiny
from tests.test_end_to_end import FIRST, ITEMS, RECIPE, SECOND, film, logs

ROOT = Path(__file__).parents[2]
WANTED = os.environ.get("LLMEMB_TEST_IMAGES", "")
STAND_INS = {"postgres": "postgres", "redis": "redis", "object-storage-init": "busybox", "object-storage": "minio/minio"}
"""Service of Compose -> whose image stands in for its own."""
ONCE = {"airflow-init", "object-storage-init"}
PATIENCE_S = 600
pytestmark = [
    pytest.mark.timeout(5400),
    pytest.mark.skipif(WANTED not in ("pull", "stand-ins"), reason="LLMEMB_TEST_IMAGES is neither pull nor stand-ins"),
]


def run(*command: str | Path, **more: Any) -> str:
    """What a command prints. It fails with what it said."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout


def until(what: str, met: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Waits for a condition; gives what it gave."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if found := met():
                return found
        time.sleep(1)
    raise AssertionError(f"waited {patience_s} s for {what}")


class Composed:
    """A checkout of its own, whose Compose has a name and volumes of its own; images keep their names."""

    def __init__(self, home: Path) -> None:
        self.root, self.shop = home / "checkout", home / "shop"
        listed = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
        for name in (name for name in listed if (ROOT / name).is_file()):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        git = ["git", "-C", self.root, "-c", "user.name=a test", "-c", "user.email=test@example.invalid"]
        for words in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "a test"]):
            run(*git, *words)
        self.revision = run(*git, "describe", "--always", "--dirty", "--abbrev=12").strip()
        self.services: dict[str, Any] = yaml.safe_load((self.root / "infra" / "compose.yaml").read_text())["services"]
        self.environment = os.environ | {"COMPOSE_PROJECT_NAME": "llmemb-test", "DOCKER_BUILDKIT": "1"}
        self.figures: dict[str, float] = {}
        self.variables = [f"PYTHON={sys.executable}", f"RECIPE={self.shop}/recipe.toml", f"DS={FIRST}", "IN=compose"]
        if WANTED == "stand-ins":
            (home / "override.yaml").write_text(yaml.safe_dump(self.override()))
            self.variables.append(f"OVERRIDE={home}/override.yaml")

    def override(self) -> dict[str, Any]:
        """Compose with the stand-ins."""
        built = {"build": {"network": "host", "args": {"PYTHON": "stand-in"}}}
        images = {name: {"image": f"{image}:stand-in"} for name, image in STAND_INS.items()}
        return {"services": images | {name: built for name, service in self.services.items() if "build" in service}}

    def make(self, target: str, *variables: str) -> str:
        """A target of the Makefile."""
        return run("make", target, *self.variables, *variables, cwd=self.root, env=self.environment)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Seconds, for the figures alone."""
        started = time.monotonic()
        yield
        self.figures[f"{what}_s"] = round(time.monotonic() - started, 1)

    def compose(self, *words: str) -> str:
        """A command of Compose, as the Makefile calls it."""
        line = run("make", "--eval", "print: ; @echo '$(COMPOSE)'", "print", *self.variables, cwd=self.root)
        return run("sh", "-c", f'{line.strip()} "$@"', "sh", *words, cwd=self.root, env=self.environment)

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the engine knows about each service's container, of several the last one."""
        ids = self.compose("ps", "--all", "--quiet").split()
        found: list[dict[str, Any]] = json.loads(run("docker", "inspect", *ids))
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}

    def inside(self, service: str, code: str) -> str:
        """What a line of shell prints in a service's container."""
        return self.compose("exec", "-T", service, "sh", "-c", code)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """The code and a small shop, and an engine that has the images of others."""
    for words in (["docker", "info"], ["docker", "compose", "version"]):
        if subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip(f"`{' '.join(words)}` fails: no engine to be had")
    if WANTED == "stand-ins":
        run("sh", ROOT / "tests" / "infra" / "stand_ins" / "build.sh")
    made = Composed(tmp_path_factory.mktemp("compose"))
    open_shop(made.shop)
    yield made
    print(json.dumps(made.figures))


@pytest.fixture(scope="module")
def composed(checkout: Composed) -> Iterator[Composed]:
    """Compose brought up by `make up`, every service healthy; its containers and volumes go afterwards."""
    with checkout.timed("build_of_compose"):
        checkout.compose("build")
    try:
        with checkout.timed("up_and_healthy"):
            checkout.make("up")
            until("health", lambda: all(map(healthy, checkout.containers().values())))
        yield checkout
    finally:
        checkout.compose("down", "--volumes", "--remove-orphans", "--timeout", "20")


def open_shop(folder: Path) -> None:
    """Tables, a small LLM and a recipe, where the containers see them."""
    tiny.llama(folder / "base")
    pq.write_table(pa.Table.from_pylist([film(number) for number in range(ITEMS)]), folder / "items.parquet")
    pq.write_table(pa.Table.from_pylist(logs(FIRST, ITEMS)), folder / "events.parquet")
    recipe = RECIPE.format(tmp="/recipes").replace('"/recipes/lake"', '"$LLMEMB_LAKE"')
    (folder / "recipe.toml").write_text(recipe.replace('"sqlite:////recipes/mlflow.db"', '"$MLFLOW_TRACKING_URI"'))
    local = re.compile(r"^spark = .*\n", re.MULTILINE)
    (folder / "cluster.toml").write_text(local.sub("", (folder / "recipe.toml").read_text()))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def healthy(container: dict[str, Any]) -> bool:
    """Whether a container is as it shall be: healthy, or ended well where it does one thing and ends."""
    state = container["State"]
    if container["Config"]["Labels"]["com.docker.compose.service"] in ONCE:
        return bool(state["Status"] == "exited" and state["ExitCode"] == 0)
    return bool(state.get("Health", {}).get("Status") == "healthy")


def answer(url: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, str]:
    """Status and text of a page, asked from this machine."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, headers | ({"Content-Type": "application/json"} if body else {}))
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def night(composed: Composed) -> str:
    """What the first night prints, run as an operator runs it."""
    with composed.timed("night"):
        return composed.make("night")


def staying(composed: Composed) -> dict[str, dict[str, Any]]:
    """Containers of services that stay."""
    return {name: one for name, one in composed.containers().items() if name not in ONCE}


def test_a_container_runs_as_nobody_in_a_root_that_is_read_only(composed: Composed) -> None:
    for name, container in staying(composed).items():
        process = Path("/proc") / str(container["State"]["Pid"])  # the container's first, as this machine sees it
        if not process.exists():
            pytest.skip("the engine's processes are not this machine's")
        status = dict(re.findall(r"^(\w+):\s+(.*)$", (process / "status").read_text(), re.MULTILINE))
        told = int(composed.services[name]["user"].split(":")[0])
        assert set(map(int, status["Uid"].split())) == {told} and told, name
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0 and status["NoNewPrivs"] == "1", name
        mounts = dict(line.split()[1:4:2] for line in (process / "mounts").read_text().splitlines())
        assert mounts["/"].split(",")[0] == "ro", name
        assert ("noexec" in mounts["/tmp"]) != (name.startswith("airflow")), f"{name}: where Spark runs it loads its codecs"


def test_no_secret_is_among_the_arguments_of_a_process(composed: Composed, night: str) -> None:
    lines = (composed.root / "infra" / ".env").read_text().splitlines()
    secrets = dict(line.split("=", 1) for line in lines if "=" in line)
    assert len(secrets) > 10
    for name, container in staying(composed).items():
        shown = run("docker", "top", container["Id"], "-eo", "pid,args")
        assert not [secret for secret, value in secrets.items() if value in shown], name
    assert not [secret for secret, value in secrets.items() if value in night]


def test_what_is_published_answers_to_localhost(composed: Composed) -> None:
    assert answer("http://localhost:5000/health") == (200, "OK")
    assert answer("http://localhost:5000/api/2.0/mlflow/experiments/get?experiment_id=0")[0] == 401, "nobody without an account"
    status, text = answer("http://localhost:8080/api/v2/monitor/health")
    assert status == 200 and {part["status"] for part in json.loads(text).values()} == {"healthy"}
    assert answer("http://localhost:8100/healthz")[0] == 200
    path = "/opt/airflow/simple_auth_manager_passwords.json.generated"
    assert json.loads(composed.inside("airflow-api-server", f"cat {path}"))["admin"], "where docs/cluster.md says"


def test_airflow_reads_every_dag(composed: Composed) -> None:
    listed = composed.inside("airflow-scheduler", "airflow dags list --output json 2>/dev/null")
    found = json.loads(listed[listed.index("[{") :])
    assert {Path(dag["fileloc"]).stem for dag in found} >= {"nightly_embeddings", "scft_refresh", "rat_training", "maintenance"}
    assert "No data found" in composed.inside("airflow-scheduler", "airflow dags list-import-errors 2>/dev/null")


def test_a_night_in_the_containers_serves(composed: Composed, night: str) -> None:
    told = json.loads(night.splitlines()[-1])
    assert told["items"] == ITEMS
    until("the new space", lambda: answer("http://localhost:8100/readyz")[0] == 200)
    asked = {"history": ["i1", "i5"], "k": 5}
    assert answer("http://localhost:8100/recommend", asked)[0] == 401
    token = re.search(r"^SERVING_TOKEN=(.*)$", (composed.root / "infra" / ".env").read_text(), re.MULTILINE)
    assert token
    status, text = answer("http://localhost:8100/recommend", asked, Authorization=f"Bearer {token[1]}")
    found = json.loads(text)
    assert status == 200 and len(found["items"]) == 5 and not {"i1", "i5"} & {item["item_id"] for item in found["items"]}
    assert (found["space_id"], found["ds"], found["fallback"]) == (told["space_id"], FIRST, None)


def test_a_manifest_names_the_code_though_an_image_has_no_checkout(composed: Composed, night: str) -> None:
    del night
    text = composed.inside("airflow-scheduler", f"cat /lake/manifests/ds={FIRST}/publish.*json")
    assert json.loads(text)["code_revision"] == composed.revision


def test_after_a_night_every_service_is_healthy_within_its_memory_and_none_was_started_again(
    composed: Composed, night: str
) -> None:
    del night
    until("health", lambda: all(map(healthy, composed.containers().values())))
    for name, container in staying(composed).items():
        assert not container["State"]["OOMKilled"] and container["RestartCount"] == 0, name
        assert container["HostConfig"]["Memory"] > 0, name
        used = run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", container["Id"])
        composed.figures[f"{name}_mib"] = mebibytes(used.split("/")[0])


def mebibytes(text: str) -> float:
    """Memory as the engine writes it."""
    found = re.fullmatch(r"([\d.]+)([KMG])iB", text.strip())
    assert found, text
    return round(float(found[1]) * {"K": 1 / 1024, "M": 1, "G": 1024}[found[2]], 1)


def test_a_spark_cluster_beside_it_reads_the_same_tables(composed: Composed) -> None:
    composed.variables.append("SPARK=standalone")
    with composed.timed("spark_up_and_healthy"):
        composed.make("up")
        until("health", lambda: all(map(healthy, composed.containers().values())))
    job = f"python -m jobs extract --recipe /recipes/cluster.toml --ds {SECOND}"
    with composed.timed("extract_on_spark"):
        said = composed.inside("airflow-scheduler", f"sh /opt/llmemb/infra/spark/secret.sh {job}")
    assert json.loads(said.splitlines()[-1])["rows"]["items"] == ITEMS
    asks = "import urllib.request as u; print(u.urlopen('http://spark-master:8080/json/').read().decode())"
    state = json.loads(composed.inside("spark-master", f'python -c "{asks}"'))
    assert len(state["workers"]) == 2 and [app["state"] for app in state["completedapps"]] == ["FINISHED"]


@pytest.mark.parametrize("target", ["scheduler", "spark", "gpu", "serving", "laptop"])
def test_an_image_is_built_and_runs_what_it_is_for(checkout: Composed, target: str) -> None:
    tag = f"llmemb-{target}:test"
    words = ["--build-arg", "PYTHON=stand-in", "--network", "host"] if WANTED == "stand-ins" else []
    build = ["docker", "build", "--file", "infra/Dockerfile", "--target", target, "--tag", tag, *words, "."]
    with checkout.timed(f"build_{target}"):
        run(*build, cwd=checkout.root, env=checkout.environment)
    checkout.figures[f"{target}_gb"] = round(int(run("docker", "image", "inspect", "--format", "{{.Size}}", tag)) / 1e9, 2)
    code = "import os; from jobs.__main__ import JOBS; print(os.getuid(), len(JOBS) > 10)"
    box = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network", "none", "--cap-drop", "ALL"]
    assert run(*box, "--entrypoint", "python", tag, "-c", code).split() == ["10001", "True"]
    if target != "serving":  # its own command waits for callers
        run(*box, "--volume", "/opt/airflow", tag, *(["airflow", "version"] if target == "laptop" else []))
