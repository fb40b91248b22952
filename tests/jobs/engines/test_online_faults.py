"""Stores that are down, slow or full, and a pointer to nothing: told in a line, what serves stays, and a rerun ends well."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo.reader import Pointer, Reader, settings
from feature_repo.spaces import remove_space
from feature_repo.stores import Fenced, SqliteStore, lease, open_writer
from jobs import collect, forget, lookup, publish, recommend, rollback
from jobs.run import InputError, Refused, Run
from tests.feature_repo.feature_server import feature_server
from tests.feature_repo.postgresql import PASSWORD, Server

A, B = "a" * 16, "b" * 16
RUN_DS = "2026-01-01"
IDS = [f"m{number}" for number in range(40)]
Catalogue = Callable[..., Path]


def online(port: int, **more: float) -> str:
    """Redis settings, with parameters of the connection."""
    return json.dumps(
        {"type": "redis", "connection_string": ",".join([f"127.0.0.1:{port}", *(f"{k}={v}" for k, v in more.items())])}
    )


@pytest.fixture(params=["sqlite", "redis", "postgres"])
def lake(request: pytest.FixtureRequest, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lake in which space A serves and space B is there to be published, on SQLite, on Redis and on PostgreSQL."""
    if request.param == "redis":
        port = request.getfixturevalue("redis_port")
        redis.Redis(port=port).flushall()
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", online(port))
    if request.param == "postgres":
        server: Server = request.getfixturevalue("postgres")
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", server.online(f"jobs_{uuid.uuid4().hex}"))
    put(catalogue(), A)
    return catalogue(space=B)


def run_of(lake: Path) -> Run:
    return Run(ds=RUN_DS, lake=lake)


def put(lake: Path, space: str) -> publish.Result:
    return publish.run(publish.Config(run=run_of(lake), space=space, lease_wait_s=0))


def seen(lake: Path) -> tuple[Pointer, list[str], bytes]:
    """All that a reader sees."""
    answer = Reader.open(lake).vectors(IDS)
    return answer.pointer, answer.item_ids, answer.vector_ND.tobytes()


WRITERS: dict[str, Callable[[Path], Any]] = {
    "publish": lambda lake: put(lake, B),
    "rollback": lambda lake: rollback.run(rollback.Config(run=run_of(lake))),
    "collect": lambda lake: collect.run(collect.Config(run=run_of(lake))),
    "forget": lambda lake: forget.run(forget.Config(run=run_of(lake), item="m1")),
    "lookup": lambda lake: lookup.run(lookup.Config(run=run_of(lake))),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis's client tries again without a pause."""
    monkeypatch.setattr("redis.retry.sleep", lambda seconds: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lake", ["redis", "postgres"], indirect=True)
@pytest.mark.parametrize("job", WRITERS)
def test_a_store_that_is_down_is_told_by_every_job(lake: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, there = seen(lake), os.environ["LLMEMB_ONLINE_STORE"]
    away = re.sub(r'127\.0\.0\.1:\d+|(?<="port": )\d+', lambda found: "127.0.0.1:1" if ":" in found[0] else "1", there)
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", away)
    with pytest.raises(ConnectionError, match=r"(?s)the online store failed .*(127\.0\.0\.1:1|port 1 ).*is it down") as caught:
        WRITERS[job](lake)
    assert PASSWORD not in str(caught.value)
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", there)
    assert seen(lake) == before


@pytest.fixture
def guarded(redis_port: int) -> Iterator[None]:
    """Redis asks for a password."""
    server = redis.Redis(port=redis_port)
    server.config_set("requirepass", PASSWORD)
    yield
    server.execute_command("AUTH", PASSWORD)
    server.config_set("requirepass", "")


@pytest.mark.usefixtures("quick", "guarded")
@pytest.mark.parametrize("given", ["another", ""])
@pytest.mark.parametrize("kind", ["redis", "postgres"])
def test_a_wrong_password_is_the_recipe_s_fault_and_is_not_asked_again(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, redis_port: int, postgres: Server, kind: str, given: str
) -> None:
    wrong = json.loads(postgres.online("jobs_locked_out")) | {"password": given}
    there = online(redis_port, **({"password": given} if given else {}))  # type: ignore[arg-type]
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", there if kind == "redis" else json.dumps(wrong))
    monkeypatch.delenv("PGPASSWORD", raising=False)
    with pytest.raises(InputError, match=r"(?s)the online store let nobody in .*check its user and password") as caught:
        put(catalogue(), A)
    assert PASSWORD not in str(caught.value)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lake", ["redis"], indirect=True)
def test_a_store_that_does_not_answer_in_time_is_told(lake: Path, redis_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before, server = seen(lake), redis.Redis(port=redis_port)
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", online(redis_port, socket_timeout=0.2))
    server.execute_command("CLIENT", "PAUSE", 60_000, "WRITE")
    try:
        with pytest.raises(ConnectionError, match=r"the online store failed \(TimeoutError.*slow"):
            put(lake, B)
    finally:
        server.execute_command("CLIENT", "UNPAUSE")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", online(redis_port))
    assert seen(lake) == before
    server.delete("llmemb:lease")  # of the writer that gave up; it would end by itself
    assert put(lake, B).verified == 40


@contextmanager
def full(lake: Path, server: Callable[[str], Any]) -> Iterator[None]:
    """While it lasts, the store takes not one row more."""
    kind = settings(lake).online_store.type
    if kind == "redis":
        redis_server = redis.Redis(port=server("redis_port"))
        redis_server.config_set("maxmemory", "1")
        yield
        redis_server.config_set("maxmemory", "0")
        return
    if kind == "postgres":
        schema = settings(lake).online_store.db_schema
        with server("postgres").administrator() as connection:
            connection.execute(
                f"CREATE FUNCTION {schema}.full_disk() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
                "RAISE EXCEPTION 'the disk is full' USING ERRCODE = 'disk_full'; END$$; "
                f"CREATE TRIGGER full_disk BEFORE INSERT ON {schema}.llmemb_item_embedding EXECUTE FUNCTION {schema}.full_disk()"
            )
            yield
            connection.execute(f"DROP FUNCTION {schema}.full_disk CASCADE")
        return
    with pytest.MonkeyPatch.context() as patch:
        init = SqliteStore.__init__

        def small(self: SqliteStore, config: Any) -> None:
            init(self, config)
            (pages,) = self.connection.execute("PRAGMA page_count").fetchone()
            self.connection.execute(f"PRAGMA max_page_count={pages}")

        patch.setattr(SqliteStore, "__init__", small)
        yield


def test_a_store_that_is_full_is_told_and_the_space_is_published_once_there_is_room(
    lake: Path, request: pytest.FixtureRequest
) -> None:
    before = seen(lake)
    with (
        full(lake, request.getfixturevalue),
        pytest.raises(ConnectionError, match=r"the online store failed .*(OOM|maxmemory|disk is full)"),
    ):
        put(lake, B)
    assert seen(lake) == before
    assert put(lake, B).verified == 40


@pytest.mark.parametrize("lake", ["postgres"], indirect=True)
def test_a_writer_that_was_stopped_inside_a_transaction_holds_up_no_publish(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feast's `apply` waits for every transaction on its tables; a `docker pause` would hold it up for ever."""
    monkeypatch.setenv("LLMEMB_LEASE_MS", "500")
    stopped: Any = open_writer(settings(lake))
    stopped.acquire("stopped")
    with pytest.raises(Fenced), stopped.transaction():
        stopped.run("DELETE FROM {rows}")
        config = publish.Config(run=run_of(lake), space=B, lease_wait_s=20)
        assert publish.run(config).verified == 40
        stopped.renew()
    assert seen(lake)[0].space_id == B


def test_a_pointer_to_a_space_that_is_gone_is_told_and_mended_by_publishing_again(lake: Path) -> None:
    before = seen(lake)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        assert remove_space(store, A) == 40
    assert Reader.open(lake).vectors(IDS).missing == IDS
    with pytest.raises(Refused, match=r"40 items .* are not online"):
        lookup.run(lookup.Config(run=run_of(lake)))
    result = put(lake, A)
    assert (result.kind, result.written, result.verified) == ("nothing to do", 40, 40)
    assert seen(lake) == before


def test_a_file_that_is_no_database_is_told(catalogue: Catalogue) -> None:
    lake = catalogue()
    (lake / "feast").mkdir()
    (lake / "feast" / "online.db").write_bytes(b"not a database, not even nearly" * 1_000)
    with pytest.raises(ConnectionError, match=r"the online store failed .*not a database"):
        put(lake, A)


def test_lookup_reads_through_the_feature_server_as_from_the_store(lake: Path) -> None:
    with feature_server(lake) as url:
        there = lookup.run(lookup.Config(run=run_of(lake), url=url))
    here = lookup.run(lookup.Config(run=run_of(lake)))
    assert (there.compared, there.vector, there.inputs) == (40, here.vector, here.inputs)


def test_recommendations_through_the_feature_server_are_those_from_the_store(
    catalogue: Catalogue, trained: Callable[[Path], tuple[str, str]]
) -> None:
    space_id, _ = trained(catalogue())
    lake = catalogue(space=space_id)
    put(lake, space_id)
    config: dict[str, Any] = {"run": Run(ds=RUN_DS, lake=lake, device="cpu"), "user": "u1", "k": 5}
    with feature_server(lake) as url:
        there = recommend.run(recommend.Config(**config, url=url))
    here = recommend.run(recommend.Config(**config))
    assert (there.item_ids, there.scores) == (here.item_ids, here.scores)


def test_a_feature_server_that_is_down_or_empty_is_told(catalogue: Catalogue) -> None:
    lake = catalogue()
    with pytest.raises(ConnectionError, match=r"feature server http://127\.0\.0\.1:9 failed"):
        lookup.run(lookup.Config(run=run_of(lake), url="http://127.0.0.1:9"))
    publish.register(lake)
    with feature_server(lake) as url, pytest.raises(InputError, match="jobs publish"):
        lookup.run(lookup.Config(run=run_of(lake), url=url))
