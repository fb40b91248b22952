"""Under load with a store that is slow, hangs, is hung up on or was flushed: no wrong answer, and every fallback is said."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.feature_repo.sentinels import free_port, redis_at, until
from tests.feature_repo.serving.proxy import Proxy, between
from tests.feature_repo.serving.test_faults import own_postgres, own_redis
from tests.feature_repo.serving.world import Client, publish, push_histories, serving

USERS = {f"u{number}": [f"i{number}", f"i{3 * number + 1}", f"i{5 * number + 2}"] for number in range(24)}
MOST = 160
"""Requests of one fault."""


class World:
    """A service behind a proxy, and what it must answer."""

    def __init__(self, client: Client, proxy: Proxy, store: redis.Redis | None = None) -> None:
        self.client, self.proxy, self.store = client, proxy, store
        self.right = {user: self.items(history=history) for user, history in USERS.items()}
        self.popular = self.items(history=[])
        assert len({tuple(items) for items in self.right.values()}) == len(USERS), "users are told apart by their answers"

    def items(self, **body: Any) -> list[str]:
        status, answer = self.client.post("/recommend", k=4, **body)
        assert status == 200
        return [item["item_id"] for item in answer["items"]]

    def load(self, only: list[str] | None = None) -> Counter[str]:
        """Asks for many users at once; counts what was said. Raises AssertionError for an answer that is not what it says."""
        users = only or list(USERS)

        def one(number: int) -> str:
            user = users[number % len(users)]
            status, answer = self.client.post("/recommend", user_id=user, k=4)
            assert status == 200, answer
            said = answer["fallback"]
            wanted = self.popular if said in ("store_down", "unknown_user") else self.right[user]
            assert said in (None, "remembered_history", "store_down", "unknown_user")
            assert [item["item_id"] for item in answer["items"]] == wanted, (user, said)
            return said or "right"

        with ThreadPoolExecutor(6) as pool:
            return Counter(pool.map(one, range(MOST)))

    def well(self) -> None:
        """Waits until the store is asked again, and all is right."""
        self.client.until(lambda: self.client.post("/recommend", user_id="u1", k=4)[1]["fallback"] is None)
        self.client.until(lambda: set(self.load()) == {"right"})


@contextmanager
def sentinel(folder: Path, port: int) -> Iterator[int]:
    """A Sentinel that names a port as the master `mymaster`; gives its own port."""
    own = free_port()
    path = folder / "sentinel.conf"
    path.write_text(
        f"port {own}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor mymaster 127.0.0.1 {port} 1\n"
        "sentinel down-after-milliseconds mymaster 600000\n"
    )
    with subprocess.Popen(["redis-server", str(path), "--sentinel"], stdout=subprocess.DEVNULL) as process:
        until(lambda: redis_at(own).sentinel_get_master_addr_by_name("mymaster"), "Sentinel names the master")
        try:
            yield own
        finally:
            process.kill()


def fill(folder: Path) -> None:
    """A space that serves, and what users did."""
    publish(folder, seed=1)
    push_histories(folder, USERS)


@pytest.fixture(params=["single", "sentinel", "postgres"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    if request.param == "postgres":
        with own_postgres(tmp_path, monkeypatch) as postgres:
            fill(tmp_path)
            with between(postgres.port) as proxy:
                monkeypatch.setenv("LLMEMB_ONLINE_STORE", postgres.online("own", port=proxy.port))
                with serving(tmp_path, breaker_s=0.1) as client:
                    yield World(client, proxy)
        return
    with own_redis(tmp_path, monkeypatch) as server:
        port = int(server.args[2])  # type: ignore[index]
        fill(tmp_path)
        with between(port) as proxy, sentinel(tmp_path, proxy.port) as guard:
            online: dict[str, Any] = {"type": "redis", "connection_string": f"127.0.0.1:{proxy.port}"}
            if request.param == "sentinel":
                online = {"type": "redis", "redis_type": "redis_sentinel", "connection_string": f"127.0.0.1:{guard}"}
            monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps(online))
            with serving(tmp_path, breaker_s=0.1) as client:
                yield World(client, proxy, redis.Redis(port=port))


def jitter(proxy: Proxy) -> None:
    """Replies come just before the time limit, or just after it."""
    proxy.delay_s = (0.0, 0.12)


def slow(proxy: Proxy) -> None:
    """Replies come long after the time limit, when another request may use the line."""
    proxy.delay_s = (0.2, 0.3)


def hanging(proxy: Proxy) -> None:
    """Replies never come."""
    proxy.swallow = True


def hung_up_on(proxy: Proxy) -> None:
    """Lines are cut, and new ones too."""
    proxy.down = True
    proxy.cut()


@pytest.mark.parametrize("fault", [jitter, slow, hanging, hung_up_on])
def test_a_store_in_trouble_gives_no_wrong_answer_and_is_well_again(world: World, fault: Callable[[Proxy], None]) -> None:
    known = list(USERS)[:12]
    # in memory from now on; on a busy machine a well store may be slow at first
    world.client.until(lambda: set(world.load(known)) == {"right"})
    fault(world.proxy)
    said = world.load()
    assert said["unknown_user"] == 0, "a user who can't be read is not said to be unknown"
    assert said.total() == MOST and said["right"] < MOST
    if fault is not jitter:
        time.sleep(0.1)
        later = world.load()
        assert later["remembered_history"] and later["store_down"] and not later["right"]
    world.proxy.delay_s, world.proxy.swallow, world.proxy.down = (0.0, 0.0), False, False
    world.well()


@pytest.mark.parametrize("world", ["single", "sentinel"], indirect=True)
def test_a_store_that_was_flushed_knows_nobody_and_says_so_until_histories_are_pushed_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.load()
    assert world.store is not None
    world.store.flushall()
    world.client.until(lambda: set(world.load()) == {"unknown_user"})
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps(
        {"type": "redis", "connection_string": f"127.0.0.1:{world.store.connection_pool.connection_kwargs['port']}"}
    ))  # fmt: skip
    push_histories(tmp_path, USERS)
    world.well()
