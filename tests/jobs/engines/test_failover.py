"""The store's master killed while jobs write: they end as `busy or away`, what serves is whole, and a rerun ends well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis

from feature_repo.reader import Reader, settings
from feature_repo.redis_store import RedisStore
from feature_repo.stores import lease, open_writer
from jobs import collect, forget, lookup, publish, rollback
from jobs.run import Run, Unavailable
from tests.feature_repo.sentinels import Failover, failover
from tests.jobs.engines.losses import lost_at

A, B, C = "a" * 16, "b" * 16, "c" * 16
RUN_DS = "2026-01-01"
Catalogue = Callable[..., Path]
Done = TypeVar("Done")


def again(work: Callable[[], Done], tries: int = 20) -> Done:
    """As a scheduler repeats what ended with status 4: replicas that just came back may be late on a full machine."""
    for _ in range(tries):
        try:
            return work()
        except Unavailable:
            time.sleep(1)
    return work()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failover]:
    with failover(tmp_path_factory.mktemp("sentinel")) as servers:
        yield servers


@pytest.fixture
def lake(servers: Failover, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lake in which A served, B serves, and C is there to be published."""
    servers.mend()
    redis.Redis(port=servers.master).flushall()
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", servers.settings)
    monkeypatch.setenv("LLMEMB_LEASE_MS", "3000")
    for written, space in ((catalogue(), A), (catalogue(space=B), B)):
        again(lambda written=written, space=space: put(written, space))  # type: ignore[misc]
    return catalogue(space=C)


def run_of(lake: Path) -> Run:
    return Run(ds=RUN_DS, lake=lake)


def put(lake: Path, space: str, **more: Any) -> publish.Result:
    return publish.run(publish.Config(run=run_of(lake), space=space, chunk_rows=16, approximate=False, lease_wait_s=10, **more))


def look(lake: Path) -> lookup.Result:
    return lookup.run(lookup.Config(run=run_of(lake)))


@pytest.mark.parametrize(
    ("method", "view", "number", "after"),
    [
        ("write", "item_embedding", 2, False),
        ("write", "item_embedding", 3, True),
        ("write", "serving_pointer", 1, False),
        ("write", "serving_pointer", 1, True),
    ],
    ids=["mid-publish", "mid-publish, after the last rows", "mid-flip, before", "mid-flip, after"],
)
def test_publish(
    lake: Path, servers: Failover, monkeypatch: pytest.MonkeyPatch, method: str, view: str, number: int, after: bool
) -> None:
    with monkeypatch.context() as patch:
        lost_at(patch, RedisStore, servers.kill, method, number, after=after, view=view)
        with pytest.raises(Unavailable):
            put(lake, C)
    pointer = Reader.open(lake).pointer()
    assert pointer.space_id == B or (view == "serving_pointer" and after)
    assert look(lake).compared == 40  # whole, whichever it is
    servers.mend()
    assert again(lambda: put(lake, C)).space_id == C
    assert (look(lake).compared, Reader.open(lake).pointer().sequence) == (40, 3)


def test_collect(lake: Path, servers: Failover, monkeypatch: pytest.MonkeyPatch) -> None:
    put(lake, C)
    with monkeypatch.context() as patch:
        lost_at(patch, RedisStore, servers.kill, "delete", 1, after=True)
        with pytest.raises(Unavailable):
            collect.run(collect.Config(run=run_of(lake), grace_days=0, lease_wait_s=10))
    assert look(lake).compared == 40
    servers.mend()
    again(lambda: collect.run(collect.Config(run=run_of(lake), grace_days=0, lease_wait_s=10)))
    store = open_writer(settings(lake))
    with lease(store, "test"):
        assert store.spaces() == {B: 40, C: 40}


def test_rollback(lake: Path, servers: Failover, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        lost_at(patch, RedisStore, servers.kill, "write", 1, after=True, view="serving_pointer")
        with pytest.raises(Unavailable):
            rollback.run(rollback.Config(run=run_of(lake), space=A, lease_wait_s=10))
    servers.mend()
    assert again(lambda: rollback.run(rollback.Config(run=run_of(lake), space=A, lease_wait_s=10))).space_id == A
    assert look(lake).compared == 40


def test_forget(lake: Path, servers: Failover, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        lost_at(patch, RedisStore, servers.kill, "delete", 2, after=True)
        with pytest.raises(Unavailable):
            forget.run(forget.Config(run=run_of(lake), item="m4", lease_wait_s=10))
    servers.mend()
    result = again(lambda: forget.run(forget.Config(run=run_of(lake), item="m4", lease_wait_s=10)))
    assert (result.left_online, result.left_in_lake) == (0, [])
    assert Reader.open(lake).vectors(["m4"]).deleted == ["m4"]
