"""Histories read without a thread: each answer is its own user's, whatever became of the requests before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_repo.serving.lines import Lines, lines_of
from feature_repo.serving.settings import Settings
from feature_repo.serving.store import open_reader
from tests.feature_repo.serving.proxy import Proxy, between
from tests.feature_repo.serving.test_faults import own_redis
from tests.feature_repo.serving.world import push_histories

USERS = {f"u{number}": [f"i{number}", f"i{number + 1}"] for number in range(12)}


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Lines, Proxy]]:
    with own_redis(tmp_path, monkeypatch) as server:
        push_histories(tmp_path, USERS)
        with between(int(server.args[2])) as proxy:  # type: ignore[index]
            monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps(
                {"type": "redis", "connection_string": f"127.0.0.1:{proxy.port}"}
            ))  # fmt: skip
            lines = lines_of(open_reader(Settings(), tmp_path).transport)
            assert lines is not None
            yield lines, proxy


def test_reads_at_once_each_get_their_own_and_keep_their_lines(way: tuple[Lines, Proxy]) -> None:
    lines, _ = way

    async def read() -> None:
        for _ in range(3):
            assert await asyncio.gather(*map(lines.item_ids, USERS)) == list(USERS.values())
        assert await lines.item_ids("nobody") == []
        assert len(lines.free) == len(USERS)
        await lines.close()

    asyncio.run(read())


def test_a_read_that_was_given_up_hands_its_answer_to_nobody_else(way: tuple[Lines, Proxy]) -> None:
    lines, proxy = way

    async def read() -> None:
        assert await lines.item_ids("u1") == USERS["u1"]
        proxy.delay_s = (0.2, 0.2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await lines.item_ids("u2")
        proxy.delay_s = (0.0, 0.0)
        assert await lines.item_ids("u3") == USERS["u3"]
        await lines.close()

    asyncio.run(read())


def test_a_store_from_which_connections_take_longer_than_a_read_may_is_read_all_the_same(way: tuple[Lines, Proxy]) -> None:
    lines, proxy = way
    proxy.delay_s = (0.1, 0.1)

    async def read() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await lines.item_ids("u1")
        for _ in range(200):
            if lines.free:
                break
            await asyncio.sleep(0.05)
        (kept,) = lines.free
        assert await lines.item_ids("u2") == USERS["u2"] and list(lines.free) == [kept]
        await lines.close()

    asyncio.run(read())


def test_a_handshake_may_take_longer_than_a_read(way: tuple[Lines, Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    lines, _ = way
    opened = asyncio.open_connection

    async def slowly(**given: object) -> object:
        await asyncio.sleep(3 * Settings().store_ms / 1000)  # as TLS to a far host
        return await opened(**given)  # type: ignore[arg-type]

    async def read() -> None:
        monkeypatch.setattr(asyncio, "open_connection", slowly)
        assert await lines.item_ids("u1") == USERS["u1"]
        await lines.close()

    asyncio.run(read())


def test_after_a_server_hung_up_one_read_fails_and_the_next_is_right(way: tuple[Lines, Proxy]) -> None:
    lines, proxy = way

    async def read() -> None:
        await asyncio.gather(*map(lines.item_ids, USERS))
        proxy.cut()
        with pytest.raises(Exception, match="onnection"):
            await lines.item_ids("u1")
        assert await lines.item_ids("u2") == USERS["u2"]
        await lines.close()

    asyncio.run(read())


def test_after_a_host_that_fell_silent_one_read_is_slow_and_the_next_is_right(way: tuple[Lines, Proxy]) -> None:
    lines, proxy = way

    async def read() -> None:
        await asyncio.gather(*map(lines.item_ids, USERS))
        proxy.deaf.update(proxy.lines)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await lines.item_ids("u1")
        async with asyncio.timeout(5):
            assert await lines.item_ids("u2") == USERS["u2"]
        await lines.close()

    asyncio.run(read())


def test_a_read_that_fails_leaves_lines_alone_that_answered_since_it_began(way: tuple[Lines, Proxy]) -> None:
    lines, proxy = way

    async def read() -> None:
        await lines.item_ids("u1")
        proxy.deaf.update(proxy.lines)
        slow = asyncio.ensure_future(lines.item_ids("u3"))
        await asyncio.sleep(0.05)
        assert await lines.item_ids("u4") == USERS["u4"]
        (kept,) = lines.free
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert list(lines.free) == [kept] and await lines.item_ids("u5") == USERS["u5"]
        await lines.close()

    asyncio.run(read())


def test_a_cluster_and_other_stores_are_read_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMEMB_ONLINE_STORE", raising=False)
    monkeypatch.delenv("LLMEMB_REGISTRY", raising=False)
    transport = open_reader(Settings(), tmp_path).transport
    assert lines_of(transport) is None
    monkeypatch.setattr(transport.config.online_store, "type", "redis")  # type: ignore[attr-defined]
    object.__setattr__(transport.config.online_store, "redis_type", "redis_cluster")  # type: ignore[attr-defined]
    assert lines_of(transport) is None
