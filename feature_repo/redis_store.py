"""Feast's Redis store with a lease, a single node or Sentinel: bound to the master that gave it, and waited for by replicas.

Redis copies to its replicas afterwards, so a replica that is promoted may lack the last writes. Three things keep that harmless:
a lease holds only on the master that gave it, so a writer never goes on over rows that were lost; `settle` returns only once
replicas have what was written (LLMEMB_REPLICAS; under Sentinel all that follow, 1 at least); and leases are compared by a nonce.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import redis
from feast import FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore
from redis.exceptions import NoPermissionError

from feature_repo import feature_definitions as views  # not its parts: `feast apply` would find them twice
from feature_repo.keys import key_prefix
from feature_repo.leases import SCAN, Fenced, NotPublished, Rows, Unreplicated, fenced, held, owned_by
from feature_repo.roster import Roster, pairs_in, pairs_of


class FencedClient:
    """A Redis client whose pipelines are transactions that fail when the lease is no longer this writer's."""

    def __init__(self, client: Any, key: str, lease: bytes, ttl_ms: int, server: str) -> None:
        self.client, self.key, self.lease, self.ttl_ms, self.server = client, key, lease, ttl_ms, server
        self.also: Callable[[Any], None] | None = None
        """What each transaction does besides."""

    def pipeline(self, transaction: bool = True) -> Any:
        """A transaction, begun: EXEC fails if the lease changes between this check and it."""
        pipe = self.client.pipeline(transaction=True)
        try:
            pipe.watch(self.key)
            now = pipe.get(self.key)
            if now is None or now != self.lease:  # the whole of it: the number alone may be given twice
                raise fenced(token_of(self.lease), now and token_of(now))
            if self.server and (here := history(pipe)) != self.server:
                raise Fenced(
                    f"the store's master changed while this writer held the lease (token {token_of(self.lease)}; "
                    f"{self.server}, now {here}): its last writes may be lost; run again"
                )
        except redis.WatchError as error:
            pipe.reset()
            raise fenced(token_of(self.lease), "not known: the connection broke") from error
        except BaseException:
            pipe.reset()
            raise
        pipe.multi()
        pipe.pexpire(self.key, self.ttl_ms)
        if self.also:
            self.also(pipe)
        return pipe


def token_of(lease: bytes) -> int:
    """The number that a lease begins with; 0 before the first."""
    return int(lease.split(b" ", 1)[0] or 0)


def history(client: Any) -> str:
    """Which process answers, and the history of writes that it has; another one where the last writes may be lost.

    The process changes with a failover, and with a restart, which may lose the last second. A master that became a replica and
    then master again is the same process; its replication id is new. (It is also new once a master has its first replica, or
    had none for an hour: a writer is then sent back for nothing, once.)
    """
    process, past = client.info("server")["run_id"], client.info("replication").get("master_replid", "")
    return f"run id {process}, replication id {past}"


class RedisStore(RedisOnlineStore):  # type: ignore[misc]
    """Feast's Redis store with a lease: a key that expires, renewed by every write."""

    TTL_MS = 30_000
    SETTLE_MS = 10_000
    """How long replicas get to say that they have what was written; LLMEMB_REPLICAS_MS."""

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
        self.sentinel = getattr(online.redis_type, "value", online.redis_type) == "redis_sentinel"
        self.replicas = int(os.environ.get("LLMEMB_REPLICAS", int(self.sentinel)))
        self.settle_ms = int(os.environ.get("LLMEMB_REPLICAS_MS", self.SETTLE_MS))
        self.lease_key, self.token_key, self.notes_key, self.settled_key = (
            f"{config.project}:{name}" for name in ("lease", "token", "notes", "settled")
        )
        self.fenced = FencedClient(self.plain, self.lease_key, b"", self.ttl_ms, "")
        self.roster = Roster(self.plain, config.project)

    def _get_client(self, online_store_config: Any) -> Any:
        return self.fenced

    def acquire(self, owner: str, wait_s: float = 0.0) -> int:
        """See `Store`."""
        deadline = time.monotonic() + wait_s
        while True:
            token = int(self.plain.incr(self.token_key))
            mine = f"{token} {owned_by(owner)}, lease {uuid.uuid4().hex}".encode()
            if self.plain.set(self.lease_key, mine, nx=True, px=self.ttl_ms):
                break
            if time.monotonic() >= deadline:
                raise held((self.plain.get(self.lease_key) or b" unknown").decode().partition(" ")[2])
            time.sleep(0.1)
        self.fenced = FencedClient(self.plain, self.lease_key, mine, self.ttl_ms, self.server())
        try:
            self.settle()
            self.adopt()
        except BaseException:
            with contextlib.suppress(Fenced, redis.RedisError):
                self.release()
            raise
        return token

    def server(self) -> str:
        """The master and its history; empty where a single node does not let this user ask."""
        try:
            return history(self.plain)
        except NoPermissionError:
            if self.sentinel or self.replicas:
                raise
            return ""

    def settle(self) -> None:
        """See `Store`. A replica that has this connection's write has every write before it: they are copied in their order."""
        if not self.replicas:
            return
        # all that follow now: Sentinel knows how far replicas are only as of seconds ago, and may choose any of them
        need = max(self.replicas, int(self.plain.info("replication").get("connected_slaves", 0)) if self.sentinel else 0)
        with self.plain.pipeline(transaction=False) as pipe:
            pipe.set(self.settled_key, uuid.uuid4().hex)
            pipe.wait(need, self.settle_ms)
            have = int(pipe.execute()[-1])
        if have < need:
            raise Unreplicated(
                f"{have} replicas of the online store have what was written, {need} must (LLMEMB_REPLICAS; under Sentinel all "
                "that follow): a failover could undo it. Are the replicas up, and is this still the master? Run again later"
            )
        self.renew()  # on the same master still

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
            raise fenced(token_of(self.fenced.lease), "another") from error

    def renew(self) -> None:
        """See `Store`."""
        with self.transaction():
            pass

    def release(self) -> None:
        """See `Store`."""
        with self.transaction() as pipe:
            pipe.delete(self.lease_key)

    def adopt(self) -> None:
        """Lists the rows of a store that an older version wrote: once, reading all its keys."""
        if self.roster.whole:
            return
        for keys in self.keys(views.item_embedding):
            with self.transaction() as pipe:
                self.roster.add(pipe, pairs_in(keys))
        with self.transaction() as pipe:
            pipe.set(self.roster.whole_key, 1)

    def write(self, view: FeatureView, rows: Rows) -> None:
        """See `Store`."""
        if view.name == views.item_embedding.name:
            pairs = pairs_of(rows)
            self.fenced.also = lambda pipe: self.roster.add(pipe, pairs)
        try:
            self.online_write_batch(self.config, view, rows, None)
        except redis.WatchError as error:
            raise fenced(token_of(self.fenced.lease), "another") from error
        finally:
            self.fenced.also = None

    def delete(self, view: FeatureView, keys: Sequence[bytes]) -> None:
        """See `Store`. Views with the same entity share a Redis hash: only this view's fields go."""
        fields = [_mmh3(f"{view.name}:{field.name}") for field in view.features]
        with self.transaction() as pipe:
            for key in keys:
                pipe.hdel(key + self.config.project.encode(), *fields, f"_ts:{view.name}")
            if view.name == views.item_embedding.name:
                self.roster.strike(pipe, pairs_in(keys))

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

    def spaces(self) -> dict[str, int]:
        """See `Store`."""
        if self.roster.whole:
            return self.roster.counts()
        return Counter(space_id for keys in self.keys(views.item_embedding) for _, space_id in pairs_in(set(keys)))

    def members(self, space_id: str) -> Iterator[list[str]]:
        """See `Store`."""
        if self.roster.whole:
            yield from self.roster.members(space_id)
            return
        for keys in self.keys(views.item_embedding):
            yield [item_id for item_id, own in pairs_in(set(keys)) if own == space_id]

    def rows_of(self, item_id: str) -> list[bytes]:
        """See `Store`."""
        if not self.roster.whole:
            return sorted(
                {key for keys in self.keys(views.item_embedding, key_prefix(views.item_embedding, item_id)) for key in keys}
            )
        keys, project = self.roster.keys_of(item_id), self.config.project.encode()
        with self.plain.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hexists(key + project, f"_ts:{views.item_embedding.name}")
            return [key for key, there in zip(keys, pipe.execute(), strict=True) if there]

    def free_bytes(self) -> int | None:
        """See `Store`. Without a limit of its own, Redis has what its machine has, or the host of its container."""
        try:
            told = self.plain.info("memory")
        except NoPermissionError:
            return None
        if told.get("maxmemory") and str(told.get("maxmemory_policy", "")).startswith("allkeys"):
            raise NotPublished(
                f"this Redis drops rows of its own choice once it is full (maxmemory-policy {told['maxmemory_policy']}), also "
                "those that serve, and the pointer: set it to noeviction, which refuses writes instead"
            )
        most = told.get("maxmemory") or told.get("total_system_memory")
        return max(0, int(most) - int(told["used_memory"])) if most else None

    def notes(self) -> dict[str, str]:
        """See `Store`."""
        return {name.decode(): text.decode() for name, text in self.plain.hgetall(self.notes_key).items()}

    def note(self, name: str, text: str | None) -> None:
        """See `Store`."""
        with self.transaction() as pipe:
            pipe.hdel(self.notes_key, name)
            if text is not None:
                pipe.hset(self.notes_key, name, text)
