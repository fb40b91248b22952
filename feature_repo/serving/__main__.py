"""`python -m feature_repo.serving`: the process that an SRS calls. What it is told stands in its environment, see settings.py."""

from __future__ import annotations

import os
import signal
import ssl
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_repo.serving import logs

if TYPE_CHECKING:
    from feature_repo.serving.settings import Settings

GRACE_S = 20
"""Seconds that requests under way have when the process is told to end."""


def application() -> Any:
    """What each worker runs."""
    from feature_repo.serving.app import make_app
    from feature_repo.serving.settings import from_environment

    logs.start()
    settings = from_environment()
    return make_app(settings, lake_of(settings.artifacts))


def lake_of(artifacts: str) -> Path | None:
    """The lake whose SQLite store is read where no variable names a store."""
    both = os.environ.get("LLMEMB_ONLINE_STORE") and os.environ.get("LLMEMB_REGISTRY")
    return None if both or "://" in artifacts else Path(artifacts)


def main() -> int:
    """Runs until it is told to end; 2 where the settings are wrong."""
    from feature_repo.serving.settings import from_environment, told

    if len(sys.argv) > 1:
        print(f"{__doc__}\n\n{told()}", file=sys.stdout if sys.argv[1:] in (["--help"], ["-h"]) else sys.stderr)
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    try:
        settings = from_environment()
        if not settings.artifacts:
            raise ValueError(
                "LLMEMB_SERVING_ARTIFACTS is not set: give the lake's folder, or an address that holds its artifacts"
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    prepare(settings.workers)
    logs.start()
    # uvicorn ends well and then raises the signal again: told to end, ending is no failure
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    import uvicorn

    uvicorn.run("feature_repo.serving.__main__:application", factory=True, **server_of(settings))
    return 0


def prepare(workers: int) -> None:
    """The environment of the workers: one numeric thread each, and counts of their own."""
    # more threads would only wait for each other
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # a folder that was inherited holds another process's counts; Feast makes one for every process that imports it
    for name in ("PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR"):
        os.environ.pop(name, None)
    if workers > 1:
        folder = tempfile.mkdtemp(prefix="llmemb-metrics-")
        os.environ |= {"PROMETHEUS_MULTIPROC_DIR": folder, "PROMETHEUS_MULTIPROCESS_DIR": folder}


def server_of(settings: Settings) -> dict[str, Any]:
    """uvicorn's arguments."""
    return {
        "host": settings.host,
        "port": settings.port,
        "workers": settings.workers if settings.workers > 1 else None,
        "access_log": False,  # it would name what callers ask
        "proxy_headers": False,  # nothing asks for a caller's address
        "log_level": "warning",
        "log_config": None,  # its lines go where ours go
        "http": "feature_repo.serving.http:Patient",
        "server_header": False,
        "backlog": 256,
        "ws": "none",
        "timeout_keep_alive": 30,
        "timeout_graceful_shutdown": GRACE_S,
        "ssl_certfile": settings.certificate or None,
        "ssl_keyfile": settings.key or None,
        "ssl_ca_certs": settings.client_ca or None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if settings.client_ca else ssl.CERT_NONE,
    }


if __name__ == "__main__":
    sys.exit(main())
