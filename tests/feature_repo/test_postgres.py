"""PostgreSQL: stopped, cut, hanging, killed, failed over, full, with odd settings: nothing half, nothing lost, told in time."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import random
import signal
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from feature_repo import feature_definitions, spaces
from feature_repo.feature_definitions import item_embedding
from feature_repo.postgres_reads import PostgresReads, TooSlow, connect
from feature_repo.reader import Reader, Space, open_store, settings
from feature_repo.stores import Fenced, Held, PostgresStore, Unreplicated, lease, open_writer
from feature_repo.transport import Sdk
from tests.feature_repo.postgresql import ACCOUNT, PASSWORD, Server, postgresql
from tests.feature_repo.sentinels import until

SPACE = Space(space_id="a" * 16, recommender_id="", ds="2026-01-01", width=2, codec="float16", items=2)
SQL = Path(__file__).parents[2] / "infra" / "postgres_accounts.sql"


def rows(*ids: str, space: str = "a" * 16) -> list[Any]:
    return spaces.embedding_rows(dataclasses.replace(SPACE, space_id=space), list(ids), [bytes([1] * 4)] * len(ids))


def apply(lake: Path) -> None:
    open_store(lake).apply(list(feature_definitions.define(str(lake / "offline"))))


def writer(lake: Path) -> PostgresStore:
    store = open_writer(settings(lake))
    assert isinstance(store, PostgresStore)
    return store


def serve(lake: Path, *ids: str) -> None:
    store = writer(lake)
    with lease(store, "test"):
        store.write(item_embedding, rows(*ids))
        spaces.flip(store, Reader.open(lake), SPACE)


@pytest.fixture
def lake(postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lake over an empty schema of the session's server."""
    for name in ("LLMEMB_REGISTRY", "LLMEMB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", postgres.online(f"lake_{uuid.uuid4().hex}"))
    apply(tmp_path)
    return tmp_path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of one test, which may be stopped and killed; the lake in `tmp_path` is on it."""
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    with postgresql() as server:
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", server.online("own"))
        apply(tmp_path)
        yield server


# --------------------------------------------------------------------------------------------------------------- writers


def test_a_writer_that_stopped_inside_a_transaction_is_ended_by_the_next(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the lease's row for as long as it sleeps; after the lease's end the server ends its connection."""
    monkeypatch.setenv("LLMEMB_LEASE_MS", "500")
    slow, quick = writer(lake), writer(lake)
    slow.acquire("slow")
    slow.write(item_embedding, rows("before"))
    with pytest.raises(Fenced, match="run again"), slow.transaction():
        slow.run("DELETE FROM {rows}")
        with pytest.raises(Held, match="slow on"):
            quick.acquire("quick")
        assert quick.acquire("quick", wait_s=20) > 1
        slow.run("SELECT 1")
    with pytest.raises(Fenced):
        slow.write(item_embedding, rows("late"))
    assert [key for keys in quick.keys(item_embedding) for key in keys] == quick.rows_of("before") != []
    quick.renew()


def test_a_process_that_is_stopped_amid_a_write_changes_nothing_once_another_one_wrote(
    lake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a machine that sleeps: the process is stopped by the system, not by itself."""
    monkeypatch.setenv("LLMEMB_LEASE_MS", "500")
    child = os.fork()
    if not child:
        try:
            store = writer(lake)
            store.acquire("slow")
            for number in range(10_000):
                store.write(item_embedding, rows(*(f"{number}-{row}" for row in range(50)), space="b" * 16))
        finally:
            os._exit(1)
    store = writer(lake)
    until(lambda: store.spaces().get("b" * 16), "the other process writes")
    os.kill(child, signal.SIGSTOP)
    with lease(store, "quick", 20):
        seen = store.spaces()
        store.write(item_embedding, rows("quick"))
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert store.spaces() == seen | {"a" * 16: 1}


def test_a_lease_ends_with_its_connection_though_the_server_is_up(postgres: Server, lake: Path) -> None:
    """Behind the same address there may be another server by now."""
    store = writer(lake)
    store.acquire("test")
    store.connection.close()
    with pytest.raises(Fenced, match="connection broke"):
        store.write(item_embedding, rows("x"))
    assert writer(lake).spaces() == {}


def test_a_lease_does_not_hold_over_another_connection(lake: Path) -> None:
    """A pooler gives each transaction a connection of its own choice, after a failover to another server too."""
    store = writer(lake)
    store.acquire("test")
    store.write(item_embedding, rows("x"))
    mine, store.kept = store.kept, connect(store.config.online_store, 5.0)
    with pytest.raises(Fenced, match="held over another connection: is a pooler between"):
        store.write(item_embedding, rows("y"))
    assert writer(lake).spaces() == {SPACE.space_id: 1}
    assert mine is not None
    mine.close()


@pytest.mark.parametrize("told", ["off", "remote_apply"])
def test_what_was_committed_is_on_disk_whatever_the_database_s_settings(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """And times are UTC's, though the database is elsewhere."""
    name = f"tokyo_{told}"
    with postgres.administrator() as connection:
        connection.execute(f"CREATE DATABASE {name}")
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'")
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = {told}")
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", postgres.online("x", database=name))
    apply(tmp_path)
    serve(tmp_path, "x")
    assert writer(tmp_path).run("SHOW synchronous_commit").fetchone() == ("on" if told == "off" else told)
    answer = Reader.open(tmp_path).vectors(["x"])
    assert answer.as_of == [dt.datetime(2026, 1, 2, tzinfo=dt.UTC)] == [answer.pointer.written]


def test_a_full_disk_refuses_the_write_whole(lake: Path) -> None:
    """A trigger says what PostgreSQL says where the disk is full."""
    store = writer(lake)
    with lease(store, "test"):
        store.write(item_embedding, rows("x"))
        store.run(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF new.entity_key > {key} THEN "
            "RAISE EXCEPTION 'could not extend file: No space left' USING ERRCODE = 'disk_full'; END IF; RETURN new; END$$",
            key=psycopg.sql.Literal(store.rows_of("x")[0]),
        )
        store.run("CREATE TRIGGER full_disk BEFORE INSERT ON {rows} FOR EACH ROW EXECUTE FUNCTION full_disk()")
        with pytest.raises(psycopg.errors.DiskFull, match="No space left"):
            store.write(item_embedding, rows("a", "y"))
        assert store.spaces() == {"a" * 16: 1}
        store.write(item_embedding, rows("a"))


def test_an_id_too_long_for_an_index_is_told_and_nothing_of_its_chunk_is_written(lake: Path) -> None:
    chance = random.Random(0)
    long = "".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(2_000))
    store = writer(lake)
    with lease(store, "test"):
        with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="index row"):
            store.write(item_embedding, rows("x", long))
        assert store.spaces() == {}


def test_no_question_of_a_writer_reads_the_keys_of_another_space(lake: Path) -> None:
    store = writer(lake)
    with lease(store, "test"):
        store.write(item_embedding, rows(*(f"i{number}" for number in range(3_000)), space="b" * 16))
        store.write(item_embedding, rows("x", "y"))

    def read() -> int:
        pid = store.connection.info.backend_pid
        store.connection.close()  # it tells what it did at the latest now
        until(lambda: store.run("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() == 0, "it is gone")
        query = "SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relid = %s::regclass"
        sequential = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relid = %s::regclass"
        name = [store.table(item_embedding).as_string()]
        return int(store.run(query, name).fetchone() or 0) + int(store.run(sequential, name).fetchone() or 0)

    store.run("DROP INDEX llmemb_item_embedding_space")  # as in a store that something else filled: the next writer makes it
    with lease(store, "test"):
        pass
    before = read()
    with lease(store, "test"):
        assert [sorted(ids) for ids in store.members("a" * 16)] == [["x", "y"]] and store.rows_of("x")
        spaces.forget(store, "x", "2026-01-01")
        assert spaces.remove_space(store, "a" * 16) == 1
    assert read() - before < 100
    assert store.spaces() == {"b" * 16: 3_000}


def test_a_table_in_parts_is_one_table_to_writers_and_readers(
    postgres: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/sizing.md makes it for a billion items, before the first publish."""
    schema = f"parts_{uuid.uuid4().hex}"
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", postgres.online(schema))
    text = (SQL.parents[1] / "docs" / "sizing.md").read_text()
    statements = text[text.index("CREATE TABLE") : text.index("```", text.index("CREATE TABLE"))]
    with postgres.administrator() as connection:
        connection.execute(f"CREATE SCHEMA {schema}")
        connection.execute(f"SET search_path = {schema}")
        connection.execute(statements)
    apply(tmp_path)
    serve(tmp_path, *(f"i{number}" for number in range(50)))
    store = writer(tmp_path)
    parts = "SELECT count(DISTINCT tableoid) FROM {rows}"
    assert store.run(parts).fetchone() > 8
    assert len(Reader.open(tmp_path).vectors([f"i{number}" for number in range(50)]).item_ids) == 50
    with lease(store, "test"):
        store.write(item_embedding, rows("i1", space="b" * 16))
        assert store.spaces() == {"a" * 16: 50, "b" * 16: 1} and len(store.rows_of("i1")) == 2
        assert spaces.forget(store, "i1", "2026-01-01") == 2
        assert spaces.remove_space(store, "a" * 16) == 49
    assert store.spaces() == {}


# ------------------------------------------------------------------------------------------------------------- time limits


def test_a_server_that_hangs_is_told_in_time_and_read_again_later(own: Server, tmp_path: Path) -> None:
    serve(tmp_path, "x")
    reader = Reader(Sdk(settings(tmp_path), limit_s=0.5))
    assert reader.vectors(["x"]).item_ids == ["x"]
    mine = int(reader.transport.store.own.connection.info.backend_pid)  # type: ignore[attr-defined]
    os.kill(mine, signal.SIGSTOP)
    with pytest.raises(TooSlow, match=r"no answer within 0\.5 s"):
        reader.vectors(["x"])
    os.kill(mine, signal.SIGCONT)
    assert reader.vectors(["x"]).item_ids == ["x"]


def test_a_server_that_is_slow_is_told_in_time_and_does_not_work_on(own: Server, tmp_path: Path) -> None:
    serve(tmp_path, "x")
    reader = Reader(Sdk(settings(tmp_path), limit_s=0.5))
    assert reader.vectors(["x"]).item_ids == ["x"]
    with own.administrator() as connection, connection.transaction():
        connection.execute("LOCK TABLE own.llmemb_item_embedding IN ACCESS EXCLUSIVE MODE")
        with pytest.raises((TooSlow, psycopg.errors.QueryCanceled)):
            reader.rows(SPACE, ["x"])
        waiting = "SELECT count(*) = 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        until(lambda: connection.execute(waiting).fetchone() == (True,), "nobody waits any more")
    assert reader.vectors(["x"]).item_ids == ["x"]


def test_a_writer_of_a_server_that_hangs_is_told(own: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PostgresStore, "LIMIT_S", 0.5)
    store = writer(tmp_path)
    store.acquire("test")
    os.kill(store.connection.info.backend_pid, signal.SIGSTOP)
    with pytest.raises(TooSlow):
        store.write(item_embedding, rows("x"))
    with pytest.raises(Fenced, match="connection broke"):
        store.write(item_embedding, rows("y"))


def test_what_the_server_says_while_it_is_at_work_is_passed_on(lake: Path) -> None:
    """psycopg sends the rows of a write without waiting for each: a full disk is told while others are under way."""

    def told() -> Iterator[Any]:
        raise psycopg.errors.DiskFull("the disk is full")
        yield

    connection = connect(settings(lake).online_store, 5)
    connection.pgconn.send_query(b"SELECT pg_sleep(0.1)")
    with pytest.raises(psycopg.errors.DiskFull):
        connection.wait(told())  # type: ignore[arg-type]
    assert not connection.closed
    connection.close()


def test_each_thread_reads_over_a_connection_of_its_own(lake: Path) -> None:
    serve(lake, "x")
    reader, seen = Reader.open(lake), set()

    def read() -> None:
        assert reader.vectors(["x"]).item_ids == ["x"]
        store: PostgresReads = reader.transport.store  # type: ignore[attr-defined]
        seen.add(store.own.connection.info.backend_pid)
        met.wait()

    met = threading.Barrier(3)
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 3


# --------------------------------------------------------------------------------------------------- servers that come back


def test_after_a_server_was_killed_all_that_was_told_as_written_is_there_and_readers_go_on(own: Server, tmp_path: Path) -> None:
    serve(tmp_path, "x")
    reader, store = Reader.open(tmp_path), writer(tmp_path)
    before = reader.pointer()
    store.acquire("test")
    store.write(item_embedding, rows("y"))
    own.stop("immediate")
    with pytest.raises(psycopg.OperationalError):
        reader.pointer()
    with pytest.raises(psycopg.OperationalError):
        store.write(item_embedding, rows("z"))
    own.start()
    assert reader.pointer() == before
    assert reader.vectors(["x", "y", "z"]).item_ids == ["x", "y"]
    with pytest.raises(Fenced):  # the lease is there still, but not its connection
        store.write(item_embedding, rows("z"))
    own.stop("fast")
    own.start()
    assert reader.vectors(["x"]).item_ids == ["x"], "a connection that a restart cut is opened again at once"


def test_a_standby_has_what_was_settled_serves_readers_and_takes_over(
    own: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEMB_REPLICAS", "1")
    monkeypatch.setenv("LLMEMB_REPLICAS_MS", "300")
    monkeypatch.setenv("LLMEMB_LEASE_MS", "1000")
    with pytest.raises(Unreplicated, match=r"0 standbys .* 1 must"):
        writer(tmp_path).acquire("test")
    monkeypatch.setenv("LLMEMB_REPLICAS_MS", "20000")
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        standby = Server(Path(folder), own.bin, follows=own)
        try:
            serve(tmp_path, "x")
            slow = writer(tmp_path)
            slow.acquire("slow")
            own_address = os.environ["LLMEMB_ONLINE_STORE"]
            monkeypatch.setenv("LLMEMB_ONLINE_STORE", standby.online("own"))
            until(lambda: Reader.open(tmp_path).pointer().sequence == 1, "the standby shows what it has")
            assert Reader.open(tmp_path).vectors(["x"]).item_ids == ["x"]
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                writer(tmp_path).acquire("test")
            own.stop("immediate")
            standby.call("pg_ctl", "promote", "--wait", "--pgdata", "data")
            monkeypatch.setenv("LLMEMB_REPLICAS", "0")
            with pytest.raises((Fenced, psycopg.OperationalError)):
                slow.write(item_embedding, rows("late"))
            with pytest.raises(Fenced):
                slow.write(item_embedding, rows("later"))
            store = writer(tmp_path)
            with lease(store, "test", 20):
                store.write(item_embedding, rows("y"))
                assert spaces.flip(store, Reader.open(tmp_path), SPACE).sequence == 1
            assert Reader.open(tmp_path).vectors(["x", "y", "late"]).item_ids == ["x", "y"]
            monkeypatch.setenv("LLMEMB_ONLINE_STORE", own_address)
        finally:
            standby.stop()
    own.start()


# ---------------------------------------------------------------------------------------------------------------- accounts


def test_a_subscriber_or_an_archive_that_follows_is_no_standby(own: Server, tmp_path: Path) -> None:
    with own.administrator() as connection:
        connection.execute("ALTER SYSTEM SET wal_level = logical")
    own.stop("fast")
    own.start()
    where = ["--dbname", f"host={own.folder} port={own.port} user={ACCOUNT} dbname={ACCOUNT}", "--status-interval=1"]
    followers = (
        ["pg_receivewal", *where, "--directory", str(tmp_path), "--synchronous"],
        ["pg_recvlogical", *where, "--slot=other", "--file=/dev/null", "--fsync-interval=1", "--start"],
    )
    with own.administrator() as connection, contextlib.ExitStack() as running:
        connection.execute("SELECT pg_create_logical_replication_slot('other', 'test_decoding')")
        for program, *arguments in followers:
            follower = running.enter_context(subprocess.Popen([str(own.bin / program), *arguments]))
            running.callback(follower.kill)
        store = writer(tmp_path)
        store.acquire("test")
        store.write(item_embedding, rows("x"))
        have = "SELECT count(*) FROM pg_stat_replication WHERE flush_lsn >= pg_current_wal_lsn()"
        until(lambda: connection.execute(have).fetchone() == (2,), "both have what was written")
        store.replicas, store.settle_ms = 1, 0
        with pytest.raises(Unreplicated, match="0 standbys of the online store"):
            store.settle()
        store.release()


def test_an_account_of_postgresql_does_its_work_and_no_more(own: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def grant() -> None:
        with own.administrator() as connection:
            connection.execute(SQL.read_text())
            for name in ("publisher", "reader", "srs"):
                connection.execute(f"ALTER ROLE {name} PASSWORD '{PASSWORD}'")

    def become(name: str) -> None:
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", own.online("llmemb", user=name))

    def push(lake: Path) -> None:
        import pandas as pd

        row = {"user_id": ["u"], "item_ids": [["x"]], "timestamps": [[1]], "event_timestamp": [pd.Timestamp.now("UTC")]}
        open_store(lake).push("user_history_push", pd.DataFrame(row))

    grant()
    become("publisher")
    apply(tmp_path)
    grant()
    serve(tmp_path, "x")
    for name in ("reader", "srs"):
        become(name)
        assert Reader.open(tmp_path).vectors(["x"]).item_ids == ["x"]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            writer(tmp_path).acquire("forged")
        with psycopg.connect(f"host=127.0.0.1 port={own.port} user={name} password={PASSWORD} dbname=postgres") as connection:
            for forged in (
                "UPDATE llmemb.llmemb_serving_pointer SET value = ''",
                "DELETE FROM llmemb.llmemb_item_embedding",
                "UPDATE llmemb.llmemb_lease SET nonce = 'mine'",
                "CREATE TABLE llmemb.more (one int)",
                "DELETE FROM llmemb.llmemb_user_history",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(forged)
                connection.rollback()
    push(tmp_path)
    become("reader")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        push(tmp_path)
