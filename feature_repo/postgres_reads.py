"""Reads of Feast's PostgreSQL store: they end in time, and go on by themselves once a server that was away is back.

Feast keeps one connection for ever, also a broken one, and waits for its server without end.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import psycopg
from feast import FeatureView, RepoConfig
from feast.infra.online_stores.postgres_online_store.postgres import PostgreSQLOnlineStore
from feast.infra.utils.postgres.connection_utils import _get_conn_kwargs, _get_conninfo
from psycopg.abc import PQGen

T = TypeVar("T")
CONNECT_S = 5
"""Seconds that a connection may take to open; 2 where answers are wanted sooner, the least that there is."""


class TooSlow(psycopg.OperationalError):
    """The server did not answer in time."""


class Connection(psycopg.Connection[Any]):
    """A connection that is closed where its server does not answer in time: also one that hangs, or that the network lost."""

    limit_s: float | None = None
    """Seconds an answer may take; None waits as long as the network stands."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """See psycopg. Raises TooSlow."""
        began = time.monotonic()
        try:
            return super().wait(gen, interval, self.limit_s if timeout is None else timeout)
        except psycopg.OperationalError as error:
            if self.limit_s is None or time.monotonic() - began < self.limit_s:
                raise  # the server said it, or is gone
            self.close()  # what it waits for may still come, and would be taken for another answer
            raise TooSlow(f"PostgreSQL gave no answer within {self.limit_s} s: is it slow, or hanging?") from error


def connect(online: Any, limit_s: float, **options: object) -> Connection:
    """A connection to the store that Feast's settings name, as Feast opens it, without implicit transactions.

    Every question is by key, so plans that read a whole table are ruled out: a table that was filled a moment ago has no
    statistics yet. Raises psycopg.OperationalError.
    """
    arguments = _get_conn_kwargs(online)
    # Feast writes times of UTC without saying so
    told = {"TimeZone": "UTC", "enable_seqscan": "off", "jit": "off", **options}
    arguments["options"] += "".join(f" -c {name}={value}" for name, value in told.items())
    connection = Connection.connect(
        _get_conninfo(online),
        autocommit=True,
        connect_timeout=max(2, min(CONNECT_S, int(limit_s))),
        keepalives_idle=online.keepalives_idle or 10,
        keepalives_interval=5,
        keepalives_count=3,
        **arguments,
    )
    connection.limit_s = limit_s
    return connection


class PostgresReads(PostgreSQLOnlineStore):  # type: ignore[misc]
    """Feast's reads over a connection for each thread."""

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self.limit_s = limit_s
        self.own = threading.local()

    @contextlib.contextmanager
    def _get_conn(self, config: RepoConfig, autocommit: bool = False) -> Iterator[Connection]:
        """This thread's connection; one that broke is opened again."""
        connection: Connection | None = getattr(self.own, "connection", None)
        if connection is None or connection.closed:
            # the server gives up a little earlier, so that no question goes on which nobody waits for
            most_ms = max(1, int(self.limit_s * 900))
            connection = self.own.connection = connect(config.online_store, self.limit_s, statement_timeout=most_ms)
        yield connection

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[Any],
        requested_features: list[str] | None = None,
    ) -> Sequence[Any]:
        """See Feast. A connection that the server cut meanwhile, as when it starts anew, is opened again, once."""
        kept: Connection | None = getattr(self.own, "connection", None)
        was_open = kept is not None and not kept.closed
        try:
            return super().online_read(config, table, entity_keys, requested_features)  # type: ignore[no-any-return]
        except (TooSlow, psycopg.errors.QueryCanceled):
            raise
        except psycopg.OperationalError:
            if not was_open:
                raise
            return super().online_read(config, table, entity_keys, requested_features)  # type: ignore[no-any-return]
