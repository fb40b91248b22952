"""Accounts: each user of Redis and of MLflow does its work and no more; real servers, with the settings of infra/."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client

from feature_repo import spaces
from feature_repo.feature_definitions import item_embedding, serving_pointer, user_history
from feature_repo.keys import key_prefix
from feature_repo.reader import Reader, Space, settings
from feature_repo.stores import lease, open_writer
from tests.feature_repo.redis_version import needs_redis_7
from tests.feature_repo.sentinels import free_port, redis_at, until
from tests.infra.mlflow_server import ADMIN, PASSWORD, mlflow_server

INFRA = Path(__file__).parents[2] / "infra"
SPACE = Space(space_id="a" * 16, recommender_id="", ds="2026-01-01", width=2, codec="float16", items=1)
MODEL = "llmemb-recommender"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Redis as redis.sh starts it."""
    needs_redis_7()
    port = free_port()
    folder = tmp_path_factory.mktemp("redis")
    passwords = {"REDIS_PASSWORD": "p1", "REDIS_READER_PASSWORD": "p2", "REDIS_SRS_PASSWORD": "p3"}
    environment = os.environ | passwords | {"REDIS_USERS": str(folder / "users.acl")}
    command = ["sh", str(INFRA / "redis.sh"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as server:
        until(user(port, "reader", "p2").ping, "Redis answers")
        yield port
        server.terminate()


def user(port: int, name: str, password: str) -> redis.Redis:
    return redis_at(port, username=name, password=password)


def test_a_redis_user_does_its_work_and_no_more(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"127.0.0.1:{port},username=publisher,password=p1"
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": where}))
    store = open_writer(settings(tmp_path))
    with lease(store, "test"):
        store.write(item_embedding, spaces.embedding_rows(SPACE, ["x"], [bytes([1] * 4)]))
        assert store.spaces() == {SPACE.space_id: 1} and store.rows_of("x") and store.free_bytes()
        assert spaces.flip(store, Reader.open(tmp_path), SPACE).sequence == 1
    publisher, reader, srs = (user(port, *who) for who in (("publisher", "p1"), ("reader", "p2"), ("srs", "p3")))
    assert publisher.wait(0, 1) == 0  # how `settle` asks replicas
    as_reader = where.replace("publisher", "reader").replace("p1", "p2")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": as_reader}))
    assert Reader.open(tmp_path).vectors(["x"]).item_ids == ["x"]
    history = key_prefix(user_history) + b"405llmemb"
    srs.hset(history, "field", "a history")
    row = next(iter(publisher.scan_iter(match="*x*")))
    pointer = next(iter(publisher.scan_iter(match=b"*" + key_prefix(serving_pointer)[-9:] + b"*")))
    refused = [
        lambda: redis_at(port).get("llmemb:lease"),
        *(lambda who=who: who.config_set("maxmemory", 1) for who in (publisher, reader, srs)),
        *(lambda who=who: who.flushall() for who in (publisher, reader, srs)),
        *(lambda who=who: who.hset(row, "field", "forged") for who in (reader, srs)),
        *(lambda who=who: who.set("llmemb:lease", "mine") for who in (reader, srs)),
        *(lambda who=who: who.delete(row) for who in (reader, srs)),
        *(lambda who=who: who.hset(pointer, "field", "another space") for who in (reader, srs)),
        *(lambda who=who, key=key: who.expire(key, 1) for who in (reader, srs) for key in (row, pointer)),
        *(lambda who=who: who.rename(history, row) for who in (reader, srs)),
        *(lambda who=who: who.eval("return redis.call('DEL', KEYS[1])", 1, row) for who in (publisher, reader, srs)),
        *(lambda who=who: who.keys("*") for who in (publisher, reader, srs)),
        lambda: srs.delete(history),
        lambda: reader.hset(history, "field", "forged"),
        lambda: publisher.acl_setuser("reader", enabled=False),
        lambda: reader.execute_command("MONITOR"),
    ]
    for attempt in refused:
        with pytest.raises((redis.exceptions.NoPermissionError, redis.AuthenticationError)):
            attempt()


def test_nobody_moves_an_alias_without_an_account_that_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever moves `champion` chooses what the next night serves."""
    ini = tmp_path / "mlflow-auth.ini"
    ini.write_text((INFRA / "mlflow-auth.ini").read_text().replace("postgresql+psycopg://", f"sqlite:///{tmp_path}/accounts.db"))

    def as_user(name: str, password: str) -> MlflowClient:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return MlflowClient(uri, uri)  # a test before may have left another registry

    with mlflow_server(tmp_path, ini, {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db"}) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        admin = as_user(ADMIN, PASSWORD)
        try:
            admin.create_registered_model(MODEL)
        except MlflowException as error:  # the client asks again where an answer is late, though it was done the first time
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        run = admin.create_run(admin.create_experiment("nights"))
        admin.create_model_version(MODEL, source=f"{run.info.artifact_uri}/model", run_id=run.info.run_id)
        accounts = get_app_client("basic-auth", tracking_uri=uri)
        for name in ("jobs", "analyst"):
            accounts.create_user(name, f"the password of {name}")
        accounts.grant_user_permission("jobs", "registered_model", MODEL, "EDIT")
        for name, password in (("analyst", "the password of analyst"), ("jobs", "a guess"), ("", "")):
            with pytest.raises(MlflowException, match=r"Permission denied|403|401|not authenticated|Unauthorized"):
                as_user(name, password).set_registered_model_alias(MODEL, "champion", "1")
        assert as_user("analyst", "the password of analyst").get_registered_model(MODEL).aliases == {}
        as_user("jobs", "the password of jobs").set_registered_model_alias(MODEL, "champion", "1")
        assert as_user("analyst", "the password of analyst").get_registered_model(MODEL).aliases == {"champion": "1"}
