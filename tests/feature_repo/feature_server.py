"""Feast's feature server over a lake's store, on a free port."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from feast.feature_server import get_app

from feature_repo.reader import open_store


@contextmanager
def feature_server(lake: Path) -> Iterator[str]:
    """Its address, while it runs."""
    running = uvicorn.Server(uvicorn.Config(get_app(open_store(lake)), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not running.started:
        assert thread.is_alive() and time.monotonic() < end, "the feature server did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(60)
