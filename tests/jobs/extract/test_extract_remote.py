"""extract into a lake on an object store: the same rows as into a folder, equal objects on a rerun, no shared file system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import extract
from jobs.lake import partitions
from jobs.lake.items import bury
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, Table
from jobs.run import InputError, Unavailable
from tests.jobs.extract.small_spark import QUICK, shared
from tests.jobs.extract.test_arrivals import LATE
from tests.jobs.extract.test_window import config, days, logs, spoil, week
from tests.jobs.small_lake import remember
from tests.object_store import ObjectStore, object_server, object_store

__all__ = ["logs", "object_server", "object_store", "week"]  # for pytest, which looks fixtures up here


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    """One session for all tests, whose executors may get at the store, as a cluster's settings say."""
    leave = {f"spark.executorEnv.AWS_{name}": "test" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
    with shared({**QUICK, **leave}):
        yield


TABLES = (ITEMS, INTERACTIONS, SEQUENCES, QUARANTINE)


def night(tmp: Path, ds: str, lake: str, **values: Any) -> extract.Result:
    """A run with its manifest; `lake` is an address, or a folder's name."""
    made = config(tmp, ds, **values)
    object.__setattr__(made.run, "lake", Path(lake) if "://" in lake else tmp / lake)
    made.run.__post_init__()
    result = extract.run(made)
    assert isinstance(result, extract.Result)
    remember(made.run, "extract", result)
    return result


def rows(lake: Path, table: Table, ds: str) -> list[str]:
    return sorted(json.dumps(row, sort_keys=True) for row in partitions.read(lake, table, f"ds={ds}").to_pylist())


def of(object_store: ObjectStore) -> Path:
    """The lake's folder on this machine."""
    from jobs.lake.store import place

    return place(Path(object_store.address()))


def test_two_nights_leave_the_rows_that_they_leave_in_a_folder_and_a_rerun_leaves_equal_objects(
    tmp_path: Path, logs: Path, object_store: ObjectStore
) -> None:
    lake = object_store.address()
    first = night(tmp_path, "2026-03-07", "folder"), night(tmp_path, "2026-03-07", lake)
    for day in days("2026-03-01", 5):
        spoil(logs / f"day={day}")
    later = night(tmp_path, "2026-03-09", "folder"), night(tmp_path, "2026-03-09", lake)
    for here, there in (first, later):
        assert (here.rows, here.seen, here.carried, here.reading) == (there.rows, there.seen, there.carried, there.reading)
        assert (here.new_items, here.changed_items, here.days, here.cuts) == (
            there.new_items, there.changed_items, there.days, there.cuts,
        )  # fmt: skip
    for ds in ("2026-03-07", "2026-03-09"):
        for table in TABLES:
            assert rows(of(object_store), table, ds) == rows(tmp_path / "folder", table, ds), (table.name, ds)
    made = {key: data for key, data in object_store.objects().items() if key.split("/")[0] in {table.name for table in TABLES}}
    assert night(tmp_path, "2026-03-09", lake).outputs == later[1].outputs
    again = {key: data for key, data in object_store.objects().items() if key in made or "ds=2026" in key.split("/")[1]}
    assert {key: again[key] for key in made} == made
    assert not [key for key in again if key.endswith(".parquet") and key not in made]


def test_what_arrived_and_what_was_forgotten_are_known_there_too(tmp_path: Path, logs: Path, object_store: ObjectStore) -> None:
    night(tmp_path, "2026-03-07", object_store.address())
    lake = of(object_store)
    bury(lake, "gone", "2026-03-07")
    made = config(tmp_path, "2026-03-07", items=LATE, arriving=True)
    object.__setattr__(made.run, "lake", lake)
    result = extract.run(made)
    assert isinstance(result, extract.arrivals.Result)
    assert (result.new_items, result.changed_items) == (1, 1)


def test_a_snapshot_is_not_committed_where_a_part_was_not_put(
    tmp_path: Path, logs: Path, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.engines import spark_parts

    put = spark_parts.put
    monkeypatch.setattr(spark_parts, "put", lambda *given: put(*given)[1:] if "/sequences/" in f"/{given[2]}" else put(*given))
    with pytest.raises(InputError, match=r"sequences/ds=2026-03-07: .* rows were put into s3://"):
        night(tmp_path, "2026-03-07", object_store.address())
    assert not partitions.is_committed(of(object_store), "sequences", "ds=2026-03-07")


def test_what_the_store_refuses_a_task_is_told_as_what_it_is(tmp_path: Path, logs: Path, object_store: ObjectStore) -> None:
    object_store.fault = lambda method, path: "deny" if method == "PUT" and "/items/" in path else ""
    with pytest.raises(InputError, match=r"does not let us at items/ds=2026-03-07/part-00000.*: check the credentials"):
        night(tmp_path, "2026-03-07", object_store.address())


def test_another_extract_of_the_same_date_that_was_faster_is_told_by_name(
    tmp_path: Path, logs: Path, object_store: ObjectStore
) -> None:
    lake, other = object_store.address(), [False]

    def fault(method: str, path: str) -> str:
        if method == "PUT" and path.endswith("items/ds=2026-03-07/_commit.json") and not other[0]:
            other[0] = True  # somebody who knows of no lock commits between our parts and our commit
            object_store.client.put_object(
                Bucket=object_store.bucket, Key="lake/items/ds=2026-03-07/_commit.json", Body=b'{"files": [], "digest": "x"}'
            )
        return ""

    object_store.fault = fault
    with pytest.raises(Unavailable, match="items/ds=2026-03-07: another writer committed it at the same time"):
        night(tmp_path, "2026-03-07", lake)
