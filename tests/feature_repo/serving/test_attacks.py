"""Nobody moves the pointer from outside: tried on Redis as each user, on Feast's server, and on the serving process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import uvicorn
from feast.errors import FeastPermissionError
from feast.feature_server import get_app
from feast.permissions.action import AuthzedAction
from feast.permissions.enforcer import enforce_policy
from feast.permissions.security_manager import no_security_manager
from feast.permissions.server.utils import ServerType, init_auth_manager, init_security_manager, str_to_auth_manager_type
from feast.permissions.user import User
from feast.repo_config import load_repo_config

from feature_repo import feature_definitions, spaces
from feature_repo.reader import Reader, open_store, settings
from feature_repo.stores import lease, open_writer
from tests.feature_repo.redis_version import needs_redis_7
from tests.feature_repo.serving import world
from tests.feature_repo.serving.world import publish, push_history, serving

ROOT = Path(__file__).parents[3]
PASSWORDS = {"publisher": "pw1", "reader": "pw2", "srs": "pw3"}
As = Callable[[str], None]


@pytest.fixture
def become(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[As]:
    """Redis as infra/redis.sh starts it; call it with a user's name, and every connection from then on is that user's."""
    needs_redis_7()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "REDIS_PASSWORD": PASSWORDS["publisher"],
        "REDIS_READER_PASSWORD": PASSWORDS["reader"],
        "REDIS_SRS_PASSWORD": PASSWORDS["srs"],
        "REDIS_USERS": str(tmp_path / "users.acl"),
    }
    command = [
        "sh",
        str(ROOT / "infra" / "redis.sh"),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    with subprocess.Popen(command, env=os.environ | told, stdout=subprocess.DEVNULL) as server:
        monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")

        def user(name: str) -> None:
            where = f"127.0.0.1:{port},username={name},password={PASSWORDS[name]}"
            monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": where}))

        for _ in range(100):
            assert server.poll() is None, "Redis refuses its users: run infra/redis.sh by hand"
            with socket.socket() as line:
                if line.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield user
        server.kill()


def test_redis_lets_each_user_do_its_work_and_no_more(tmp_path: Path, become: As) -> None:
    become("publisher")
    world.apply(tmp_path)
    pointer = publish(tmp_path, seed=1)
    publish(tmp_path, seed=2)
    store = open_writer(settings(tmp_path))
    with lease(store, "test"):
        spaces.rollback(store, Reader.open(tmp_path))
        spaces.withhold(store, Reader.open(tmp_path), "i9")
        spaces.forget(store, "i9", "2026-01-01")
    kept = Reader.open(tmp_path).pointer()
    become("srs")
    push_history(tmp_path, "u1", ["i1", "i2"])
    become("reader")
    with pytest.raises(redis.exceptions.NoPermissionError):
        push_history(tmp_path, "u2", ["i1"])
    with serving(tmp_path) as client:
        assert client.post("/recommend", user_id="u1")[1]["fallback"] is None, "the serving process only reads"
    for name in ("reader", "srs"):
        become(name)
        reader = Reader.open(tmp_path)
        assert reader.pointer() == kept and reader.vectors(["i3"]).item_ids == ["i3"]
        store = open_writer(settings(tmp_path))
        with pytest.raises(redis.exceptions.NoPermissionError):
            store.acquire("attacker")
        with pytest.raises(redis.exceptions.NoPermissionError):
            attack(tmp_path, pointer.space_id)
        plain = store.plain  # type: ignore[attr-defined]
        for command in (
            ("FLUSHALL",),
            ("KEYS", "*"),
            ("CONFIG", "GET", "*"),
            ("DEL", "x"),
            ("SET", "x", "y"),
            ("ACL", "LIST"),
            ("EVAL", "return 1", "0"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                plain.execute_command(*command)
    become("publisher")
    assert Reader.open(tmp_path).pointer() == kept


def attack(lake: Path, space_id: str) -> None:
    """Writes the pointer as Feast's own client does."""
    open_store(lake).write_to_online_store("serving_pointer", pointer_rows(space_id))


def pointer_rows(space_id: str) -> Any:
    import pandas as pd

    texts = {"recommender_id": "", "ds": "2027-01-01", "codec": "float32", "previous": "", "index": "", "withheld": "[]"}
    numbers = {"width": 16, "items": 200, "sequence": 99}
    moment = pd.Timestamp("2030-01-01", tz="UTC")
    return pd.DataFrame([{"catalogue": "items", "space_id": space_id, **texts, **numbers, "event_timestamp": moment}])


def posted(url: str, path: str, body: Any, **headers: str) -> int:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("secured", [False, True])
def test_feast_s_server_with_authentication_turns_the_attack_away(
    lake: Path, monkeypatch: pytest.MonkeyPatch, secured: bool
) -> None:
    publish(lake, seed=1)
    if secured:
        auth = {"type": "oidc", "auth_discovery_url": "http://127.0.0.1:9/.well-known/openid-configuration", "client_id": "feast"}
        monkeypatch.setenv("LLMEMB_FEAST_AUTH", json.dumps(auth))
    store = open_store(lake)
    # as `feast serve` does before it listens
    kind = str_to_auth_manager_type(store.config.auth_config.type)
    init_security_manager(auth_type=kind, fs=store)
    init_auth_manager(auth_type=kind, server_type=ServerType.REST, auth_config=store.config.auth_config)
    server = uvicorn.Server(uvicorn.Config(get_app(store), host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    frame = pointer_rows("e" * 16)
    frame["event_timestamp"] = "2030-01-01T00:00:00Z"
    body = {"feature_view_name": "serving_pointer", "df": frame.to_dict("list"), "allow_registry_cache": True}
    try:
        statuses = {
            posted(url, "/write-to-online-store", body),
            posted(url, "/write-to-online-store", body, Authorization="Bearer made-up"),
        }
    finally:
        server.should_exit = True
        thread.join()
        no_security_manager()
    moved = Reader.open(lake).pointer().space_id == "e" * 16
    if secured:
        assert not moved and all(status >= 400 for status in statuses)
    else:
        assert moved, "without authentication it does: this is why"


def test_the_settings_that_are_shipped_for_feast_s_server_ask_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_REGISTRY", "sqlite:////nowhere/registry.db")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", '{"type": "redis", "connection_string": "redis:6379,username=srs"}')
    monkeypatch.setenv("LLMEMB_FEAST_AUTH", '{"type": "oidc", "auth_discovery_url": "https://id.example/x"}')
    config = load_repo_config(ROOT / "feature_repo", ROOT / "infra" / "feature_store.yaml")
    assert config.auth_config.type == "oidc" and "username=srs" in config.online_store.connection_string


def test_roles_of_feast_let_an_srs_push_histories_and_nothing_else() -> None:
    permissions = [feature_definitions.may_read, feature_definitions.may_push]

    def may(role: str, view: Any, action: AuthzedAction) -> bool:
        user = User("someone", [role])
        try:
            return bool(enforce_policy(permissions, user, [view], [action]))
        except FeastPermissionError:
            return False

    views = feature_definitions
    assert may(views.PUSHES, views.user_history, AuthzedAction.WRITE_ONLINE)
    for view in (views.serving_pointer, views.item_embedding, views.item_tombstone, views.item_attributes):
        assert not may(views.PUSHES, view, AuthzedAction.WRITE_ONLINE)
        assert may(views.READS, view, AuthzedAction.READ_ONLINE)
    assert not may(views.READS, views.user_history, AuthzedAction.WRITE_ONLINE)
    assert not may("stranger", views.serving_pointer, AuthzedAction.READ_ONLINE)


def test_the_serving_process_has_no_way_to_write(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake) as client:
        _, api = client.get("/openapi.json")
        assert {path for path, verbs in api["paths"].items() if "post" in verbs} == {"/recommend", "/similar", "/vectors"}
        before = Reader.open(lake).pointer()
        for path in ("/push", "/write-to-online-store", "/pointer", "/docs"):
            assert client.ask(path, {"feature_view_name": "serving_pointer"})[0] in (404, 405)
        assert Reader.open(lake).pointer() == before
