"""What Feast's online stores lack: one writer at a time under a lease with a fencing token, deletes, and a list of keys.

Rows are written by Feast's own code and in its own format, so that every Feast reader reads them; here it only runs inside a
transaction that first checks the token. A writer that lost its lease, or slept through its end, can so change nothing.
Supported: SQLite (one machine) and Redis (a single node or Sentinel; a Redis Cluster has no transactions across its nodes).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import redis
from feast import FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3, compute_table_id
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore

from feature_repo.keys import key_prefix

Rows = list[tuple[Any, dict[str, Any], Any, None]]
"""Feast's rows: (entity key, values, event timestamp, created timestamp)."""
SCAN = 5_000
"""Keys listed at once."""


BROKEN = (redis.RedisError, sqlite3.Error)
"""What a store raises that is down, slow, full or locked."""


class NotPublished(Exception):
    """The store was left as it serves; the message says why and what to do."""


class Held(NotPublished):
    """Another writer holds the lease."""


class Fenced(NotPublished):
    """This writer's lease went to another one, or ended."""


class Store(Protocol):
    """A store that this process alone may write, between `acquire` and `release`."""

    def acquire(self, owner: str, wait_s: float = 0.0) -> int:
        """Takes the lease and returns its fencing token, higher than any before. Raises Held when it can't within `wait_s`."""

    def renew(self) -> None:
        """Keeps the lease while nothing is written. Raises Fenced when it is lost."""

    def release(self) -> None:
        """Gives the lease back."""

    def write(self, view: FeatureView, rows: Rows) -> None:
        """Writes rows of one view, all or none. Raises Fenced."""

    def delete(self, view: FeatureView, keys: Sequence[bytes]) -> None:
        """Removes one view's values of some serialized keys. Raises Fenced."""

    def keys(self, view: FeatureView, start: bytes = b"") -> Iterator[list[bytes]]:
        """Serialized keys of a view that begin with `start` (or its join keys), in bounded lists."""

    def notes(self) -> dict[str, str]:
        """What writers noted for later ones: since when a space does not serve."""

    def note(self, name: str, text: str | None) -> None:
        """Notes a text, or strikes it out. Raises Fenced."""


def open_writer(config: RepoConfig) -> Store:
    """The writer's side of the configured online store. Raises ValueError for a kind that can't be written safely."""
    online = config.online_store
    if online.type == "sqlite":
        return SqliteStore(config)
    if online.type == "redis" and getattr(online.redis_type, "value", online.redis_type) != "redis_cluster":
        return RedisStore(config)
    raise ValueError(f"online store {online.type!r} can't be written under a lease: use sqlite, or redis (single or Sentinel)")


def owned_by(owner: str) -> str:
    """Who holds a lease, for the message to whom it is refused."""
    return f"{owner} on {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"


@contextlib.contextmanager
def lease(store: Store, owner: str, wait_s: float = 0.0) -> Iterator[int]:
    """Holds the lease inside a `with` block; gives its token. Raises Held."""
    token = store.acquire(owner, wait_s)
    try:
        yield token
    finally:
        with contextlib.suppress(Fenced, *BROKEN):
            store.release()


def held(who: str) -> Held:
    """The refusal."""
    return Held(f"another writer holds the lease of the store ({who}): let it end, then run again")


def fenced(mine: int, now: object) -> Fenced:
    """The end of a writer that was overtaken."""
    return Fenced(
        f"this writer's lease (token {mine}) is lost (now {now}): another one took over, or the store was slow; run again"
    )


# ----------------------------------------------------------------------------------------------------------------- SQLite


class SqliteStore(SqliteOnlineStore):  # type: ignore[misc]
    """Feast's SQLite store with a lease: a file lock, which ends with its process, and a token in the same database."""

    WAIT_MS = 30_000
    """How long to wait for another connection's transaction."""

    def __init__(self, config: RepoConfig) -> None:
        super().__init__()
        self.config = config
        self.path = Path(self._get_db_path(config))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock: IO[str] | None = None
        self.token = 0
        self.connection = self._get_conn(config)
        # readers then never wait for the writer, nor it for them; kept in the file, so Feast's own connections follow
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute(f"PRAGMA busy_timeout={self.WAIT_MS}")

    def acquire(self, owner: str, wait_s: float = 0.0) -> int:
        """See `Store`."""
        lock = self.path.with_suffix(".lease").open("a+")
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    lock.seek(0)
                    raise held(lock.read() or "unknown") from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(owned_by(owner))
        lock.flush()
        self.lock = lock
        with self.connection as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS lease (one INTEGER PRIMARY KEY CHECK (one = 1), token INTEGER)")
            connection.execute("CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, text TEXT)")
            connection.execute("INSERT INTO lease VALUES (1, 1) ON CONFLICT DO UPDATE SET token = token + 1")
            self.token = connection.execute("SELECT token FROM lease").fetchone()[0]
        return self.token

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody can overtake: the token is checked under the database's write lock."""
        if self.lock is None:
            raise fenced(self.token, None)
        with self.connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            (now,) = connection.execute("SELECT token FROM lease").fetchone()
            if now != self.token:
                raise fenced(self.token, now)
            yield connection

    def renew(self) -> None:
        """See `Store`."""
        with self.transaction():
            pass

    def release(self) -> None:
        """See `Store`."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def write(self, view: FeatureView, rows: Rows) -> None:
        """See `Store`. Feast's own `with connection` ends the transaction that was begun here."""
        with self.transaction():
            self.online_write_batch(self.config, view, rows, None)

    def table(self, view: FeatureView) -> str:
        """The quoted name of a view's table."""
        return f'"{compute_table_id(self.config.project, view)}"'

    def delete(self, view: FeatureView, keys: Sequence[bytes]) -> None:
        """See `Store`."""
        with self.transaction() as connection:
            connection.executemany(f"DELETE FROM {self.table(view)} WHERE entity_key = ?", [(key,) for key in keys])

    def keys(self, view: FeatureView, start: bytes = b"") -> Iterator[list[bytes]]:
        """See `Store`."""
        start = start or key_prefix(view)
        query = f"SELECT DISTINCT entity_key FROM {self.table(view)} WHERE entity_key > ? ORDER BY entity_key LIMIT {SCAN}"
        last = start[:-1]
        while found := [key for (key,) in self.connection.execute(query, (last,))]:
            last = found[-1]
            yield [key for key in found if key.startswith(start)]
            if last > start and not last.startswith(start):
                return

    def notes(self) -> dict[str, str]:
        """See `Store`."""
        return dict(self.connection.execute("SELECT name, text FROM notes").fetchall())

    def note(self, name: str, text: str | None) -> None:
        """See `Store`."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM notes WHERE name = ?", (name,))
            if text is not None:
                connection.execute("INSERT INTO notes VALUES (?, ?)", (name, text))


# ------------------------------------------------------------------------------------------------------------------ Redis


class FencedClient:
    """A Redis client whose pipelines are transactions that fail when the lease is no longer this writer's."""

    def __init__(self, client: Any, key: str, token: int, ttl_ms: int) -> None:
        self.client, self.key, self.token, self.ttl_ms = client, key, token, ttl_ms

    def pipeline(self, transaction: bool = True) -> Any:
        """A transaction, begun: EXEC fails if the lease changes between this check and it."""
        pipe = self.client.pipeline(transaction=True)
        pipe.watch(self.key)
        now = pipe.get(self.key)
        if now is None or int(now.split(b" ", 1)[0]) != self.token:
            pipe.reset()
            raise fenced(self.token, None if now is None else int(now.split(b" ", 1)[0]))
        pipe.multi()
        pipe.pexpire(self.key, self.ttl_ms)
        return pipe


class RedisStore(RedisOnlineStore):  # type: ignore[misc]
    """Feast's Redis store with a lease: a key that expires, renewed by every write."""

    TTL_MS = 30_000

    def __init__(self, config: RepoConfig) -> None:
        super().__init__()
        # one round trip a batch, and a whole batch in one transaction; its order against others is the lease's business
        online = config.online_store.model_copy(update={"skip_dedup": True})
        self.config = RepoConfig(
            project=config.project,
            provider="local",
            registry=config.registry.model_dump(),
            online_store=online.model_dump(mode="json"),
            entity_key_serialization_version=3,
        )
        self.plain = super()._get_client(online)
        self.ttl_ms = int(os.environ.get("LLMEMB_LEASE_MS", self.TTL_MS))
        self.lease_key, self.token_key, self.notes_key = (f"{config.project}:{name}" for name in ("lease", "token", "notes"))
        self.fenced = FencedClient(self.plain, self.lease_key, 0, self.ttl_ms)

    def _get_client(self, online_store_config: Any) -> Any:
        return self.fenced

    def acquire(self, owner: str, wait_s: float = 0.0) -> int:
        """See `Store`."""
        deadline = time.monotonic() + wait_s
        token = int(self.plain.incr(self.token_key))
        while not self.plain.set(self.lease_key, f"{token} {owned_by(owner)}", nx=True, px=self.ttl_ms):
            if time.monotonic() >= deadline:
                raise held((self.plain.get(self.lease_key) or b" unknown").decode().partition(" ")[2])
            time.sleep(0.1)
            token = int(self.plain.incr(self.token_key))
        self.fenced = FencedClient(self.plain, self.lease_key, token, self.ttl_ms)
        return token

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Any]:
        """A pipeline that is executed at the end of the block, if the lease still holds."""
        with self.fenced.pipeline() as pipe:
            yield pipe
            self.execute(pipe)

    def execute(self, pipe: Any) -> None:
        """Runs a transaction. Raises Fenced where the lease changed meanwhile."""
        try:
            pipe.execute()
        except redis.WatchError as error:
            raise fenced(self.fenced.token, "another") from error

    def renew(self) -> None:
        """See `Store`."""
        with self.transaction():
            pass

    def release(self) -> None:
        """See `Store`."""
        with self.transaction() as pipe:
            pipe.delete(self.lease_key)

    def write(self, view: FeatureView, rows: Rows) -> None:
        """See `Store`."""
        try:
            self.online_write_batch(self.config, view, rows, None)
        except redis.WatchError as error:
            raise fenced(self.fenced.token, "another") from error

    def delete(self, view: FeatureView, keys: Sequence[bytes]) -> None:
        """See `Store`. Views with the same entity share a Redis hash: only this view's fields go."""
        fields = [_mmh3(f"{view.name}:{field.name}") for field in view.features]
        with self.transaction() as pipe:
            for key in keys:
                pipe.hdel(key + self.config.project.encode(), *fields, f"_ts:{view.name}")

    def keys(self, view: FeatureView, start: bytes = b"") -> Iterator[list[bytes]]:
        """See `Store`. Redis may list a key twice."""
        start, project = start or key_prefix(view), self.config.project.encode()
        escaped = b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^-" else bytes([byte]) for byte in start)
        cursor = 0
        while True:
            cursor, found = self.plain.scan(cursor, match=escaped + b"*" + project, count=SCAN)
            with self.plain.pipeline(transaction=False) as pipe:
                for key in found:
                    pipe.hexists(key, f"_ts:{view.name}")
                has = pipe.execute()
            yield [key.removesuffix(project) for key, there in zip(found, has, strict=True) if there]
            if not cursor:
                return

    def notes(self) -> dict[str, str]:
        """See `Store`."""
        return {name.decode(): text.decode() for name, text in self.plain.hgetall(self.notes_key).items()}

    def note(self, name: str, text: str | None) -> None:
        """See `Store`."""
        with self.transaction() as pipe:
            pipe.hdel(self.notes_key, name)
            if text is not None:
                pipe.hset(self.notes_key, name, text)
