"""What a store must do for its writers: one at a time under a lease with a fencing token, deletes, and a list of keys.

A lease is named by a token, which people read, and by a random nonce, which alone decides: a replica that was promoted may give
the same token a second time, never the same nonce.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import psycopg
import redis
from feast import FeatureView

Rows = list[tuple[Any, dict[str, Any], Any, None]]
"""Feast's rows: (entity key, values, event timestamp, created timestamp)."""
SCAN = 5_000
"""Keys listed at once."""
BROKEN = (redis.RedisError, sqlite3.Error, psycopg.Error)
"""What a store raises that is down, slow, full or locked."""
LOCKED_OUT = re.compile(r'authentication failed|no password supplied|no pg_hba\.conf entry|role ".*" does not exist')
"""How PostgreSQL words SQLSTATE class 28 while a connection opens: its client library then gives the text without the number."""
UNREAD = "unauthenticated multibulk length"


class NotPublished(Exception):
    """The store was left as it serves; the message says why and what to do."""


class Held(NotPublished):
    """Another writer holds the lease."""


class Fenced(NotPublished):
    """This writer's lease went to another one, or ended, or the store's master is no longer the one that gave it."""


class Unreplicated(NotPublished):
    """What was written is on too few replicas: a failover could undo it."""


class Store(Protocol):
    """A store that this process alone may write, between `acquire` and `release`."""

    def acquire(self, owner: str, wait_s: float = 0.0) -> int:
        """Takes the lease and returns its fencing token. Raises Held when it can't within `wait_s`; Unreplicated."""

    def renew(self) -> None:
        """Keeps the lease while nothing is written. Raises Fenced when it is lost."""

    def release(self) -> None:
        """Gives the lease back."""

    def settle(self) -> None:
        """Returns once all that was written would outlive a failover. Raises Unreplicated where it does not come to that."""

    def write(self, view: FeatureView, rows: Rows) -> None:
        """Writes rows of one view, all or none. Raises Fenced."""

    def delete(self, view: FeatureView, keys: Sequence[bytes]) -> None:
        """Removes one view's values of some serialized keys. Raises Fenced."""

    def keys(self, view: FeatureView, start: bytes = b"") -> Iterator[list[bytes]]:
        """Serialized keys of a view that begin with `start` (or its join keys), in bounded lists. May read all keys there are."""

    def spaces(self) -> dict[str, int]:
        """Every space with rows, published or half-staged, and how many."""

    def members(self, space_id: str) -> Iterator[list[str]]:
        """Ids of the items with a row in a space, in bounded lists; some may come twice."""

    def rows_of(self, item_id: str) -> list[bytes]:
        """Serialized keys of an item's rows, of all spaces."""

    def free_bytes(self) -> int | None:
        """What the store can still take; None where it does not tell. Raises NotPublished where it drops rows once it is full."""

    def notes(self) -> dict[str, str]:
        """What writers noted for later ones: since when a space does not serve."""

    def note(self, name: str, text: str | None) -> None:
        """Notes a text, or strikes it out. Raises Fenced."""


def locked_out(error: Exception) -> bool:
    """Whether a store refused the name or password that it was given: no later run will be let in, until somebody mends them."""
    if isinstance(error, psycopg.OperationalError):
        return (error.sqlstate or "").startswith("28") or LOCKED_OUT.search(str(error)) is not None
    # a long command of somebody unknown Redis does not even read
    return isinstance(error, redis.AuthenticationError) or (isinstance(error, redis.RedisError) and UNREAD in str(error))


def owned_by(owner: str) -> str:
    """Who holds a lease, for the message to whom it is refused."""
    return f"{owner} on {socket.gethostname()}, process {os.getpid()}, since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"


@contextlib.contextmanager
def lease(store: Store, owner: str, wait_s: float = 0.0) -> Iterator[int]:
    """Holds the lease inside a `with` block; gives its token. Raises Held, Unreplicated."""
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
