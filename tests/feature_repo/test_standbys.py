"""A PostgreSQL standby that missed the last commits is promoted: no second writer, and nothing called published that it lacks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from feature_repo import feature_definitions, spaces
from feature_repo.feature_definitions import item_embedding
from feature_repo.postgres_reads import TooSlow
from feature_repo.reader import Reader, Space, open_store, settings
from feature_repo.stores import Fenced, PostgresStore, Unreplicated, lease, open_writer
from tests.feature_repo.standbys import Standbys, standbys

OLD = Space(space_id="a" * 16, recommender_id="", ds="2026-01-01", width=2, codec="float16", items=1)
NEW = dataclasses.replace(OLD, space_id="b" * 16)


def stage(store: PostgresStore, space: Space, *ids: str) -> None:
    store.write(item_embedding, spaces.embedding_rows(space, list(ids), [bytes([1] * 4)] * len(ids)))


def writer(lake: Path) -> PostgresStore:
    store = open_writer(settings(lake))
    assert isinstance(store, PostgresStore)
    return store


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Standbys]:
    """A primary and a standby, which both have that OLD serves; from then on the standby hears nothing."""
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.setenv("LLMEMB_LEASE_MS", "1000")
    monkeypatch.setenv("LLMEMB_REPLICAS_MS", "20000")
    monkeypatch.setenv("LLMEMB_REPLICAS", "1")
    with standbys() as running:
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", running.settings)
        open_store(tmp_path).apply(list(feature_definitions.define(str(tmp_path / "offline"))))
        store = writer(tmp_path)
        with lease(store, "first"):
            stage(store, OLD, "x")
            spaces.flip(store, Reader.open(tmp_path), OLD)
        running.deafen()
        monkeypatch.setenv("LLMEMB_REPLICAS_MS", "200")
        yield running


def test_a_token_that_a_standby_gives_again_lets_only_the_second_writer_write(
    servers: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standby lacks the lease, the count of leases, a row and the pointer, all of which were committed."""
    monkeypatch.setenv("LLMEMB_REPLICAS", "0")
    slow, quick = writer(tmp_path), writer(tmp_path)
    first = slow.acquire("slow")
    stage(slow, NEW, "late")
    assert spaces.flip(slow, Reader.open(tmp_path), NEW).sequence == 2
    assert servers.leads(servers.kill())
    assert quick.acquire("quick") == first, "at once, as the standby knows of no lease"
    with contextlib.suppress(psycopg.OperationalError):
        slow.renew()
        pytest.fail("the connection is cut")
    for attempt in (lambda: stage(slow, NEW, "later"), slow.renew, slow.release):
        with pytest.raises(Fenced, match="is lost"):
            attempt()  # type: ignore[no-untyped-call]
    stage(quick, OLD, "y")
    quick.release()
    answer = Reader.open(tmp_path).vectors(["x", "y", "late", "later"])
    assert (answer.item_ids, answer.pointer.space_id, answer.pointer.sequence) == (["x", "y"], OLD.space_id, 1)
    assert writer(tmp_path).spaces() == {OLD.space_id: 2}


def test_a_writer_whose_primary_lives_on_writes_where_nobody_reads_and_is_told(
    servers: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network broke in two, and the address names the standby by now."""
    monkeypatch.setenv("LLMEMB_REPLICAS", "0")
    monkeypatch.setenv("LLMEMB_LEASE_MS", "60000")
    slow, quick = writer(tmp_path), writer(tmp_path)
    first = slow.acquire("slow")
    slow.replicas = 1
    deposed = servers.promote()
    try:
        assert quick.acquire("quick") == first
        stage(slow, NEW, "late")
        with pytest.raises(Unreplicated, match=r"0 standbys .* 1 must"):
            slow.settle()
        stage(quick, OLD, "y")
        assert quick.spaces() == {OLD.space_id: 2}, "the other's row is elsewhere"
        quick.release()
    finally:
        deposed.kill()


def test_nothing_is_called_published_that_the_standby_lacks(servers: Standbys, tmp_path: Path) -> None:
    with pytest.raises(Unreplicated, match=r"0 standbys .* 1 must"):
        writer(tmp_path).acquire("test")
    store = writer(tmp_path)
    store.replicas = 0
    with lease(store, "test"):
        stage(store, NEW, "x")
        store.replicas = 1
        for _ in range(2):  # the second finds that it serves already, and is told all the same
            with pytest.raises(Unreplicated):
                spaces.flip(store, Reader.open(tmp_path), NEW)


def test_with_synchronous_standby_names_no_commit_is_told_as_done_that_the_standby_lacks(
    servers: Standbys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL then waits itself, at every commit: a job needs LLMEMB_REPLICAS no more, and is told in time."""
    monkeypatch.setenv("LLMEMB_REPLICAS", "0")
    monkeypatch.setattr(PostgresStore, "LIMIT_S", 1.0)
    store = writer(tmp_path)
    store.acquire("test")
    with servers.running[servers.leader].administrator() as connection:
        connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute("SHOW synchronous_standby_names").fetchone() != ("*",):
            pass
    with pytest.raises(TooSlow):
        for number in range(100):  # its own process of the server may read the setting a moment later
            stage(store, NEW, f"late{number}")
    with pytest.raises(Fenced, match="connection broke"):
        stage(store, NEW, "later")
    assert servers.leads(servers.kill())
    assert writer(tmp_path).spaces() == {OLD.space_id: 1}
