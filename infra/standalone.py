"""`make airflow RECIPE=FILE`: Airflow with its scheduler on this machine, and the pages of MLflow and Feast beside it.

Everything lies under the recipe's lake. Addresses are printed; passwords are not: Airflow writes its own into a file, which is
named. Ctrl-C ends all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jobs.recipe import load_recipe  # noqa: E402 (the checkout's own)

PORTS = {"airflow": 8080, "mlflow": 5000, "feast": 8888}


def main(argv: list[str]) -> int:
    """Starts the three and waits; 2 where the recipe is at fault."""
    if len(argv) != 1 or not argv[0]:
        sys.stderr.write("name a recipe: make airflow RECIPE=shop/recipe.toml\n")
        return 2
    recipe = Path(argv[0]).resolve()
    try:
        run = load_recipe(recipe)["run"]
    except (ValueError, KeyError, tomllib.TOMLDecodeError) as error:
        sys.stderr.write(f"{recipe}: {error}\n")
        return 2
    lake = Path(run["lake"]).absolute()
    environment = environment_of(recipe, lake)
    Path(environment["AIRFLOW_HOME"]).mkdir(parents=True, exist_ok=True)
    sys.stdout.write(told(environment))
    sys.stdout.flush()
    running = [subprocess.Popen(line, env=environment, cwd=ROOT, start_new_session=True) for line in commands(run, lake)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return running[0].wait()  # Airflow is what all is for: when it ends, so do the pages
    except KeyboardInterrupt:
        return 0
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def environment_of(recipe: Path, lake: Path) -> dict[str, str]:
    """Settings of all three; what is set already stays."""
    feast = lake / "feast"
    defaults = {
        "LLMEMB_RECIPE": str(recipe),
        "LLMEMB_PYTHON": sys.executable,
        "LLMEMB_REGISTRY": f"sqlite:///{feast}/registry.db",
        "LLMEMB_ONLINE_STORE": f'{{"type": "sqlite", "path": "{feast}/online.db"}}',
        "LLMEMB_OFFLINE": str(feast / "offline"),
        "LLMEMB_PAGES": f"MLflow=http://localhost:{PORTS['mlflow']};Feast=http://localhost:{PORTS['feast']}",
        "AIRFLOW_HOME": str(lake / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(ROOT / "infra" / "airflow_plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__API__PORT": str(PORTS["airflow"]),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    feast.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # Airflow starts itself by name
    return defaults | dict(os.environ) | {"PATH": path, "LLMEMB_RECIPE": str(recipe)}


def commands(run: dict[str, Any], lake: Path) -> list[list[str]]:
    """Airflow first; MLflow's page where the recipe keeps it in a file; Feast's."""
    found = [[sys.executable, "-m", "airflow", "standalone"]]
    address = str(run.get("tracking_uri", ""))
    if address.startswith("sqlite:"):
        where = ["--host", "127.0.0.1", "--port", str(PORTS["mlflow"])]
        artifacts = (lake / "mlartifacts").as_uri()
        found.append([sys.executable, "-m", "mlflow", "server", "--backend-store-uri", address, *where,
                      "--default-artifact-root", artifacts])  # fmt: skip
    # the stores' settings come from the environment, as for the jobs
    program = "import sys, feast; feast.FeatureStore(sys.argv[1]).serve_ui(host=sys.argv[2], port=int(sys.argv[3]))"
    found.append([sys.executable, "-c", program, str(ROOT / "feature_repo"), "127.0.0.1", str(PORTS["feast"])])
    return found


def told(environment: dict[str, str]) -> str:
    """Where the pages are."""
    passwords = Path(environment["AIRFLOW_HOME"]) / "simple_auth_manager_passwords.json.generated"
    return (
        f"Airflow  http://localhost:{PORTS['airflow']}   user and password: Airflow writes them into\n"
        f"         {passwords}\n"
        f"MLflow   http://localhost:{PORTS['mlflow']}\n"
        f"Feast    http://localhost:{PORTS['feast']}\n"
        "DAGs start paused: switch on scft_refresh, rat_training, nightly_embeddings. Ctrl-C ends all.\n"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
