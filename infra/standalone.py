"""`make airflow RECIPE=FILE`: Airflow with its scheduler on this machine, and the pages of MLflow and Feast beside it.

Everything lies under the recipe's lake. All pages listen on this machine alone. Addresses, user and password are printed; the
password is Airflow's own, made at its first start. Ctrl-C ends all. A port that is taken: LLMEMB_PORT_AIRFLOW,
LLMEMB_PORT_MLFLOW and LLMEMB_PORT_FEAST name others.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jobs.recipe import load_recipe  # noqa: E402 (the checkout's own)

PORTS = {"airflow": 8080, "mlflow": 5000, "feast": 8888}
NAMES = {"airflow": "Airflow", "mlflow": "MLflow", "feast": "Feast"}
DATABASE = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
PASSWORDS = "simple_auth_manager_passwords.json.generated"
# a task whose pool is missing is never started
MIGRATE = """
import sys
from airflow.__main__ import main
for words in (["db", "migrate"], ["pools", "import", sys.argv[-1]]):
    sys.argv = ["airflow", *words]
    main()
"""
"""All in one process: Airflow takes seconds to import."""
AIRFLOW = f"""{MIGRATE}
import os
os.execv(sys.executable, [sys.executable, "-m", "airflow", "standalone"])
"""
LOCK_S = 60
"""Seconds that Airflow waits for SQLite's write lock. By SQLite's own five, on a busy machine, its scheduler ends."""
GRACE_S = 20
"""Seconds that each process has to end."""


def main(argv: list[str]) -> int:
    """Starts the three and waits; 2 where the recipe or a port is at fault, 1 where one of the three ends by itself."""
    try:
        recipe, run = opened(argv)
        ports = ports_of(os.environ)
        lake = (ROOT / run["lake"]).absolute()  # as for the jobs, which run in the checkout
        environment = environment_of(recipe, lake, ports)
        lines = commands(run, lake, ports)
        check_free({name: ports[name] for name in lines})
        Path(environment["AIRFLOW_HOME"]).mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # a shell starts what runs in its background with SIGINT ignored, and that is inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, line in lines.items():
            running[name] = subprocess.Popen(line, env=environment, cwd=ROOT, start_new_session=True)
        return watch(running, ports, Path(environment["AIRFLOW_HOME"]) / PASSWORDS, run)
    except KeyboardInterrupt:
        return 0
    finally:
        end(running)


# --------------------------------------------------------------------------------------------------------------- settings


def opened(argv: list[str]) -> tuple[Path, dict[str, Any]]:
    """The recipe's path and its table [run]. Raises ValueError where there is none."""
    if len(argv) != 1 or not argv[0]:
        raise ValueError("name a recipe: make airflow RECIPE=shop/recipe.toml")
    recipe = Path(argv[0]).resolve()
    run: dict[str, Any] = load_recipe(recipe).get("run", {})
    if not run.get("lake"):
        raise ValueError(f"{recipe}: [run] has no lake: name the folder for all that is made")
    if "://" in run["lake"]:
        raise ValueError(f"{recipe}: run.lake is {run['lake']}: `make airflow` needs a folder; docs/cluster.md has the way with "
                         "an object store")  # fmt: skip
    return recipe, run


def ports_of(environment: Mapping[str, str]) -> dict[str, int]:
    """The port of each page. Raises ValueError for one that is no number of a port."""
    found = {}
    for name, usual in PORTS.items():
        variable = f"LLMEMB_PORT_{name.upper()}"
        text = environment.get(variable) or str(usual)
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise ValueError(f"{variable} is {text!r}: give a port, 1 to 65535")
        found[name] = int(text)
    return found


def check_free(ports: Mapping[str, int]) -> None:
    """Raises OSError, with the remedy, where somebody listens already."""
    for name, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise OSError(f"port {port} for {NAMES[name]} is taken ({error.strerror}): end what listens there, or set "
                              f"LLMEMB_PORT_{name.upper()}") from error  # fmt: skip


def environment_of(recipe: Path, lake: Path, ports: Mapping[str, int]) -> dict[str, str]:
    """Settings of all three; what is set already stays."""
    feast = lake / "feast"
    pages = ";".join(f"{NAMES[name]}=http://localhost:{ports[name]}" for name in ("mlflow", "feast"))
    defaults = {
        "LLMEMB_PYTHON": sys.executable,
        "LLMEMB_REGISTRY": f"sqlite:///{feast}/registry.db",
        "LLMEMB_ONLINE_STORE": json.dumps({"type": "sqlite", "path": f"{feast}/online.db"}),
        "LLMEMB_OFFLINE": str(feast / "offline"),
        "LLMEMB_PAGES": pages,
        "AIRFLOW_HOME": str(lake / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "infra" / "airflow_plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(ports["airflow"]),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://localhost:{ports['airflow']}/execution/",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # nine processes for evaluations of chatbots
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    feast.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # Airflow starts itself by name
    found = defaults | dict(os.environ) | {"PATH": path, "LLMEMB_RECIPE": str(recipe)}
    return {DATABASE: database(found["AIRFLOW_HOME"])} | found


def database(home: str) -> str:
    """The address of Airflow's database in its home, where no other is set."""
    return f"sqlite:///{home}/airflow.db?timeout={LOCK_S}"


def commands(run: Mapping[str, Any], lake: Path, ports: Mapping[str, int]) -> dict[str, list[str]]:
    """Airflow first; MLflow's page where the recipe keeps it in a file; Feast's."""
    found = {"airflow": [sys.executable, "-c", AIRFLOW, str(ROOT / "infra" / "pools.json")]}
    address = str(run.get("tracking_uri", ""))
    if address.startswith("sqlite:"):
        where = ["--host", "127.0.0.1", "--port", str(ports["mlflow"]), "--workers", "1"]
        artifacts = (lake / "mlartifacts").as_uri()
        found["mlflow"] = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address, *where,
                           "--default-artifact-root", artifacts]  # fmt: skip
    # by Feast's Python call: its command asks for a package that is not pinned; the stores' settings come from the environment
    program = "import sys, feast; feast.FeatureStore(sys.argv[1]).serve_ui(host=sys.argv[2], port=int(sys.argv[3]))"
    found["feast"] = [sys.executable, "-c", program, str(ROOT / "feature_repo"), "127.0.0.1", str(ports["feast"])]
    return found


# ---------------------------------------------------------------------------------------------------------------- running


def watch(
    running: Mapping[str, subprocess.Popen[bytes]], ports: Mapping[str, int], passwords: Path, run: Mapping[str, Any]
) -> int:
    """Tells when all pages answer; then waits until one of the processes ends, which is a failure, and says which."""
    told_ready = False
    while True:
        for name, process in running.items():
            if process.poll() is not None:
                sys.stderr.write(
                    f"{NAMES[name]} ended with status {process.returncode}: see its lines above; the others end too\n"
                )
                return 1
        if not told_ready and passwords.exists() and all(answers(ports[name]) for name in running):
            sys.stdout.write(addresses(ports, passwords, run))
            sys.stdout.flush()
            told_ready = True
        time.sleep(0.5)


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def addresses(ports: Mapping[str, int], passwords: Path, run: Mapping[str, Any]) -> str:
    """Where the pages are, and who may log in to Airflow."""
    known = json.loads(passwords.read_text() or "{}")
    who = ", ".join(f"user {user}, password {password}" for user, password in known.items())
    address = str(run.get("tracking_uri", ""))
    mlflow = f"http://localhost:{ports['mlflow']}" if address.startswith("sqlite:") else "the recipe's own: run.tracking_uri"
    return (
        f"\nAirflow  http://localhost:{ports['airflow']}   {who}\n"
        f"         (kept in {passwords})\n"
        f"MLflow   {mlflow}\n"
        f"Feast    http://localhost:{ports['feast']}\n"
        "DAGs start paused: switch on scft_refresh, rat_training, nightly_embeddings, and maintenance, which removes\n"
        "old spaces (job collect). Ctrl-C ends all.\n"
    )


def end(running: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Ends every process with all that it started, and waits for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some of them running
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    for process in running.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that their parent left behind
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
