"""extract between two nights: what is new or changed in the table of items, and nothing of the nights' own tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs import extract
from jobs.lake import arrivals, partitions
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.items import bury, content_hash
from jobs.run import InputError, Refused
from tests.jobs.extract.test_extract import CATALOGUE, DS, LOGS, config, item_table
from tests.jobs.extract.test_extract import first as first  # for pytest, which looks fixtures up here
from tests.jobs.extract.test_extract import night as night
from tests.jobs.extract.test_extract import one_session as one_session

LATE = [
    ("i0", "Another title", ["war"]),
    *CATALOGUE[1:4],
    ("new", "A new one", ["love"]),
    ("gone", "Forgotten", None),
    (None, "x", None),
]


def bytes_of(lake: Path) -> dict[str, bytes]:
    """Every file of the nights' tables."""
    return {
        str(path): path.read_bytes() for path in lake.rglob("*.parquet") if not path.parts[len(lake.parts)].startswith("arriving")
    }


def test_new_and_changed_items_arrive_and_no_table_of_the_nights_changes(tmp_path: Path, first: extract.Result) -> None:
    lake = tmp_path / "lake"
    bury(lake, "gone", DS)
    before = bytes_of(lake)
    result = extract.run(config(tmp_path, LATE, "no such table", arriving=True))
    assert isinstance(result, extract.arrivals.Result)
    assert (result.new_items, result.changed_items, result.quarantined) == (1, 1, 1)
    rows = {row["item_id"]: row for row in partitions.read(lake, ARRIVING_ITEMS, f"ds={DS}").to_pylist()}
    assert set(rows) == {"i0", "new"}
    assert rows["i0"]["content_hash"] == content_hash([("title", "Another title"), ("genres", "war")])
    assert bytes_of(lake) == before
    assert partitions.committed(lake, "items") == [f"ds={DS}"]


def test_what_arrived_and_went_again_is_gone_and_older_dates_are_cleared(tmp_path: Path, first: extract.Result) -> None:
    lake = tmp_path / "lake"
    bury(lake, "gone", DS)
    assert extract.run(config(tmp_path, LATE, LOGS, arriving=True)).rows == {ARRIVING_ITEMS.name: 2}
    assert extract.run(config(tmp_path, CATALOGUE, LOGS, arriving=True)).rows == {ARRIVING_ITEMS.name: 0}
    extract.run(config(tmp_path, CATALOGUE, LOGS, ds="2026-03-11"))
    extract.run(config(tmp_path, CATALOGUE, LOGS, ds="2026-03-11", arriving=True))
    assert partitions.committed(lake, ARRIVING_ITEMS.name) == ["ds=2026-03-11"]
    assert arrivals.digest(lake, ARRIVING_ITEMS.name, f"ds={DS}") == ""


def test_what_arrives_is_looked_for_in_the_table_of_the_present(tmp_path: Path, first: extract.Result) -> None:
    now = item_table(tmp_path / "now.parquet", LATE)
    made = config(tmp_path, CATALOGUE, LOGS)
    as_of = dataclasses.replace(made.items, table=str(tmp_path / "items-{ds}.parquet"))
    with pytest.raises(InputError, match=r"in which nothing arrives: name the table of the present in extract\.items\.now"):
        dataclasses.replace(made, items=as_of, arriving=True)
    result = extract.run(dataclasses.replace(made, items=dataclasses.replace(as_of, now=now), arriving=True))
    assert isinstance(result, extract.arrivals.Result)
    assert (result.new_items, result.changed_items) == (2, 1)


def test_without_the_snapshot_or_with_too_many_items_it_is_left_to_the_night(tmp_path: Path, first: extract.Result) -> None:
    with pytest.raises(InputError, match="run the job that writes items"):
        extract.run(config(tmp_path, CATALOGUE, LOGS, ds="2026-03-09", arriving=True))
    with pytest.raises(Refused, match=r"more than extract\.most_arriving = 1 items"):
        extract.run(config(tmp_path, LATE, LOGS, arriving=True, most_arriving=1))
