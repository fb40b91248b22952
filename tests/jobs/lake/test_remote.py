"""A lake on an object store: one put commits, one of two writers wins, bad days of the store cost time and nothing else."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.lake import arrivals, artifacts, items, leases, manifests, nights, partitions, unnamed
from jobs.lake import store as stores
from jobs.lake.locks import alone, at_work, others_ended
from jobs.lake.tables import ITEMS
from jobs.run import InputError, Run, Unavailable
from tests.jobs.lake.item_rows import rows
from tests.object_store import ObjectStore, after, once, slow
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store

DS = "ds=2026-01-01"


@pytest.fixture
def lake(object_store: ObjectStore) -> Path:
    return Run(ds="2026-01-01", lake=Path(object_store.address())).lake


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tries, short pauses."""
    retry = {
        "max_retries": 3,
        "retry_timeout": dt.timedelta(seconds=5),
        "backoff": {"init_backoff": dt.timedelta(milliseconds=5)},
    }
    monkeypatch.setattr(stores, "RETRY", retry)
    stores.of.cache_clear()


def ids(lake: Path, partition: str = DS) -> list[str]:
    return partitions.read(lake, ITEMS, partition)["item_id"].to_pylist()


# -------------------------------------------------------------------------------------------------------------- partitions


def test_a_partition_has_the_keys_and_the_bytes_that_it_has_in_a_folder(
    lake: Path, tmp_path: Path, object_store: ObjectStore
) -> None:
    for home in (lake, tmp_path / "folder"):
        commit = partitions.write(home, ITEMS, DS, [rows("a", "b"), rows("c")])
        assert (commit.rows, ids(home)) == (3, ["a", "b", "c"])
    in_folder = {
        path.relative_to(tmp_path / "folder").as_posix(): path.read_bytes() for path in (tmp_path / "folder").rglob("*.*")
    }
    assert object_store.objects() == in_folder


def test_a_replaced_partition_is_read_to_its_end_by_who_began_before(lake: Path) -> None:
    partitions.write(lake, ITEMS, DS, [rows("a"), rows("b")])
    reader = partitions.scan(lake, ITEMS, DS)
    first = next(reader)
    partitions.write(lake, ITEMS, DS, [rows("x")])
    assert [*first["item_id"].to_pylist(), *(item for batch in reader for item in batch["item_id"].to_pylist())] == ["a", "b"]
    assert ids(lake) == ["x"]
    store = stores.of(lake)
    assert store is not None
    assert unnamed.parts(store, 3600, dry_run=False) == {}
    assert len(unnamed.parts(store, 0, dry_run=True)) == 2
    gone = unnamed.parts(store, 0, dry_run=False)
    assert len(gone) == 2 and all(key.startswith(f"items/{DS}/part-") and took > 100 for key, took in gone.items())
    assert ids(lake) == ["x"] and unnamed.parts(store, 0, dry_run=False) == {}


def test_indexes_that_nobody_serves_are_removed_and_of_those_that_serve_what_was_replaced(lake: Path) -> None:
    store = stores.of(lake)
    assert store is not None
    for home, folder in (("space=a/ds=1", "new"), ("space=a/ds=1", "old"), ("space=b/ds=1", "new")):
        store.put(f"indexes/{home}/{folder}/vectors", b"1")
        store.put(f"indexes/{home}/_index.json", b'{"folder": "new"}')
    assert unnamed.indexes(store, {"indexes/space=a/ds=1"}, 3600, dry_run=False) == {}
    gone = list(unnamed.indexes(store, {"indexes/space=a/ds=1"}, 0, dry_run=False))
    assert gone == ["indexes/space=a/ds=1/old/vectors", "indexes/space=b/ds=1/_index.json", "indexes/space=b/ds=1/new/vectors"]
    assert [one["path"] for one in store.listed("indexes")] == [
        "indexes/space=a/ds=1/_index.json",
        "indexes/space=a/ds=1/new/vectors",
    ]


def test_the_newest_partition_is_found_though_a_later_one_was_never_committed(lake: Path, object_store: ObjectStore) -> None:
    for day in ("01", "02", "05"):
        partitions.write(lake, ITEMS, f"ds=2026-01-{day}", [rows(day)])
    object_store.client.put_object(Bucket=object_store.bucket, Key="lake/items/ds=2026-01-04/part-00000-x.parquet", Body=b"")
    assert partitions.latest(lake, "items", "2026-01-04") == "ds=2026-01-02"
    assert partitions.before(lake, "items", "2026-01-02") == "ds=2026-01-01"
    assert partitions.committed(lake, "items") == [f"ds=2026-01-{day}" for day in ("01", "02", "05")]
    with pytest.raises(InputError, match="no partition at or before 2025-12-31 in the lake s3://"):
        partitions.latest(lake, "items", "2025-12-31")


def test_rows_are_added_behind_those_that_a_partition_holds(lake: Path, tmp_path: Path) -> None:
    for home in (lake, tmp_path / "folder"):
        partitions.write(home, ITEMS, DS, [rows("a")])
        other = partitions.folder(home, "items", "ds=2026-02-02")
        partitions.make_folder(other)
        staged = other / "staged.parquet"
        import pyarrow.parquet as pq

        pq.write_table(rows("b"), staged)
        held = partitions.read_commit(home, "items", DS)
        partitions.commit_files(home, "items", DS, [staged], over=held, kept=1)
        assert ids(home) == ["a", "b"]


def test_of_two_writers_of_one_partition_one_wins_and_the_other_is_told(lake: Path, object_store: ObjectStore) -> None:
    partitions.write(lake, ITEMS, DS, [rows("old")])
    told, wait = [], threading.Barrier(2)

    def fault(method: str, path: str) -> str:
        if method == "PUT" and path.endswith("_commit.json"):
            wait.wait(10)  # both have put their parts, neither has committed
        return ""

    object_store.fault = fault

    def write(item: str) -> None:
        try:
            partitions.write(lake, ITEMS, DS, [rows(item)])
            told.append(item)
        except Unavailable as error:
            assert "another writer committed it at the same time" in str(error) and f"items/{DS}" in str(error)

    writers = [threading.Thread(target=write, args=(item,)) for item in ("x", "y")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(told) == 1 and ids(lake) == told


def test_a_bucket_that_keeps_versions_is_no_other_lake(lake: Path, object_store: ObjectStore) -> None:
    object_store.client.put_bucket_versioning(Bucket=object_store.bucket, VersioningConfiguration={"Status": "Enabled"})
    for item in ("a", "b", "a"):
        partitions.write(lake, ITEMS, DS, [rows(item)])
    assert ids(lake) == ["a"]
    with alone(lake, "promotion"), pytest.raises(Unavailable), alone(lake, "promotion", 0):
        pass


def test_columns_are_read_by_ranges_and_not_the_whole_file(lake: Path, object_store: ObjectStore) -> None:
    many = 200_000
    columns = {
        "item_id": [str(number) for number in range(many)],
        "attributes": [[{"name": "t", "value": f"{number * 7919:x}" * 4}] for number in range(many)],
        "content_hash": [f"{number:x}" for number in range(many)],
        "first_seen_ds": ["2026-01-01"] * many,
    }
    partitions.write(lake, ITEMS, DS, [pa.table(columns, ITEMS.schema)])
    sizes: list[int] = []
    store = stores.of(lake)
    assert store is not None
    ranges = store.ranges
    store.ranges = lambda key, pairs: sizes.extend(end - low for low, end in pairs) or ranges(key, pairs)  # type: ignore[method-assign]
    found = [
        item for batch in partitions.scan(lake, ITEMS, DS, ("first_seen_ds", "item_id")) for item in batch["item_id"].to_pylist()
    ]
    assert found == columns["item_id"]
    file = next(one for one in store.listed(f"items/{DS}") if str(one["path"]).endswith(".parquet"))
    assert 0 < sum(sizes) < file["size"] / 2


# ---------------------------------------------------------------------------------------------------------------- bad days


@pytest.mark.parametrize("fault", ["throttle", "hang up", "break off", "lose the answer"])
@pytest.mark.parametrize(
    ("method", "part"), [("PUT", "part-"), ("PUT", "_commit.json"), ("GET", "_commit.json"), ("GET", "part-")]
)
def test_a_request_that_fails_once_is_asked_again(
    fault: str, method: str, part: str, lake: Path, object_store: ObjectStore
) -> None:
    partitions.write(lake, ITEMS, DS, [rows("old")])
    object_store.fault = once(fault, method, part)
    partitions.write(lake, ITEMS, DS, [rows("a"), rows("b")])
    assert ids(lake) == ["a", "b"]


@pytest.mark.parametrize("passing", range(4))
@pytest.mark.parametrize("fault", ["throttle", "hang up", "break off"])
def test_a_store_that_goes_away_leaves_the_old_partition_and_a_rerun_mends_it(
    fault: str, passing: int, short: None, lake: Path, object_store: ObjectStore
) -> None:
    partitions.write(lake, ITEMS, DS, [rows("old")])
    object_store.fault = after(passing, fault)
    parts = [rows("a"), rows("b"), rows("c")]
    if passing == 4:
        partitions.write(lake, ITEMS, DS, parts)
    else:
        with pytest.raises(Unavailable, match="is it down, slow, or does it throttle"):
            partitions.write(lake, ITEMS, DS, parts)
    object_store.fault = lambda method, path: ""
    assert ids(lake) == ["old"]
    partitions.write(lake, ITEMS, DS, parts)
    assert ids(lake) == ["a", "b", "c"]


def test_a_slow_store_is_waited_for(lake: Path, object_store: ObjectStore) -> None:
    object_store.fault = slow(0.3)
    partitions.write(lake, ITEMS, DS, [rows("a")])
    assert ids(lake) == ["a"]


def test_a_bucket_that_is_not_there_is_told(object_store: ObjectStore) -> None:
    lake = Run(ds="2026-01-01", lake=Path("s3://no-such-bucket-here/lake")).lake
    with pytest.raises(InputError, match=r"no-such-bucket-here.*is there such a bucket"):
        partitions.write(lake, ITEMS, DS, [rows("a")])


WRITER = """
import sys
from pathlib import Path
from jobs.lake import partitions
from jobs.lake.tables import ITEMS
from tests.jobs.lake.item_rows import rows
partitions.write(Path(sys.argv[1]), ITEMS, "ds=2026-01-01", [rows(f"i{part}", f"j{part}") for part in range(6)])
"""


@pytest.mark.parametrize("instant", range(8))
def test_killed_at_any_instant_and_run_again_a_writer_ends_with_the_same_objects(
    instant: int, lake: Path, object_store: ObjectStore
) -> None:
    partitions.write(lake, ITEMS, DS, [rows("old")])
    old = object_store.objects()
    process: list[subprocess.Popen[bytes]] = []
    put = [0]

    def fault(method: str, path: str) -> str:
        if method == "PUT" and process:
            put[0] += 1
            if put[0] == instant + 1:
                process[0].kill()
                return ["hang up", "lose the answer"][instant % 2]
        return ""

    object_store.fault = fault
    command = [sys.executable, "-c", WRITER, str(lake)]
    process.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."}))
    process[0].wait()
    committed = object_store.objects()[f"items/{DS}/_commit.json"]
    assert ids(lake) == ["old"] if committed == old[f"items/{DS}/_commit.json"] else ids(lake)[0] == "i0"
    object_store.fault = lambda method, path: ""
    subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, check=True)
    ended = object_store.objects()
    assert ids(lake) == [f"{kind}{part}" for part in range(6) for kind in "ij"]
    named = {entry["name"] for entry in json.loads(ended[f"items/{DS}/_commit.json"])["files"]}
    assert {Path(key).name for key in ended} == named | {"_commit.json"} | {Path(key).name for key in old}


# --------------------------------------------------------------------------------------------- artifacts, manifests, tombstones


def elsewhere(lake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The same lake as another machine sees it."""
    store = stores.of(lake)
    assert store is not None
    monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / "other machine"))
    return stores.place(Path(store.address))


def test_an_artifact_is_found_on_another_machine_and_half_of_one_is_none(
    lake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, object_store: ObjectStore
) -> None:
    staged = artifacts.stage(lake, "encoder")
    (staged / "encoder.json").write_text("{}")
    (staged / "deep").mkdir()
    (staged / "deep" / "lora.bin").write_bytes(b"123")
    identity = artifacts.keep(lake, "encoder", staged)
    other = elsewhere(lake, monkeypatch, tmp_path)
    assert dict(artifacts.described(other, "encoder"))[identity] == {}
    found = artifacts.find(other, "encoder", identity)
    assert found.is_relative_to(tmp_path / "other machine") and (found / "deep" / "lora.bin").read_bytes() == b"123"
    monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / "third machine"))
    third = stores.place(Path(object_store.address()))
    object_store.client.delete_object(Bucket=object_store.bucket, Key=f"lake/models/encoder/{identity}/deep/lora.bin")
    with pytest.raises(InputError, match="is not in the lake"):
        artifacts.find(third, "encoder", identity)


def test_manifests_and_tombstones_are_read_on_another_machine(
    lake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = elsewhere(lake, monkeypatch, tmp_path)
    for day, value in (("2026-01-01", 1), ("2026-01-02", 2), ("2026-01-02", 3)):
        manifests.append(lake, day, "extract", {"job": "extract", "ds": day, "status": "done", "result": {"value": value}})
    assert manifests.read(other, "2026-01-09", "extract")["result"] == {"value": 3}
    assert manifests.read(other, "2026-01-01", "extract")["result"] == {"value": 1}
    manifests.append(lake, "2026-01-01", "recommend", {"answer": 1})
    assert manifests.parsed(manifests.runs(other, "2026-01-01", "recommend")[0]) == {"answer": 1}
    manifests.append(lake, "2026-01-01", "recommend", {"answer": "another"})
    assert manifests.parsed(manifests.runs(other, "2026-01-01", "recommend")[0]) == {"answer": "another"}
    items.bury(lake, "m1", "2026-01-01")
    assert items.tombstones(other) == {"m1"}


def test_what_another_process_of_the_machine_has_just_written_is_not_taken_for_removed(
    lake: Path, object_store: ObjectStore
) -> None:
    old, new = (manifests.append(lake, "2026-01-01", job, {"status": "done"}) for job in ("extract", "embed"))
    os.utime(old, (0, 0))
    for path in (old, new):
        object_store.client.delete_object(Bucket=object_store.bucket, Key=f"lake/{path.relative_to(lake).as_posix()}")
    assert manifests.of_day(lake, "2026-01-01") == [new]


def test_what_arrived_is_dropped(lake: Path) -> None:
    partitions.write(lake, arrivals.ARRIVING_ITEMS, DS, [rows("a")])
    assert arrivals.digest(lake, arrivals.ARRIVING_ITEMS.name, DS)
    arrivals.drop_before(lake, "2026-01-02")
    assert not arrivals.digest(lake, arrivals.ARRIVING_ITEMS.name, DS)


def test_what_a_night_asks_costs_as_many_requests_after_many_nights_as_after_few(
    lake: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, object_store: ObjectStore
) -> None:
    def fill(first: int, stop: int) -> None:
        for number in range(first, stop):
            day = f"{dt.date(2026, 1, 1) + dt.timedelta(days=number)}"
            partitions.write(lake, ITEMS, f"ds={day}", [rows(day)])
            object_store.strew(f"lake/items/ds={day}/part-of-before", 40)  # more names than one answer of a store holds
            for job in ("extract", "publish") if number else ("extract", "publish", "scft"):
                manifests.append(lake, day, job, {"job": job, "ds": day, "status": "done", "result": {}})

    def night() -> dict[str, int]:
        # of a machine that has seen none of it
        monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / f"machine {len(object_store.seen)}"))
        here = stores.place(Path(object_store.address()))
        object_store.seen.clear()
        list(partitions.scan(here, ITEMS, partitions.latest(here, "items", "2026-12-31")))
        assert partitions.before(here, "items", "2026-12-31")
        assert manifests.read(here, "2026-12-31", "scft")["ds"] == "2026-01-01"  # a long time ago
        assert manifests.read(here, "2026-12-31", "extract") and next(manifests.history(here, "pub*"))
        assert len(nights.nights_before(here, "2026-12-31", 5)) == 5
        assert items.tombstones(here) == frozenset()
        return dict(object_store.counts())

    fill(0, 8)
    few = night()
    fill(8, 34)
    assert night() == few


# ------------------------------------------------------------------------------------------------------------------- leases


def test_a_lock_is_held_by_one_and_the_holder_is_named(lake: Path) -> None:
    with (
        alone(lake, "promotion"),
        pytest.raises(Unavailable, match=f"promotion is under way already .*process {os.getpid()} on"),
        alone(lake, "promotion", 0.1),
    ):
        pass
    with alone(lake, "promotion", 0):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from jobs.lake import locks
with locks.alone(Path(sys.argv[1]), "promotion"), locks.at_work(Path(sys.argv[1]), "extract"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_of_a_process_that_was_killed_is_free_at_once_on_its_machine(lake: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lake)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    with pytest.raises(Unavailable), alone(lake, "promotion", 0):
        pass
    with pytest.raises(Unavailable, match="extract is under way"):
        others_ended(lake, 0)
    holder.kill()
    holder.wait()
    with alone(lake, "promotion", 0):
        pass
    assert not others_ended(lake, 0)


@pytest.mark.parametrize("sure_s", [-60.0, 60.0], ids=["by its clock too late", "by its clock in time"])
def test_a_holder_that_lost_its_lease_commits_nothing(lake: Path, monkeypatch: pytest.MonkeyPatch, sure_s: float) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 0.8)
    partitions.write(lake, ITEMS, DS, [rows("old")])
    with alone(lake, "extract"):
        (held,) = leases.HELD
        held.over.set()  # it sleeps: nothing renews
        held.renewer.join()
        # another machine takes the lease over, under the next number
        monkeypatch.setattr(leases, "machine", lambda: "another")
        leases.HELD.remove(held)
        with alone(lake, "extract", 30):
            assert leases.HELD[0].lease.token == held.lease.token + 1
            partitions.write(lake, ITEMS, DS, [rows("new")])
        leases.HELD.append(held)
        held.renewed = time.monotonic() + sure_s
        with pytest.raises(Unavailable, match="was lost"):
            partitions.write(lake, ITEMS, DS, [rows("stale")])
    assert ids(lake) == ["new"]


def test_a_lease_is_renewed_for_as_long_as_it_is_held(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    with alone(lake, "extract"):
        (held,) = leases.HELD
        while held.lease.renewal < 6:  # three times as long as it lives without
            held.over.wait(0.05)
        monkeypatch.setattr(leases, "machine", lambda: "another")
        with pytest.raises(Unavailable), alone(lake, "extract", 0):
            pass
        held.refuse_lost()


def test_a_job_that_works_is_waited_for_and_one_that_ended_is_not(lake: Path) -> None:
    assert not others_ended(lake, 0)
    with at_work(lake, "embed"), pytest.raises(Unavailable, match="embed is under way"):
        others_ended(lake, 0)
    assert not others_ended(lake, 0)
