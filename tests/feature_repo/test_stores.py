"""Stores: one writer at a time, and a writer that was overtaken changes nothing."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo import spaces
from feature_repo.feature_definitions import item_attributes, item_embedding, item_tombstone
from feature_repo.keys import key_prefix, key_texts
from feature_repo.postgres_reads import TooSlow, connect
from feature_repo.reader import Reader, Space, open_store, settings
from feature_repo.stores import Fenced, Held, NotPublished, PostgresStore, RedisStore, SqliteStore, Store, lease, open_writer

SPACE = Space(space_id="a" * 16, recommender_id="", ds="2026-01-01", width=2, codec="float16", items=2)


def rows(*ids: str) -> list[Any]:
    return spaces.embedding_rows(SPACE, list(ids), [bytes([1] * 4)] * len(ids))


def listed(store: Store, start: bytes = b"") -> set[str]:
    return {key_texts(item_embedding, key)[0] for keys in store.keys(item_embedding, start) for key in keys}


def overtake(store: Any) -> None:
    """What happens to a writer that sleeps through the end of its lease: another one takes it, and is done."""
    if isinstance(store, SqliteStore):
        store.path.with_suffix(".lease").unlink()
    elif isinstance(store, PostgresStore):
        with connect(store.config.online_store, 0.5) as other:
            other.execute("UPDATE llmemb_lease SET ends = '-infinity'")
    else:
        store.plain.delete(store.lease_key)


def test_a_second_writer_is_told_who_holds_the_lease(lake: Path) -> None:
    first, second = open_writer(settings(lake)), open_writer(settings(lake))
    with lease(first, "publish"), pytest.raises(Held, match=r"publish on .*, process \d+, since 20"):
        second.acquire("rollback")
    assert second.acquire("rollback") > 1
    second.release()


def test_tokens_only_grow(lake: Path) -> None:
    tokens = []
    for _ in range(3):
        with lease(open_writer(settings(lake)), "test") as token:
            tokens.append(token)
    assert tokens == sorted(set(tokens))


def test_a_writer_that_was_overtaken_changes_nothing(lake: Path) -> None:
    slow, quick = open_writer(settings(lake)), open_writer(settings(lake))
    slow.acquire("slow")
    slow.write(item_embedding, rows("before"))
    overtake(slow)
    with lease(quick, "quick"):
        for attempt in (
            lambda: slow.write(item_embedding, rows("late")),
            lambda: slow.delete(item_embedding, [next(iter(slow.keys(item_embedding)))[0]]),
            lambda: slow.note("x", "y"),
            slow.renew,
        ):
            with pytest.raises(Fenced, match="run again"):
                attempt()  # type: ignore[no-untyped-call]
    with pytest.raises(Fenced):
        slow.write(item_embedding, rows("later still"))
    assert listed(quick) == {"before"}
    assert quick.notes() == {}


@pytest.mark.parametrize("what", ["write", "delete", "note", "renew", "release"])
def test_a_lease_lost_inside_a_transaction_undoes_it(lake: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """On Redis a writer may sleep between its check and EXEC; SQLite holds the database meanwhile, PostgreSQL the lease's row."""
    slow, quick = open_writer(settings(lake)), open_writer(settings(lake))
    slow.acquire("slow")
    slow.write(item_embedding, rows("before"))
    key = next(iter(slow.keys(item_embedding)))[0]
    if isinstance(slow, SqliteStore):
        with slow.transaction(), pytest.raises(sqlite3.OperationalError, match="locked"):
            sqlite3.connect(slow.path, timeout=0).execute("UPDATE lease SET token = token + 1")
        return
    if isinstance(slow, PostgresStore):
        with slow.transaction(), pytest.raises(TooSlow):
            overtake(slow)
        return
    begun = slow.fenced.pipeline  # type: ignore[attr-defined]

    def sleeping(transaction: bool = True) -> Any:
        pipe = begun(transaction)
        overtake(slow)
        quick.acquire("quick")
        return pipe

    monkeypatch.setattr(slow.fenced, "pipeline", sleeping)  # type: ignore[attr-defined]
    acts: dict[str, Callable[[], None]] = {
        "write": lambda: slow.write(item_embedding, rows("late")),
        "delete": lambda: slow.delete(item_embedding, [key]),
        "note": lambda: slow.note("x", "y"),
        "renew": slow.renew,
        "release": slow.release,
    }
    with pytest.raises(Fenced, match="run again"):
        acts[what]()
    assert listed(quick) == {"before"} and quick.notes() == {}
    quick.renew()  # its lease is whole
    quick.release()


def test_nothing_is_written_without_a_lease(lake: Path) -> None:
    store = open_writer(settings(lake))
    with pytest.raises(Fenced):
        store.write(item_embedding, rows("x"))
    with lease(store, "test"):
        store.write(item_embedding, rows("x"))
    with pytest.raises(Fenced):
        store.write(item_embedding, rows("y"))
    assert listed(store) == {"x"}


@pytest.mark.parametrize("odd", ["*", "?[a]", "\\", "a^-", "☃", "é" * 40, " ", "x" * 2_000])
def test_keys_are_listed_by_their_beginning_whatever_their_characters(lake: Path, odd: str) -> None:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        store.write(item_embedding, rows(odd, odd + "2", "other"))
        assert listed(store, key_prefix(item_embedding, odd)) == {odd}
        assert listed(store) == {odd, odd + "2", "other"}


class Killed(BaseException):
    """Stands for a kill."""


def test_killed_at_its_first_delete_a_forgotten_item_has_its_tombstone(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_writer(settings(lake))

    def dies(*_: Any) -> None:
        raise Killed

    with lease(store, "test"):
        store.write(item_embedding, rows("x", "y"))
        with monkeypatch.context() as patch:
            patch.setattr(store, "delete", dies)
            with pytest.raises(Killed):
                spaces.forget(store, "x", "2026-01-01")
        assert Reader.open(lake).forgotten(["x", "y"]) == {"x"}
        assert listed(store) == {"x", "y"}
        assert spaces.forget(store, "x", "2026-01-01") == 1
        assert listed(store) == {"y"}


def test_a_delete_leaves_other_views_of_the_same_item(lake: Path) -> None:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        spaces.bury(store, ["x"], "2026-01-01")
        item = {"item_id": "x", "attributes": [{"name": "title", "value": "X"}], "content_hash": "h"}
        assert spaces.write_attributes(store, Reader.open(lake), [item], "2026-01-01") == 1
        assert spaces.write_attributes(store, Reader.open(lake), [item], "2026-01-01") == 0
        keys = [key for keys in store.keys(item_tombstone) for key in keys]
        store.delete(item_attributes, keys)
    reader = Reader.open(lake)
    assert reader.forgotten(["x"]) == {"x"}
    assert reader.transport.read("item_attributes", {"item_id": ["x"]}, ["content_hash"])[0][1] == {}


def test_before_the_first_publish_no_item_has_a_row(lake: Path) -> None:
    open_store(lake).teardown()
    assert open_writer(settings(lake)).rows_of("m1") == []


def test_more_keys_than_one_page_are_all_listed(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sqlite_store", "redis_store", "postgres_store"):
        monkeypatch.setattr(f"feature_repo.{module}.SCAN", 7)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        store.write(item_embedding, rows(*(f"i{number}" for number in range(50))))
        assert len(listed(store)) == 50
        assert spaces.remove_space(store, SPACE.space_id) == 50
        assert listed(store) == set()


def test_a_lease_ends_by_itself_when_its_writer_is_gone(redis_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online = {"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps(online))
    monkeypatch.setenv("LLMEMB_LEASE_MS", "300")
    redis.Redis(port=redis_port).flushall()
    open_writer(settings(tmp_path)).acquire("dead")
    with pytest.raises(Held):
        open_writer(settings(tmp_path)).acquire("next")
    assert open_writer(settings(tmp_path)).acquire("next", wait_s=2) > 1


def test_a_store_that_is_down_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", '{"type": "redis", "connection_string": "127.0.0.1:1"}')
    monkeypatch.setattr("redis.retry.sleep", lambda seconds: None)  # between its retries
    with pytest.raises(redis.ConnectionError, match=r"127\.0\.0\.1:1"):
        open_writer(settings(tmp_path)).acquire("test")


def test_a_store_that_is_full_refuses_the_write_whole(redis_port: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}))
    server = redis.Redis(port=redis_port)
    server.flushall()
    store = open_writer(settings(tmp_path))
    with lease(store, "test"):
        store.write(item_embedding, rows("x"))
        server.config_set("maxmemory", "1")
        try:
            with pytest.raises(redis.RedisError, match=r"OOM|maxmemory"):
                store.write(item_embedding, rows(*(f"y{number}" for number in range(100))))
            assert listed(store) == {"x"}
        finally:
            server.config_set("maxmemory", "0")


def test_a_redis_cluster_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", '{"type": "redis", "redis_type": "redis_cluster", "connection_string": "x:1"}')
    with pytest.raises(ValueError, match="can't be written under a lease"):
        open_writer(settings(tmp_path))


def test_stores_are_feasts_own(lake: Path) -> None:
    assert isinstance(open_writer(settings(lake)), SqliteStore | RedisStore | PostgresStore)


def test_spaces_and_their_items_are_listed_and_an_item_is_found_in_all_of_them(lake: Path) -> None:
    store, other = open_writer(settings(lake)), replace(SPACE, space_id="b" * 16)
    with lease(store, "test"):
        store.write(item_embedding, rows("x", "y", "☃"))
        store.write(item_embedding, spaces.embedding_rows(other, ["x"], [bytes(4)]))
        assert store.spaces() == {"a" * 16: 3, "b" * 16: 1}
        assert {item_id for ids in store.members("a" * 16) for item_id in ids} == {"x", "y", "☃"}
        assert len(store.rows_of("x")) == 2 and store.rows_of("z") == []
        assert spaces.forget(store, "x", "2026-01-01") == 2
        assert store.spaces() == {"a" * 16: 2} and store.rows_of("x") == []
        assert spaces.remove_space(store, "a" * 16) == 2
        assert store.spaces() == {}


@pytest.fixture
def server(redis_port: int, monkeypatch: pytest.MonkeyPatch) -> redis.Redis:
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}))
    client = redis.Redis(port=redis_port)
    client.flushall()
    return client


def test_no_question_of_a_writer_reads_all_keys(server: redis.Redis, tmp_path: Path) -> None:
    store = open_writer(settings(tmp_path))
    with lease(store, "test"):
        store.write(item_embedding, rows("x", "y"))
        server.config_resetstat()
        assert store.spaces() and list(store.members("a" * 16)) and store.rows_of("x")
        spaces.forget(store, "x", "2026-01-01")
        spaces.remove_space(store, "a" * 16)
    assert not {"cmdstat_scan", "cmdstat_keys"} & set(server.info("commandstats"))


def test_a_store_of_an_older_version_is_listed_once_and_told_rightly_before(server: redis.Redis, tmp_path: Path) -> None:
    store = open_writer(settings(tmp_path))
    with lease(store, "test"):
        store.write(item_embedding, rows("x", "y"))
    for key in server.scan_iter("llmemb:space*"):  # what an older version does not write
        server.delete(key)
    assert (store.spaces(), len(store.rows_of("x"))) == ({"a" * 16: 2}, 1)
    assert {item_id for ids in store.members("a" * 16) for item_id in ids} == {"x", "y"}
    server.config_resetstat()
    for _ in range(2):
        with lease(store, "test"):
            assert store.spaces() == {"a" * 16: 2} and len(store.rows_of("x")) == 1
    assert server.info("commandstats")["cmdstat_scan"]["calls"] <= 2  # one pass


def test_free_memory_is_that_of_the_limit(server: redis.Redis, tmp_path: Path) -> None:
    store = open_writer(settings(tmp_path))
    used = server.info("memory")["used_memory"]
    server.config_set("maxmemory", used + 50_000_000)
    try:
        assert store.free_bytes() == pytest.approx(50_000_000, abs=5_000_000)
    finally:
        server.config_set("maxmemory", 0)
    assert (store.free_bytes() or 0) > 0


@pytest.mark.parametrize(
    ("most", "policy", "refused"),
    [
        ("1gb", "noeviction", False),
        ("1gb", "volatile-lru", False),  # rows have no end
        ("1gb", "allkeys-lru", True),
        ("1gb", "allkeys-random", True),
        ("0", "allkeys-lru", False),  # without a limit nothing is dropped
    ],
)
def test_a_redis_that_drops_rows_once_it_is_full_is_refused(
    server: redis.Redis, tmp_path: Path, most: str, policy: str, refused: bool
) -> None:
    store = open_writer(settings(tmp_path))
    server.config_set("maxmemory", most)
    server.config_set("maxmemory-policy", policy)
    try:
        with pytest.raises(NotPublished, match=f"policy {policy}.*noeviction") if refused else contextlib.nullcontext():
            assert (store.free_bytes() or 0) > 0
    finally:
        server.config_set("maxmemory", 0)
        server.config_set("maxmemory-policy", "noeviction")
