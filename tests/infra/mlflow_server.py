"""MLflow's server with accounts, as production starts it: a process apart."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ADMIN, PASSWORD = "admin", "an administrator's"


@contextlib.contextmanager
def mlflow_server(folder: Path, ini: Path, more: dict[str, str], artifacts: str = "") -> Iterator[str]:
    """The address of a server for the time of a `with` block; artifacts lie in the folder, or where they are said to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(ini),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for the tests",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # as in Compose and Kubernetes
        **more,
    }
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--serve-artifacts", "--artifacts-destination"]
    command += [artifacts or str(folder / "artifacts")]
    with (
        (folder / "mlflow.log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as server,
    ):
        try:
            wait(f"http://127.0.0.1:{port}/health", server, folder / "mlflow.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, 15)


def wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once the server answers."""
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.2)
    raise TimeoutError(log.read_text()[-3000:])
