"""A master that is lost: its lease is lost with it, whatever the promoted replica still knows; real servers under Sentinel."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo import spaces
from feature_repo.feature_definitions import item_embedding
from feature_repo.keys import key_texts
from feature_repo.reader import Reader, Space, settings
from feature_repo.stores import BROKEN, Fenced, Held, Unreplicated, lease, open_writer
from tests.feature_repo.sentinels import Failover, failover, free_port, redis_at, until

SPACE = Space(space_id="a" * 16, recommender_id="", ds="2026-01-01", width=2, codec="float16", items=2)


def rows(*ids: str) -> list[Any]:
    return spaces.embedding_rows(SPACE, list(ids), [bytes([1] * 4)] * len(ids))


def listed(lake: Path) -> set[str]:
    return {key_texts(item_embedding, key)[0] for keys in open_writer(settings(lake)).keys(item_embedding) for key in keys}


@pytest.fixture
def alone(redis_port: int, monkeypatch: pytest.MonkeyPatch) -> redis.Redis:
    """One server without replicas."""
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}))
    client = redis.Redis(port=redis_port)
    client.flushall()
    return client


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    with failover(tmp_path_factory.mktemp("sentinel")) as servers:
        yield servers


@pytest.fixture
def catalogue(servers: Failover, monkeypatch: pytest.MonkeyPatch) -> Failover:
    """All servers are up, and empty."""
    servers.mend()
    redis.Redis(port=servers.master).flushall()
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", servers.settings)
    return servers


def test_a_token_that_is_given_twice_lets_only_the_second_writer_write(alone: redis.Redis, tmp_path: Path) -> None:
    """What a promoted replica does that missed the first lease and the counter."""
    slow, quick = open_writer(settings(tmp_path)), open_writer(settings(tmp_path))
    first = slow.acquire("slow")
    alone.delete("llmemb:lease", "llmemb:token")
    assert quick.acquire("quick") == first
    for attempt in (lambda: slow.write(item_embedding, rows("late")), slow.renew, slow.release):
        with pytest.raises(Fenced, match="is lost"):
            attempt()  # type: ignore[no-untyped-call]
    quick.write(item_embedding, rows("x"))
    assert listed(tmp_path) == {"x"}
    quick.release()


def test_a_master_that_was_a_replica_meanwhile_is_not_the_one_that_gave_the_lease(
    alone: redis.Redis, redis_port: int, tmp_path: Path
) -> None:
    """A, then B, then A again: the same process, and the lease is there; a row that B never had is lost."""
    alone.config_set("repl-diskless-sync-delay", 0)
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--repl-diskless-sync-delay", "0"]
    with subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL) as process:
        other = redis_at(port)
        try:
            until(other.ping, "the second server answers")
            follow(other, redis_port)
            slow = open_writer(settings(tmp_path))
            slow.acquire("slow")
            slow.write(item_embedding, rows("kept"))
            caught_up(other, alone)
            other.replicaof("NO", "ONE")
            slow.write(item_embedding, rows("lost"))
            follow(alone, port)
            alone.replicaof("NO", "ONE")
            assert alone.get("llmemb:lease") == other.get("llmemb:lease") is not None
            for attempt in (lambda: slow.write(item_embedding, rows("late")), slow.renew, slow.release):
                with pytest.raises(Fenced, match="master changed while this writer held the lease"):
                    attempt()  # type: ignore[no-untyped-call]
            assert listed(tmp_path) == {"kept"}
        finally:
            alone.replicaof("NO", "ONE")
            process.terminate()


def follow(replica: redis.Redis, master: int) -> None:
    """Makes a server a replica that has all that its master has."""
    replica.replicaof("127.0.0.1", master)
    until(lambda: replica.info("replication")["master_link_status"] == "up", "the replica follows")


def caught_up(replica: redis.Redis, master: redis.Redis) -> None:
    """Waits until the replica has every write so far. WAIT would only wait for writes of the connection that asks."""
    written = master.info("replication")["master_repl_offset"]
    until(lambda: replica.info("replication")["slave_repl_offset"] >= written, "the replica has caught up")


def test_a_lease_of_an_older_version_is_respected(alone: redis.Redis, tmp_path: Path) -> None:
    alone.set("llmemb:lease", "7 publish on host, process 1, since 2026-01-01T00:00:00Z")
    with pytest.raises(Held, match=r"\(publish on host, process 1, since 2026-01-01T00:00:00Z\)"):
        open_writer(settings(tmp_path)).acquire("new")


def test_a_lease_that_no_replica_has_is_refused_and_given_back(
    alone: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEMB_REPLICAS", "1")
    monkeypatch.setenv("LLMEMB_REPLICAS_MS", "50")
    with pytest.raises(Unreplicated, match=r"0 replicas .* 1 must"):
        open_writer(settings(tmp_path)).acquire("test")
    assert alone.get("llmemb:lease") is None


def test_a_pointer_that_no_replica_has_is_told(catalogue: Failover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_REPLICAS", "2")
    monkeypatch.setenv("LLMEMB_REPLICAS_MS", "2000")  # on a busy machine a replica that is there takes a while too
    store, reader = open_writer(settings(tmp_path)), Reader.open(tmp_path)
    with lease(store, "test"):
        store.write(item_embedding, rows("x", "y"))
        lost = next(port for port in catalogue.ports if port != catalogue.master)
        catalogue.running[lost].kill()
        catalogue.running[lost].wait()
        store.settle_ms = 100  # nobody comes
        for _ in range(2):  # the second finds that it serves already, and is told all the same
            with pytest.raises(Unreplicated, match=r"1 replicas .* 2 must"):
                spaces.flip(store, reader, SPACE)
    catalogue.mend()
    store.settle_ms = 2000
    with lease(store, "test"):
        assert spaces.flip(store, reader, SPACE).sequence == 1


def test_a_writer_does_not_go_on_over_a_master_that_was_lost(catalogue: Failover, tmp_path: Path) -> None:
    slow = open_writer(settings(tmp_path))
    slow.acquire("slow")
    slow.write(item_embedding, rows("before"))
    slow.settle()
    held = redis.Redis(port=catalogue.master).get("llmemb:lease")
    assert redis.Redis(port=catalogue.kill()).get("llmemb:lease") == held  # the replica knows the lease, and it does not help
    for attempt in (lambda: slow.write(item_embedding, rows("late")), slow.renew):
        with pytest.raises((Fenced, *BROKEN)):
            attempt()  # type: ignore[no-untyped-call]
    with pytest.raises(Fenced, match=r"master changed while this writer held the lease \(token 1;"):
        slow.renew()
    assert listed(tmp_path) == {"before"}
