"""Who may write the online store: Feast's own stores, each with a lease (`leases.py`), and how one is opened.

Rows are written by Feast's own code and in its own format, so that every Feast reader reads them; here it only runs inside a
transaction that first checks the lease. A writer that lost it, or slept through its end, can so change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from feast import RepoConfig

from feature_repo.leases import BROKEN as BROKEN
from feature_repo.leases import Fenced as Fenced
from feature_repo.leases import Held as Held
from feature_repo.leases import NotPublished as NotPublished
from feature_repo.leases import Store as Store
from feature_repo.leases import Unreplicated as Unreplicated
from feature_repo.leases import lease as lease
from feature_repo.leases import locked_out as locked_out
from feature_repo.postgres_store import PostgresStore as PostgresStore
from feature_repo.redis_store import RedisStore as RedisStore
from feature_repo.sqlite_store import SqliteStore as SqliteStore


def open_writer(config: RepoConfig) -> Store:
    """The writer's side of the configured online store. Raises ValueError for a kind that can't be written safely."""
    online = config.online_store
    if online.type == "sqlite":
        return SqliteStore(config)
    if online.type == "redis" and getattr(online.redis_type, "value", online.redis_type) != "redis_cluster":
        return RedisStore(config)
    if online.type == "postgres":
        return PostgresStore(config)
    raise ValueError(
        f"online store {online.type!r} can't be written under a lease: use sqlite, redis (single or Sentinel) or postgres"
    )


@contextlib.contextmanager
def alone(config: RepoConfig, owner: str, wait_s: float) -> Iterator[None]:
    """For `feast apply`, which in PostgreSQL waits for writers inside a transaction, also for one that stopped there: it runs
    under the lease.

    Raises Held.
    """
    if config.online_store.type != "postgres":
        yield
        return
    with lease(open_writer(config), owner, wait_s):
        yield
