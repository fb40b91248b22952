"""Feast's SQLite store with a lease: one machine."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from feast import FeatureView, RepoConfig
from feast.infra.online_stores.helpers import compute_table_id
from feast.infra.online_stores.sqlite import SqliteOnlineStore

from feature_repo import feature_definitions as views  # not its parts: `feast apply` would find them twice
from feature_repo.keys import key_prefix, key_texts, pages
from feature_repo.leases import SCAN, Rows, fenced, held, owned_by


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

    def settle(self) -> None:
        """See `Store`. Every commit is in the file already."""

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
        """See `Store`. A view that has no table yet has no keys."""
        name = compute_table_id(self.config.project, view)
        if not self.connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone():
            return
        query = f"SELECT DISTINCT entity_key FROM {self.table(view)} WHERE entity_key > ? ORDER BY entity_key LIMIT {SCAN}"
        yield from pages(lambda last: [key for (key,) in self.connection.execute(query, (last,))], start or key_prefix(view))

    def spaces(self) -> dict[str, int]:
        """See `Store`. Reads all keys: one machine has few."""
        counts: dict[str, int] = {}
        for keys in self.keys(views.item_embedding):
            for key in keys:
                space_id = key_texts(views.item_embedding, key)[1]
                counts[space_id] = counts.get(space_id, 0) + 1
        return counts

    def members(self, space_id: str) -> Iterator[list[str]]:
        """See `Store`."""
        for keys in self.keys(views.item_embedding):
            found = [key_texts(views.item_embedding, key) for key in keys]
            yield [item_id for item_id, own in found if own == space_id]

    def rows_of(self, item_id: str) -> list[bytes]:
        """See `Store`."""
        return [key for keys in self.keys(views.item_embedding, key_prefix(views.item_embedding, item_id)) for key in keys]

    def free_bytes(self) -> int | None:
        """See `Store`."""
        return shutil.disk_usage(self.path.parent).free

    def notes(self) -> dict[str, str]:
        """See `Store`."""
        return dict(self.connection.execute("SELECT name, text FROM notes").fetchall())

    def note(self, name: str, text: str | None) -> None:
        """See `Store`."""
        with self.transaction() as connection:
            connection.execute("DELETE FROM notes WHERE name = ?", (name,))
            if text is not None:
                connection.execute("INSERT INTO notes VALUES (?, ?)", (name, text))
