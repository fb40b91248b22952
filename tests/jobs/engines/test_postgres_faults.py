"""PostgreSQL killed while jobs write, and started again: status 4, what serves is whole, and a rerun ends well."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from feature_repo.reader import Reader, settings
from feature_repo.stores import PostgresStore, open_writer
from jobs import collect, forget, lookup, publish, rollback
from jobs.run import Run, Unavailable
from tests.feature_repo.postgresql import Server, postgresql
from tests.jobs.engines.losses import lost_at

A, B, C = "a" * 16, "b" * 16, "c" * 16
RUN_DS = "2026-01-01"
Catalogue = Callable[..., Path]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgresql() as running:
        yield running


@pytest.fixture
def lake(server: Server, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A lake in which A served, B serves, and C is there to be published."""
    written = catalogue()
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", server.online(f"jobs{abs(hash(request.node.name))}"))
    monkeypatch.setenv("LLMEMB_LEASE_MS", "2000")
    put(written, A)
    put(catalogue(space=B), B)
    return catalogue(space=C)


def run_of(lake: Path) -> Run:
    return Run(ds=RUN_DS, lake=lake)


def put(lake: Path, space: str) -> publish.Result:
    return publish.run(publish.Config(run=run_of(lake), space=space, chunk_rows=16, approximate=False, lease_wait_s=20))


WORK: dict[str, Callable[[Path], Any]] = {
    "publish": lambda lake: put(lake, C),
    "rollback": lambda lake: rollback.run(rollback.Config(run=run_of(lake), space=A, lease_wait_s=20)),
    "collect": lambda lake: collect.run(collect.Config(run=run_of(lake), grace_days=0, lease_wait_s=20)),
    "forget": lambda lake: forget.run(forget.Config(run=run_of(lake), item="m4", lease_wait_s=20)),
}


@pytest.mark.parametrize(
    ("job", "method", "view", "number", "after"),
    [
        ("publish", "write", "item_embedding", 2, False),
        ("publish", "write", "item_embedding", 3, True),
        ("publish", "write", "serving_pointer", 1, False),
        ("publish", "write", "serving_pointer", 1, True),
        ("rollback", "write", "serving_pointer", 1, True),
        ("collect", "delete", "", 1, True),
        ("forget", "delete", "", 2, True),
    ],
)
def test_a_server_killed_amid_a_job_leaves_what_serves_whole_and_a_rerun_ends_well(
    lake: Path, server: Server, monkeypatch: pytest.MonkeyPatch, job: str, method: str, view: str, number: int, after: bool
) -> None:
    if job == "collect":
        put(lake, C)  # A is neither served nor the one before
    with monkeypatch.context() as patch:
        lost_at(patch, PostgresStore, server.stop, method, number, after=after, view=view)
        with pytest.raises(Unavailable):
            WORK[job](lake)
    server.start()
    moved = view == "serving_pointer" and after
    served = {"publish": C if moved else B, "rollback": A, "collect": C, "forget": B}[job]
    assert Reader.open(lake).pointer().space_id == served
    if job != "forget":
        assert lookup.run(lookup.Config(run=run_of(lake))).compared == 40
    WORK[job](lake)
    assert lookup.run(lookup.Config(run=run_of(lake))).compared == (39 if job == "forget" else 40)
    spaces: Any = open_writer(settings(lake)).spaces()
    left = {"publish": {A: 40, B: 40, C: 40}, "rollback": {A: 40, B: 40}, "collect": {B: 40, C: 40}, "forget": {A: 39, B: 39}}
    assert spaces == left[job]


def test_a_publish_that_a_standby_waited_for_is_served_by_it_after_the_primary_is_gone(
    lake: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEMB_REPLICAS", "1")
    monkeypatch.setenv("LLMEMB_REPLICAS_MS", "20000")
    schema = settings(lake).online_store.db_schema
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        standby = Server(Path(folder), server.bin, follows=server)
        try:
            with monkeypatch.context() as patch:
                lost_at(patch, PostgresStore, server.stop, "settle", 3, after=True)  # those before are of leases
                assert put(lake, C).space_id == C
            monkeypatch.setenv("LLMEMB_ONLINE_STORE", standby.online(schema))
            standby.call("pg_ctl", "promote", "--wait", "--pgdata", "data")
            assert Reader.open(lake).pointer().space_id == C, "it was settled, so it is there"
            monkeypatch.setenv("LLMEMB_REPLICAS", "0")
            assert lookup.run(lookup.Config(run=run_of(lake))).compared == 40
            assert put(lake, C).kind == "nothing to do"
        finally:
            standby.stop()
    server.start()
