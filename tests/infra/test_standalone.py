"""`make airflow`: what it starts and where, what it prints, that it ends all of it; for real in tests/dags/test_standalone.py."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "infra" / "standalone.py"
PATIENCE_S = 300
STUB = """
import json, os, pathlib, socket, subprocess, sys, time
name, port, home = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", deaf])
(home / f"{name}.pids").write_text(f"{os.getpid()} {child.pid}")
listener = socket.create_server(("127.0.0.1", port))
if name == "airflow":
    folder = pathlib.Path(os.environ["AIRFLOW_HOME"])
    (folder / "simple_auth_manager_passwords.json.generated").write_text(json.dumps({"admin": "s3cret"}))
while not (home / f"{name}.end").exists():
    time.sleep(0.05)
sys.exit(7)
"""
"""A page that listens, with a child that does not end when it is told to; it ends by itself once a file says so."""
DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
import standalone
home = sys.argv[2]
standalone.GRACE_S = 2
standalone.commands = lambda run, lake, ports: {
    name: [sys.executable, home + "/stub.py", name, str(port), home] for name, port in ports.items()
}
sys.exit(standalone.main([sys.argv[3]]))
"""


@pytest.fixture
def standalone() -> ModuleType:
    spec = importlib.util.spec_from_file_location("standalone", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Three ports that nobody listens on, named in the environment."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        found = {name: int(probe.getsockname()[1]) for name, probe in zip(("airflow", "mlflow", "feast"), probes, strict=True)}
    for name, port in found.items():
        monkeypatch.setenv(f"LLMEMB_PORT_{name.upper()}", str(port))
    return found


def recipe_in(folder: Path, lake: str = "", tracking: str = "") -> Path:
    path = folder / "recipe.toml"
    lake = lake or str(folder / "lake")
    path.write_text(f'[run]\nlake = "{lake}"\ntracking_uri = "{tracking or f"sqlite:///{folder}/lake/mlflow.db"}"\n')
    return path


def until(what: str, met: Callable[[], object], log: Path, patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not met():
        assert time.monotonic() < end, f"waited for {what}\n{log.read_text()[-4000:]}"
        time.sleep(0.1)


def lives(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


@contextlib.contextmanager
def stubbed(home: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path, list[int]]]:
    """The program with stubs for the three; its log, and every process that they started."""
    (home / "stub.py").write_text(STUB)
    log = home / "log"
    with running([sys.executable, "-c", DRIVER, str(PROGRAM.parent), str(home), str(recipe_in(home))], log) as process:
        until("the addresses", lambda: "Ctrl-C" in log.read_text(), log)
        pids = [int(pid) for file in home.glob("*.pids") for pid in file.read_text().split()]
        assert len(pids) == 6 and all(map(lives, pids))
        yield process, log, pids


# ------------------------------------------------------------------------------------------------------- what is wrong first


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "name a recipe"),
        ("[run\n", "is not TOML"),
        ("[nonsense]\n", r"unknown table \[nonsense\]"),
        ("[run]\n", r"has no lake: name the folder"),
        ("run = 5\n", r"run is 5, no table: write \[run\]"),
        ("[run]\nlake = 5\n", r"run\.lake is 5, no text"),
        ('[run]\nlake = "s3://bucket/lake"\n', "needs a folder"),
    ],
)
def test_a_recipe_at_fault_is_told_before_anything_starts(
    standalone: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    (tmp_path / "recipe.toml").write_text(text or "")
    assert standalone.main([str(tmp_path / "recipe.toml")] if text is not None else [""]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "lake").exists()


def test_a_port_that_is_taken_is_named_with_the_way_out(
    standalone: ModuleType, ports: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", ports["mlflow"])):
        assert standalone.main([str(recipe_in(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert f"port {ports['mlflow']} for MLflow is taken" in said and "LLMEMB_PORT_MLFLOW" in said


def test_a_port_of_a_page_that_does_not_start_may_be_taken(standalone: ModuleType, ports: dict[str, int], tmp_path: Path) -> None:
    lines = standalone.commands({"tracking_uri": "http://mlflow:5000"}, tmp_path, ports)
    assert list(lines) == ["airflow", "feast"]
    with socket.create_server(("127.0.0.1", ports["mlflow"])):
        standalone.check_free({name: ports[name] for name in lines})


@pytest.mark.parametrize("text", ["http", "0", "65536", "-1", "8080.5"])
def test_a_port_that_is_none_is_refused(standalone: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match=r"LLMEMB_PORT_FEAST is .*: give a port"):
        standalone.ports_of({"LLMEMB_PORT_FEAST": text})


# ------------------------------------------------------------------------------------------------------------- what starts


def test_all_three_read_the_recipe_s_stores_and_listen_on_this_machine_alone(
    standalone: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_OFFLINE", "AIRFLOW_HOME", standalone.DATABASE):
        monkeypatch.delenv(name, raising=False)
    ports, lake = dict(standalone.PORTS), tmp_path / "lake"
    lines = standalone.commands({"tracking_uri": "sqlite:////x/mlflow.db"}, lake, ports)
    assert list(lines) == ["airflow", "mlflow", "feast"]
    assert "standalone" in lines["airflow"][2] and lines["airflow"][3].endswith("infra/pools.json")
    assert "sqlite:////x/mlflow.db" in lines["mlflow"] and "127.0.0.1" in lines["mlflow"] and "127.0.0.1" in lines["feast"]
    environment = standalone.environment_of(tmp_path / "recipe.toml", lake, ports)
    assert environment["LLMEMB_RECIPE"] == str(tmp_path / "recipe.toml")
    assert environment["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert environment[standalone.DATABASE] == f"sqlite:///{lake}/airflow/airflow.db?timeout=60"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert json.loads(environment["LLMEMB_ONLINE_STORE"]) == {"type": "sqlite", "path": f"{lake}/feast/online.db"}
    assert environment["LLMEMB_PAGES"] == "MLflow=http://localhost:5000;Feast=http://localhost:8888"


def test_what_is_set_already_stays(standalone: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", '{"type": "redis"}')
    monkeypatch.setenv(standalone.DATABASE, "postgresql+psycopg2://airflow@db/airflow")
    environment = standalone.environment_of(tmp_path / "recipe.toml", tmp_path / "lake", dict(standalone.PORTS))
    assert environment["LLMEMB_ONLINE_STORE"] == '{"type": "redis"}'
    assert environment[standalone.DATABASE] == "postgresql+psycopg2://airflow@db/airflow"


def test_every_dag_that_a_shop_needs_is_named_where_it_is_told_to_switch_them_on(standalone: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text('{"admin": "x"}')
    said = standalone.addresses(dict(standalone.PORTS), tmp_path / "passwords", {"tracking_uri": "sqlite:///x"})
    # without maintenance no collect runs, and collect.grace_days of the starter's recipe says nothing
    for text in (said, (ROOT / "docs" / "first-champion.md").read_text()):
        for dag in ("scft_refresh", "rat_training", "nightly_embeddings", "maintenance"):
            assert dag in text
    assert "`maintenance`" in (ROOT / "docs" / "own-tables.md").read_text()


# -------------------------------------------------------------------------------------------------------------- how it ends


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """SIGINT is ignored and passed on so, as in what a shell starts in its background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_addresses_and_the_password_are_told_and_a_signal_ends_every_process(
    ports: dict[str, int], tmp_path: Path, sent: signal.Signals
) -> None:
    with stubbed(tmp_path) as (process, log, pids):
        told = log.read_text()
        for port in ports.values():
            assert f"http://localhost:{port}" in told
        assert "user admin, password s3cret" in told
        process.send_signal(sent)
        assert process.wait(60) == (0 if sent == signal.SIGINT else 143)
        assert not any(map(lives, pids))
    assert "Traceback" not in log.read_text()


def test_one_that_ends_by_itself_is_named_and_takes_the_others_along(ports: dict[str, int], tmp_path: Path) -> None:
    with stubbed(tmp_path) as (process, log, pids):
        (tmp_path / "mlflow.end").touch()
        assert process.wait(60) == 1
        assert not any(map(lives, pids))
    assert "MLflow ended with status 7" in log.read_text()
