"""Forget in a bucket: no object names the item afterwards, none is lost, and a killed run is finished by the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from feature_repo.reader import Reader
from jobs import forget, publish
from jobs.engines import online
from jobs.lake import partitions
from jobs.lake import store as stores
from jobs.lake.items import tombstones
from jobs.lake.tables import SEQUENCES
from jobs.run import Run, Unavailable
from tests.jobs.conftest import redis_port as redis_port  # for pytest, which looks fixtures up here
from tests.jobs.forget.test_forget import DS, ODD, A, everywhere, strange_lake
from tests.object_store import ObjectStore, after
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store


@pytest.fixture
def bucket(
    catalogue: Callable[..., Path], object_store: ObjectStore, redis_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A lake in a bucket whose space serves from Redis, with the odd item everywhere."""
    redis.Redis(port=redis_port).flushall()
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{redis_port}"}))
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    folder = strange_lake(catalogue)
    lake = stores.place(Path(object_store.address()))
    store = stores.of(lake)
    assert store is not None
    store.put_files(
        [
            (path.relative_to(folder).as_posix(), path)
            for path in folder.rglob("*")
            if path.is_file() and "locks" not in path.parts and "feast" not in path.parts
        ]
    )
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=A))
    shutil.rmtree(folder)
    return lake


def names_of(object_store: ObjectStore, tmp_path: Path, item: str) -> list[str]:
    """Keys of the bucket whose bytes or rows name an item, but for its tombstones."""
    home = tmp_path / "looked at"
    shutil.rmtree(home, ignore_errors=True)
    for key, data in object_store.objects().items():
        (home / key).parent.mkdir(parents=True, exist_ok=True)
        (home / key).write_bytes(data)
    found = everywhere(home, item)
    return [name for name in found if not name.startswith(("tombstones/", "feast/offline/item_tombstone/", "locks/"))]


def test_no_object_of_the_bucket_names_it_and_nothing_else_went(bucket: Path, object_store: ObjectStore, tmp_path: Path) -> None:
    before = names_of(object_store, tmp_path, ODD)
    assert {name.split("/")[0] for name in before} >= {"items", "interactions", "indexes", "manifests", "reports", "feast"}
    rows = {table: partitions.read_commit(bucket, table, f"ds={DS}").rows for table in ("items", "interactions", "sequences")}
    result = forget.run(forget.Config(run=Run(ds=DS, lake=bucket), item=ODD, lease_wait_s=0))
    assert (result.left_in_lake, result.left_online, result.indexes, result.online_removed) == ([], 0, 1, 1)
    assert names_of(object_store, tmp_path, ODD) == [] and tombstones(bucket) == {ODD}
    assert not [key for key in object_store.objects() if key.endswith(".lock")], "locks of the copy are no locks of the bucket"
    assert {table: partitions.read_commit(bucket, table, f"ds={DS}").rows for table in rows} == rows | {
        "items": rows["items"] - 1, "interactions": rows["interactions"] - 1,
    }  # fmt: skip
    assert len(partitions.read(bucket, SEQUENCES, f"ds={DS}")) == rows["sequences"]
    index = online.open_index(bucket, Reader.open(bucket).pointer().space)
    assert ODD not in index.item_ids and len(index.item_ids) == rows["items"] - 1
    assert not [path for path in bucket.rglob("*") if path.name.startswith(".forget-")]


@pytest.mark.parametrize("passing", [1, 4, 7])
def test_a_store_that_goes_away_is_told_and_the_next_run_finishes(
    passing: int, bucket: Path, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime as dt

    monkeypatch.setattr(stores, "RETRY", {"max_retries": 1, "retry_timeout": dt.timedelta(seconds=1)})
    stores.of.cache_clear()
    object_store.fault = after(passing, "throttle")
    with pytest.raises(Unavailable):
        forget.run(forget.Config(run=Run(ds=DS, lake=bucket), item=ODD, lease_wait_s=0))
    object_store.fault = lambda method, path: ""
    forget.run(forget.Config(run=Run(ds=DS, lake=bucket), item=ODD, lease_wait_s=0))
    assert names_of(object_store, tmp_path, ODD) == []
