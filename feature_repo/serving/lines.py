"""Histories read from Redis over connections of the event loop itself: a thread in between would cost as much as the read."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from feature_repo.keys import key_prefix, key_text
from feature_repo.transport import Sdk, natives

CONNECT_S = 1.0
"""Seconds that a connection may take until it can be used."""


class Lines:
    """One command at a time on each connection, so that no answer can reach another's request. Lives in one event loop."""

    def __init__(self, transport: Sdk) -> None:
        self.transport = transport
        self.client: Any = None
        self.free: dict[Any, float] = {}
        """Connections that no read uses, and when each was last known to be well; the latest is taken first."""
        view, project = transport.views.user_history, transport.config.project.encode()
        _, (field, *_) = transport.store._generate_hset_keys_for_features(view, ["item_ids"])
        self.prefix, self.suffix = key_prefix(view), project
        self.before, self.after = b"*3\r\n$5\r\nHMGET\r\n$", b"\r\n$%d\r\n%b\r\n" % (len(field), field)

    async def item_ids(self, user_id: str) -> list[str]:
        """What the SRS pushed of a user. Cancelled, it leaves no connection behind on which an answer may still come."""
        key = self.prefix + key_text(user_id) + self.suffix
        begun = time.monotonic()
        line = self.free.popitem()[0] if self.free else await self.new()
        try:
            await line.send_packed_command(b"%b%d\r\n%b%b" % (self.before, len(key), key, self.after), check_health=False)
            raw = (await line.read_response(disable_decoding=True))[0]
        except BaseException:
            await line.disconnect(nowait=True)
            await self.close(begun)  # a host that hung up on one, or fell silent, has done so on all that did not answer since
            raise
        self.free[line] = time.monotonic()
        return list(natives({"item_ids": value_of(raw)}).get("item_ids") or []) if raw else []

    async def new(self) -> Any:
        """One more connection. Who waits for it may give up: it is made to its end then, and kept for the next read, else a store
        from which connections take longer than a read may would never be read again."""
        making = asyncio.ensure_future(self.made())
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(self.keep)
            raise

    def keep(self, making: asyncio.Future[Any]) -> None:
        """A connection that nobody waits for any more."""
        if not making.cancelled() and making.exception() is None:
            self.free[making.result()] = time.monotonic()

    async def made(self) -> Any:
        """A connection, as Feast's settings say: password, TLS, Sentinel."""
        if self.client is None:
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff

            self.client = client = await self.transport.store._get_client_async(self.transport.config.online_store)
            client.set_retry(Retry(NoBackoff(), 0))
            # who reads has a limit for the whole; redis-py's would make a task of every command
            client.connection_pool.connection_kwargs |= {"socket_timeout": None, "socket_connect_timeout": CONNECT_S}
        line = self.client.connection_pool.make_connection()
        try:
            async with asyncio.timeout(CONNECT_S):
                await line.connect()
        except BaseException:
            await line.disconnect(nowait=True)
            raise
        return line

    async def close(self, before: float = math.inf) -> None:
        """Hangs up where nothing was heard since `before`, without waiting for the other side."""
        for line in [line for line, well in self.free.items() if well < before]:
            if self.free.pop(line, None) is not None:
                await line.disconnect(nowait=True)


def value_of(raw: bytes) -> Any:
    """Feast's value of its bytes."""
    from feast.protos.feast.types.Value_pb2 import Value

    return Value.FromString(raw)


def lines_of(transport: Any) -> Lines | None:
    """How histories are read without a thread; None where the store is not one Redis, or a master that Sentinel names."""
    online = transport.config.online_store
    if online.type != "redis" or getattr(online.redis_type, "value", online.redis_type) == "redis_cluster":
        return None
    return Lines(transport)
