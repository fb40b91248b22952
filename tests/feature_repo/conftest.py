"""The online stores: SQLite in a folder, and real servers of Redis and PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from feature_repo import feature_definitions
from feature_repo.reader import open_store
from tests.feature_repo.postgresql import Server, postgresql
from tests.feature_repo.sentinels import free_port, redis_at, until
from tests.power_cut import cuts as cuts


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a Redis server that keeps nothing on disk."""
    port = free_port()
    folder = str(tmp_path_factory.mktemp("redis"))
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        until(redis_at(port).ping, "Redis answers")
        yield port
        server.terminate()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A PostgreSQL server."""
    with postgresql() as server:
        yield server


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def lake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lake's folder whose online store is empty and known to Feast, on SQLite, on Redis and on PostgreSQL."""
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    if request.param == "redis":
        port = request.getfixturevalue("redis_port")
        redis.Redis(port=port).flushall()
        online = {"type": "redis", "connection_string": f"127.0.0.1:{port}"}
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps(online))
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", server.online(f"lake_{uuid.uuid4().hex}"))
    open_store(tmp_path).apply(list(feature_definitions.define(str(tmp_path / "offline"))))
    return tmp_path
