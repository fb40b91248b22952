"""How rows of a feature view are fetched: from Feast's online store in this process, or through Feast's feature server."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import http.client
import json
import os
import sqlite3
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Row = tuple[dt.datetime | None, dict[str, Any]]
"""Event timestamp and the values that are there; vectors as raw little-endian bytes."""


class NothingServed(LookupError):
    """No space was published yet in this store."""


class Transport(Protocol):
    """How rows of a feature view are fetched."""

    def read(self, view: str, keys: Mapping[str, Sequence[str]], fields: Sequence[str]) -> list[Row]:
        """One row for each key, in order; a row without values where the key is absent."""


class Sdk:
    """Feast's online store, in-process."""

    def __init__(self, config: Any, tries: int | None = None, limit_s: float = 30.0) -> None:
        """With `tries`, a failed read of Redis is tried so often again, at once; else as redis-py does, over seconds.

        `limit_s` bounds a read of PostgreSQL; that of Redis stands in its connection string.
        """
        from feast.infra.online_stores.helpers import get_online_store_from_config

        from feature_repo import feature_definitions

        self.config = config
        self.views = feature_definitions
        self.process = os.getpid()
        self.no_table: tuple[type[Exception], ...] = (sqlite3.OperationalError,)
        if config.online_store.type == "postgres":
            from psycopg.errors import UndefinedTable

            from feature_repo.postgres_reads import PostgresReads

            self.store, self.no_table = PostgresReads(limit_s), (UndefinedTable,)
        else:
            self.store = get_online_store_from_config(config.online_store)
        if tries is not None and config.online_store.type == "redis":
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            self.store._get_client(config.online_store).set_retry(Retry(NoBackoff(), tries))

    def read(self, view: str, keys: Mapping[str, Sequence[str]], fields: Sequence[str]) -> list[Row]:
        """See `Transport`. Straight from the online store: `get_online_features` builds the same answer three times over.

        Raises RuntimeError in a process that was forked from the one that made this, unless the store is Redis.
        """
        if self.process != os.getpid() and self.config.online_store.type != "redis":
            # SQLite would believe that it holds locks, and read what is old; of PostgreSQL two processes would share one answer
            raise RuntimeError("a connection does not go through a fork: open the reader in the process that reads")
        try:
            rows = self.store.online_read(self.config, getattr(self.views, view), entity_keys(keys), list(fields))
        except self.no_table as error:
            if isinstance(error, sqlite3.Error) and "no such table" not in str(error):
                raise
            raise NothingServed("nothing was published into this store yet: run `python -m jobs publish`") from error
        return [(moment, natives(values)) for moment, values in rows]


def entity_keys(keys: Mapping[str, Sequence[str]]) -> list[Any]:
    """Feast's entity keys, from one list of texts for each join key."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    names = list(keys)
    columns = zip(*keys.values(), strict=True)
    return [EntityKey(join_keys=names, entity_values=[Value(string_val=text) for text in texts]) for texts in columns]


def natives(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Feast's values as Python's; what is absent (Redis: a value that says nothing) is left out."""
    found: dict[str, Any] = {}
    for name, value in (values or {}).items():
        kind = value.WhichOneof("val")
        if kind == "float_list_val":
            found[name] = packed_floats(value.SerializeToString())
        elif kind is not None:
            native = getattr(value, kind)
            found[name] = list(native.val) if kind.endswith("_list_val") else native
    return found


def packed_floats(message: bytes) -> bytes:
    """The numbers of a Value that holds a float list, as they stand in its protobuf message: tag, size, tag, size, numbers.

    Fifty times faster than through Python floats, and exact.
    """
    at = 2 + varint_size(message, 2)
    return message[at + 1 + varint_size(message, at + 1) :] if len(message) > at else b""


def varint_size(message: bytes, start: int) -> int:
    """Bytes of the variable-length number at `start`."""
    end = start
    while message[end] & 0x80:
        end += 1
    return end - start + 1


class Http:
    """Feast's feature server (`feast serve`)."""

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        """Raises ValueError, which doesn't repeat it, for an address that can be none; a user in it would reach no server."""
        if not possible(url):
            raise ValueError("the feature server's address is not http(s)://HOST[:PORT], without a user and a password")
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s

    def read(self, view: str, keys: Mapping[str, Sequence[str]], fields: Sequence[str]) -> list[Row]:
        """See `Transport`. Raises ConnectionError where the server is down, slow, or its own store is."""
        body = {"features": [f"{view}:{field}" for field in fields], "entities": {name: list(ids) for name, ids in keys.items()}}
        try:
            request = urllib.request.Request(
                f"{self.url}/get-online-features", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                reply = json.load(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            # the others quote what they were given
            what = error if isinstance(error, OSError) else type(error).__name__
            raise ConnectionError(f"the feature server {self.url} failed ({what}): is it up, and its online store?") from None
        columns = dict(zip(reply["metadata"]["feature_names"], reply["results"], strict=True))
        rows: list[Row] = []
        for number in range(len(next(iter(keys.values())))):
            values = {field: columns[field]["values"][number] for field in fields}
            moment = dt.datetime.fromisoformat(columns[fields[0]]["event_timestamps"][number])
            rows.append((moment, {name: from_json(name, value) for name, value in values.items() if value is not None}))
        return rows


def possible(url: str) -> bool:
    """Whether this may be the address of a server: a scheme, a host, perhaps a port, and nobody's name."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in url
    return False


def from_json(field: str, value: Any) -> Any:
    """A value of the feature server's reply: vectors as raw bytes; whole numbers come as texts."""
    if field == "vector":
        return np.asarray(value, "<f4").tobytes()
    if field == "vector_f16":
        return base64.b64decode(value)
    return int(value) if field in ("width", "items", "sequence") else value
