"""Feast's PostgreSQL store with a lease: a row that each transaction locks and compares before it writes anything.

Rows lie on disk, so memory is no bound on their number. Whoever writes holds the lease's row until the commit: nobody takes the
lease over in between, and a writer that was overtaken writes nothing. What was committed is on disk; `settle` waits for standbys.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
from feast import FeatureView, RepoConfig
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.postgres_online_store.postgres import PostgreSQLOnlineStore
from psycopg import sql
from psycopg.rows import scalar_row

from feature_repo import feature_definitions as views  # not its parts: `feast apply` would find them twice
from feature_repo.keys import key_prefix, key_texts, pages
from feature_repo.leases import SCAN, Fenced, Rows, Unreplicated, fenced, held, owned_by
from feature_repo.postgres_reads import Connection, connect

TABLES = """
CREATE TABLE IF NOT EXISTS {lease} (one int PRIMARY KEY CHECK (one = 1), token bigint NOT NULL, nonce text NOT NULL,
  owner text NOT NULL, ends timestamptz NOT NULL, pid int NOT NULL, started timestamptz NOT NULL);
CREATE TABLE IF NOT EXISTS {notes} (name text PRIMARY KEY, text text NOT NULL)
"""
TAKE = """
INSERT INTO {lease} AS held
SELECT 1, 1, %(nonce)s, %(owner)s, clock_timestamp() + %(ttl)s * interval '1 ms', pid, backend_start
FROM pg_stat_activity WHERE pid = pg_backend_pid()
ON CONFLICT (one) DO UPDATE SET token = held.token + 1, nonce = excluded.nonce, owner = excluded.owner, ends = excluded.ends,
  pid = excluded.pid, started = excluded.started
WHERE held.ends < clock_timestamp() RETURNING token
"""
RENEW = """
UPDATE {lease} SET ends = clock_timestamp() + %(ttl)s * interval '1 ms' WHERE nonce = %(nonce)s AND ends >= clock_timestamp()
  AND (pid, started) = (SELECT pid, backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid())
"""
LOST = """
SELECT CASE WHEN nonce = %(nonce)s AND ends >= clock_timestamp() THEN 'held over another connection: is a pooler between?'
  ELSE token::text END FROM {lease}
"""
# who may be promoted; a subscriber or an archive that follows has the writes too, and never takes over
STANDBYS = """
SELECT count(*) FROM pg_stat_replication standby WHERE flush_lsn >= %s::pg_lsn
  AND application_name NOT IN ('pg_receivewal', 'pg_basebackup')
  AND NOT EXISTS (SELECT FROM pg_replication_slots WHERE active_pid = standby.pid AND slot_type = 'logical')
"""
EVICT = """
SELECT pg_terminate_backend(writer.pid) FROM pg_stat_activity writer
JOIN {lease} held ON writer.pid = held.pid AND writer.backend_start = held.started
WHERE held.ends < clock_timestamp() AND writer.pid <> pg_backend_pid()
"""
# what was told as committed must outlive a crash, whatever the server's setting; a stricter one stays
DURABLE = """
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') IN ('off', 'local')
"""
# item_embedding by space: with it no question reads the keys of all spaces. The space's id is the last text of a key
SPACE = "substr(entity_key, {fixed} + get_byte(entity_key, {size}) + 256 * get_byte(entity_key, {size} + 1))"


class PostgresStore(PostgreSQLOnlineStore):  # type: ignore[misc]
    """Feast's PostgreSQL store with a lease: a row with an end, renewed by every write, and bound to one connection."""

    TTL_MS = 30_000
    LIMIT_S = 30.0
    """Seconds an answer may take."""
    SETTLE_MS = 10_000
    """How long standbys get to have what was written on their disks; LLMEMB_REPLICAS_MS."""

    def __init__(self, config: RepoConfig) -> None:
        super().__init__()
        self.config = config
        self.ttl_ms = int(os.environ.get("LLMEMB_LEASE_MS", self.TTL_MS))
        self.replicas = int(os.environ.get("LLMEMB_REPLICAS", 0))
        self.settle_ms = int(os.environ.get("LLMEMB_REPLICAS_MS", self.SETTLE_MS))
        self.token, self.nonce = 0, ""
        self.kept: Connection | None = None
        start = len(key_prefix(views.item_embedding))
        schema = config.online_store.db_schema or config.online_store.user
        self.names: dict[str, sql.Composable] = {
            "schema": sql.Identifier(schema),
            "lease": sql.Identifier(schema, f"{config.project}_lease"),
            "notes": sql.Identifier(schema, f"{config.project}_notes"),
            "rows": self.table(views.item_embedding),
            "space": sql.SQL(SPACE.format(fixed=start + 17, size=start + 4)),
        }

    # ------------------------------------------------------------------------------------------------------------ connection

    @property
    def connection(self) -> Connection:
        """The connection. One that broke takes the lease with it, and is opened again only where none was held."""
        if self.kept is None or self.kept.closed:
            if self.nonce:
                raise fenced(self.token, "not known: the connection broke")
            keepalives = {"tcp_keepalives_idle": 10, "tcp_keepalives_interval": 5, "tcp_keepalives_count": 3}
            self.kept = connect(self.config.online_store, self.LIMIT_S, application_name="llmemb-writer", **keepalives)
            self.kept.execute(DURABLE)
        return self.kept

    @contextlib.contextmanager
    def _get_conn(self, config: RepoConfig, autocommit: bool = False) -> Iterator[Connection]:
        """For Feast's own writes: they run in the transaction that `transaction` began."""
        yield self.connection

    def run(self, query: str, parameters: Any = None, **names: sql.Composable) -> psycopg.Cursor[Any]:
        """Executes a statement in which tables stand by their names; its rows are single values."""
        cursor = self.connection.cursor(row_factory=scalar_row)
        return cursor.execute(sql.SQL(query).format(**self.names, **names), parameters)

    def table(self, view: FeatureView) -> sql.Identifier:
        """The quoted name of a view's table."""
        return sql.Identifier(compute_table_id(self.config.project, view))

    # ----------------------------------------------------------------------------------------------------------------- lease

    def acquire(self, owner: str, wait_s: float = 0.0) -> int:
        """See `Store`."""
        self.nonce = ""
        self.prepare()
        deadline, nonce = time.monotonic() + wait_s, uuid.uuid4().hex
        while (token := self.take(owned_by(owner), nonce)) is None:
            if time.monotonic() >= deadline:
                raise held(self.run("SELECT owner FROM {lease}").fetchone() or "unknown")
            time.sleep(0.1)
        self.token, self.nonce = token, nonce
        try:
            self.settle()
            self.index()
        except BaseException:
            with contextlib.suppress(Fenced, psycopg.Error):
                self.release()
            raise
        return token

    def prepare(self) -> None:
        """Makes the tables of lease and notes where they are not there yet; two writers wait for each other."""
        if self.run("SELECT to_regclass(%s)", [self.names["notes"].as_string()]).fetchone() is None:
            with self.connection.transaction():
                self.run("SELECT pg_advisory_xact_lock(%s)", [zlib.crc32(self.config.project.encode())])
                if self.run("SELECT to_regnamespace(%s)", [self.names["schema"].as_string()]).fetchone() is None:
                    self.run("CREATE SCHEMA {schema}")  # as Feast does
                self.run(TABLES)

    def take(self, owner: str, nonce: str) -> int | None:
        """The token, if the lease is free.

        A writer that stopped inside a transaction still holds the row after its end: the server then ends its connection.
        """
        try:
            with self.connection.transaction():
                self.connection.execute("SET LOCAL lock_timeout = 100")
                token: int | None = self.run(TAKE, {"nonce": nonce, "owner": owner, "ttl": self.ttl_ms}).fetchone()
                return token
        except psycopg.errors.LockNotAvailable:
            self.run(EVICT)
            return None

    def index(self) -> None:
        """Indexes the rows by space: at once where Feast has just made the table, once where it is full already."""
        name = f"{compute_table_id(self.config.project, views.item_embedding)}_space"
        there = "SELECT to_regclass(%s) IS NULL AND to_regclass(%s) IS NOT NULL"
        if self.run(there, [f'"{name}"', self.table(views.item_embedding).as_string()]).fetchone():
            with self.transaction(), self.patient():
                self.run("CREATE INDEX {index} ON {rows} (({space}), entity_key)", index=sql.Identifier(name))

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Waits without a limit for what may take minutes where there are many rows."""
        connection = self.connection
        connection.limit_s = None
        try:
            yield
        finally:
            connection.limit_s = self.LIMIT_S

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that nobody can overtake: the lease is compared, and its row locked until the commit."""
        if not self.nonce:
            raise fenced(self.token, None)
        try:
            connection = self.connection
            connection.execute("BEGIN")
            if not self.run(RENEW, {"ttl": self.ttl_ms, "nonce": self.nonce}).rowcount:
                raise fenced(self.token, self.run(LOST, {"nonce": self.nonce}).fetchone())
            yield
            connection.commit()  # Feast's own may have been before
        except BaseException as error:
            if self.kept is not None and not self.kept.closed:
                with contextlib.suppress(psycopg.Error):
                    self.kept.rollback()
            if isinstance(error, psycopg.OperationalError) and "administrator command" in str(error):
                self.nonce = ""
                raise fenced(self.token, "another: the server ended this writer's connection") from error
            if isinstance(error, Fenced):
                self.nonce = ""
            raise

    def renew(self) -> None:
        """See `Store`."""
        with self.transaction():
            pass

    def release(self) -> None:
        """See `Store`."""
        with self.transaction():
            self.run("UPDATE {lease} SET ends = '-infinity', nonce = ''")
        self.nonce = ""
        self.connection.close()  # whoever asks something later opens another one

    def settle(self) -> None:
        """See `Store`. A commit is on this server's disk; LLMEMB_REPLICAS standbys must have it on theirs."""
        if not self.replicas:
            return
        written, deadline = self.run("SELECT pg_current_wal_lsn()").fetchone(), time.monotonic() + self.settle_ms / 1000
        while (count := int(self.run(STANDBYS, [written]).fetchone() or 0)) < self.replicas:
            if time.monotonic() >= deadline:
                raise Unreplicated(
                    f"{count} standbys of the online store have what was written, {self.replicas} must (LLMEMB_REPLICAS): a "
                    "failover could undo it. Are they up, and may this account look (GRANT pg_read_all_stats)? Run again later"
                )
            time.sleep(0.02)
        self.renew()

    # ------------------------------------------------------------------------------------------------------------------ rows

    def write(self, view: FeatureView, rows: Rows) -> None:
        """See `Store`. Feast's own commit ends the transaction that was begun here."""
        with self.transaction():
            self.online_write_batch(self.config, view, rows, None)

    def delete(self, view: FeatureView, keys: Sequence[bytes]) -> None:
        """See `Store`. A view that has no table yet has nothing to remove."""
        with contextlib.suppress(psycopg.errors.UndefinedTable), self.transaction():
            self.run("DELETE FROM {view} WHERE entity_key = ANY(%s)", [list(keys)], view=self.table(view))

    def keys(self, view: FeatureView, start: bytes = b"") -> Iterator[list[bytes]]:
        """See `Store`. A view that has no table yet has no keys."""
        start = start or key_prefix(view)
        stop = start[:-1] + bytes([start[-1] + 1])  # a text's last byte is never 255
        query = "SELECT DISTINCT entity_key FROM {view} WHERE entity_key > %s AND entity_key < %s ORDER BY entity_key LIMIT %s"
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            yield from pages(lambda last: self.run(query, [last, stop, SCAN], view=self.table(view)).fetchall(), start)

    def spaces(self) -> dict[str, int]:
        """See `Store`. One step a space; to count its rows the server reads their part of the index."""
        counts: dict[str, int] = {}
        following = "SELECT {space} FROM {rows} WHERE {space} > %s ORDER BY {space} LIMIT 1"
        count = "SELECT count(*) FROM (SELECT DISTINCT entity_key FROM {rows} WHERE {space} = %s) AS found"
        last = b""
        with self.patient():
            while (found := self.run(following, [last]).fetchone()) is not None:
                last = bytes(found)
                counts[last.decode()] = self.run(count, [last]).fetchone() or 0
        return counts

    def members(self, space_id: str) -> Iterator[list[str]]:
        """See `Store`."""
        query = "SELECT DISTINCT entity_key FROM {rows} WHERE {space} = %s AND entity_key > %s ORDER BY entity_key LIMIT %s"
        last = b""
        while found := self.run(query, [space_id.encode(), last, SCAN]).fetchall():
            last = found[-1]
            yield [key_texts(views.item_embedding, key)[0] for key in found]

    def rows_of(self, item_id: str) -> list[bytes]:
        """See `Store`."""
        return [key for keys in self.keys(views.item_embedding, key_prefix(views.item_embedding, item_id)) for key in keys]

    def free_bytes(self) -> int | None:
        """See `Store`. PostgreSQL does not say how much room its disk has."""
        return None

    def notes(self) -> dict[str, str]:
        """See `Store`."""
        return dict(self.connection.execute(sql.SQL("SELECT name, text FROM {notes}").format(**self.names)).fetchall())

    def note(self, name: str, text: str | None) -> None:
        """See `Store`."""
        with self.transaction():
            self.run("DELETE FROM {notes} WHERE name = %s", [name])
            if text is not None:
                self.run("INSERT INTO {notes} VALUES (%s, %s)", [name, text])
