"""Collect on a lake in a bucket: what is old is told by the times of its objects, and the same goes as of a folder."""

from __future__ import annotations

import datetime as dt
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID

from feature_repo.reader import offline_folder
from jobs.lake import partitions
from jobs.lake.locks import alone
from tests.jobs.collect.test_collect import LONG_AGO, dates_of, tidy
from tests.jobs.collect.test_collect import old as old
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store


def age(object_store: ObjectStore, prefix: str, moment: float) -> None:
    """Makes objects as old as if they had been put then."""
    keys = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"].buckets[object_store.bucket].keys
    for key in [key for key in keys if key.startswith(f"lake/{prefix}")]:
        keys[key].last_modified = dt.datetime.fromtimestamp(moment, dt.UTC).replace(tzinfo=None)


@pytest.fixture
def bucket(old: Path, object_store: ObjectStore) -> Path:
    """The lake `old`, copied to a bucket long ago; the online store is a copy beside its scratch folder."""
    lake = object_store.copy_of(old)
    for path in old.rglob("*.db"):
        copy = lake / path.relative_to(old)
        copy.parent.mkdir(parents=True, exist_ok=True)
        # by SQLite itself: what was written last may lie in the log beside the file, which goes with whoever has it open
        with closing(sqlite3.connect(path)) as here, closing(sqlite3.connect(copy)) as there:
            here.backup(there)
    age(object_store, "", LONG_AGO)
    return lake


def test_what_is_old_goes_by_the_times_of_its_objects(old: Path, bucket: Path, object_store: ObjectStore) -> None:
    before = object_store.objects()
    planned = tidy(bucket, dry_run=True)
    assert object_store.objects() == before
    done, here = tidy(bucket), tidy(old)
    assert (done.lake_removed, done.lake_bytes) == (planned.lake_removed, planned.lake_bytes)
    assert (done.lake_removed, done.lake_bytes) == (here.lake_removed, here.lake_bytes)
    for name in ("items", "sequences", "item_embeddings", "llm_embeddings"):
        assert partitions.committed(bucket, name) == partitions.committed(old, name)
    assert offline_folder(bucket) == f"{object_store.address()}/feast/offline"
    after = object_store.objects()
    gone = {key: len(data) for key, data in before.items() if key not in after}
    assert sum(gone.values()) == sum(done.lake_bytes.values())
    assert {key.split("/")[0] for key in gone} == {"items", "sequences", "item_embeddings", "llm_embeddings", "feast"}
    assert tidy(bucket).lake_removed == []


def test_what_was_put_of_late_or_is_being_written_stays(bucket: Path, object_store: ObjectStore) -> None:
    now = dt.datetime.now(dt.UTC).timestamp()
    age(object_store, f"items/ds=2026-01-05/{partitions.COMMIT}", now)
    age(object_store, "llm_embeddings/encoder=e2/shard=0/", now)
    with alone(bucket, "extract 2026-01-04"):
        tidy(bucket)
    assert {"2026-01-04", "2026-01-05"} <= set(dates_of(bucket, "items"))
    assert "2026-01-06" not in dates_of(bucket, "items") and "2026-01-05" not in dates_of(bucket, "sequences")
    assert partitions.committed(bucket, "llm_embeddings") == [f"encoder={name}/shard=0" for name in ("e1", "e2", "e3")]
