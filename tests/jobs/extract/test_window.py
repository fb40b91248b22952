"""extract by partition: a night that reads the newest days alone leaves what a read of the whole table would have left."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import extract
from jobs.__main__ import build
from jobs.engines.spark import session
from jobs.extract import counts, judge, window
from jobs.lake import partitions
from jobs.lake.items import bury
from jobs.lake.tables import INTERACTIONS, LEFT, QUARANTINE, SEQUENCES, Table
from jobs.report import drift
from jobs.run import InputError, Unavailable, as_json
from tests.jobs.extract.small_spark import SPARK, shared
from tests.jobs.extract.test_extract import CATALOGUE, item_table
from tests.jobs.small_lake import remember

DAY = 86_400


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    with shared():
        yield


def second(day: str, hour: int = 12) -> int:
    return int(dt.datetime.fromisoformat(f"{day}T{hour:02}:00+00:00").timestamp())


def days(first: str, count: int) -> list[str]:
    return [f"{dt.date.fromisoformat(first) + dt.timedelta(days=n)}" for n in range(count)]


def put(table: Path, day: str, events: list[tuple[str, str, int]]) -> Path:
    """One partition of the logs, `day=2026-03-01`."""
    folder = table / f"day={day}"
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(zip(*events, strict=True))
    names = ["user_id", "item_id", "timestamp"]
    pq.write_table(pa.table([pa.array(c) for c in columns], names=names), folder / f"{len(list(folder.iterdir()))}.parquet")
    return folder


@pytest.fixture(scope="module")
def week(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten days of four users' events, a partition each, and a lake after the night of 2026-03-07. Nobody writes here."""
    home = tmp_path_factory.mktemp("week")
    for number, day in enumerate(days("2026-03-01", 10)):
        put(home / "logs", day, [(f"u{u}", f"i{(u + number) % 5}", second(day, u)) for u in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        night(home, "2026-03-07")
    return home


@pytest.fixture
def logs(tmp_path: Path, week: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A week's logs of one's own, under the relative name that every night reads them by."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(week / "logs", tmp_path / "logs"))


@pytest.fixture
def seventh(tmp_path: Path, week: Path, logs: Path) -> Path:
    """The lake after the night of 2026-03-07, which read these logs."""
    return Path(shutil.copytree(week / "lake", tmp_path / "lake"))


@pytest.fixture(scope="module")
def eighth(tmp_path_factory: pytest.TempPathFactory, week: Path) -> Path:
    """A lake after the nights of 2026-03-07 and 08; nobody writes here."""
    home = Path(shutil.copytree(week, tmp_path_factory.mktemp("eighth") / "home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        night(home, "2026-03-08")
    return home / "lake"


def config(tmp: Path, ds: str, lake: str = "lake", **values: Any) -> extract.Config:
    interactions = {"table": "./logs", "partition": "day", "late_days": 2, **values.pop("interactions", {})}
    items = {"table": item_table(tmp / "items.parquet", values.pop("items", CATALOGUE)), "attributes": ["title", "genres"]}
    more = {"spark": SPARK, "max_quarantine_share": 1.0, "max_row_change": 0, "valid_share": 0.2, "test_share": 0.2, **values}
    run = {"ds": ds, "lake": str(tmp / lake)}
    return build(extract.Config, {"run": run, "items": items, "interactions": interactions, **more}, "extract")


def night(tmp: Path, ds: str, **values: Any) -> extract.Result:
    """A run with its manifest, as the command line leaves it."""
    made = config(tmp, ds, **values)
    result = extract.run(made)
    remember(made.run, "extract", result)
    return result


def rows(tmp: Path, table: Table, ds: str, lake: str = "lake") -> list[dict[str, Any]]:
    found = partitions.read(tmp / lake, table, f"ds={ds}").to_pylist()
    return sorted(found, key=lambda row: json.dumps(row, sort_keys=True))


def spoil(folder: Path) -> None:
    """A partition whose rows nobody can read; its schema, which Spark may look at, stays."""
    for file in folder.iterdir():
        kept = file.read_bytes()
        file.write_bytes(kept[:4] + b"\xff" * 60 + kept[64:])


def test_a_night_reads_its_own_days_tells_so_and_leaves_what_a_whole_read_leaves_and_so_does_a_rerun(
    tmp_path: Path, logs: Path, seventh: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = night(tmp_path, "2026-03-09", lake="whole")
    assert expected.reading.why == "no earlier snapshot"
    assert "the whole table, as no earlier snapshot" in capsys.readouterr().err
    for day in days("2026-03-01", 5):
        spoil(logs / f"day={day}")
    result = night(tmp_path, "2026-03-09")
    assert "partitions from 2026-03-06 on, 28 events from the snapshot of 2026-03-07" in capsys.readouterr().err
    assert dataclasses.asdict(result)["source"]["partition"] == "day"
    assert (result.reading.since, result.reading.carried_from, result.reading.whole_ds) == (
        "2026-03-06",
        "2026-03-07",
        "2026-03-07",
    )
    assert (result.seen["interactions"], result.carried, result.later) == (16, 28, 4)
    for table in (INTERACTIONS, SEQUENCES, QUARANTINE):
        assert rows(tmp_path, table, "2026-03-09") == rows(tmp_path, table, "2026-03-09", "whole")
    assert result.cuts == expected.cuts
    assert (
        result.inputs["interactions/ds=2026-03-07"]
        == partitions.read_commit(tmp_path / "lake", "interactions", "ds=2026-03-07").digest
    )
    assert night(tmp_path, "2026-03-09").reading.carried_from == "2026-03-07"
    assert rows(tmp_path, INTERACTIONS, "2026-03-09") == rows(tmp_path, INTERACTIONS, "2026-03-09", "whole")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, week: Path) -> Path:
    """The week and three users without a new event, and a lake after the nights of 2026-03-06 and 07. Nobody writes here."""
    home = tmp_path_factory.mktemp("quiet")
    logs = Path(shutil.copytree(week / "logs", home / "logs"))
    put(logs, "2026-03-02", [("quiet", f"i{n}", second("2026-03-02", n)) for n in range(5)])
    put(logs, "2026-03-03", [("left", "i0", second("2026-03-03")), ("left", "i3", second("2026-03-03", 13))])
    put(logs, "2026-03-04", [("gone", "i0", second("2026-03-04"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        night(home, "2026-03-06")
        night(home, "2026-03-07")
    return home


@pytest.mark.parametrize("values", [{}, {"split": "leave_one_out", "max_history": 3}, {"items": CATALOGUE[1:], "max_history": 3}])
def test_users_without_a_new_event_keep_their_history_night_after_night(
    tmp_path: Path, quiet: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    home = Path(shutil.copytree(quiet, tmp_path / "home"))
    monkeypatch.chdir(home)
    night(home, "2026-03-08", **values)
    result = night(home, "2026-03-09", **values)
    assert (result.reading.carried_from, result.reading.whole_ds) == ("2026-03-08", "2026-03-06")
    night(home, "2026-03-09", lake="whole", **values)
    for table in (INTERACTIONS, SEQUENCES):
        assert rows(home, table, "2026-03-09") == rows(home, table, "2026-03-09", "whole")
    users = {row["user_id"] for row in rows(home, SEQUENCES, "2026-03-09")}
    assert {"quiet", "left"} < users and ("gone" in users) == ("items" not in values)


def test_late_events_within_the_window_come_in_and_are_no_duplicates(tmp_path: Path, logs: Path, seventh: Path) -> None:
    put(logs, "2026-03-06", [("u0", "i4", second("2026-03-02"))])
    put(logs, "2026-03-07", [("u9", "i1", second("2026-03-07", 1)), ("u9", "i1", second("2026-03-07", 1))])
    result = night(tmp_path, "2026-03-08")
    assert result.quarantined == {"interactions: duplicate event": 1}
    kept = {(row["user_id"], row["item_id"], row["timestamp"]) for row in rows(tmp_path, INTERACTIONS, "2026-03-08")}
    assert {("u0", "i4", second("2026-03-02")), ("u9", "i1", second("2026-03-07", 1))} < kept
    assert len(kept) == 34


def test_an_event_dated_later_than_its_partition_waits_and_is_not_lost(tmp_path: Path, logs: Path) -> None:
    put(logs, "2026-03-02", [("u0", "i4", second("2026-03-09", 20))])
    first = night(tmp_path, "2026-03-07")
    assert (first.later, first.later_since) == (13, "2026-03-02")
    result = night(tmp_path, "2026-03-09")
    assert result.reading.since == "2026-03-02"
    assert rows(tmp_path, INTERACTIONS, "2026-03-09") == rows_of_whole(tmp_path, "2026-03-09")


def rows_of_whole(tmp: Path, ds: str) -> list[dict[str, Any]]:
    night(tmp, ds, lake="whole")
    return rows(tmp, INTERACTIONS, ds, "whole")


def test_events_follow_their_items_in_and_out_of_the_catalogue(tmp_path: Path, logs: Path) -> None:
    put(logs, "2026-03-06", [("u0", "new", second("2026-03-06", 20))])
    put(logs, "2026-03-02", [("u0", "new", second("2026-03-02", 20))])
    assert night(tmp_path, "2026-03-07").quarantined == {"interactions: item is unknown": 2}
    items = [*CATALOGUE[1:], ("new", "A new one", None)]
    result = night(tmp_path, "2026-03-08", items=items)
    left = sum(row["item_id"] == "i0" for row in rows(tmp_path, INTERACTIONS, "2026-03-07"))
    assert result.quarantined == {f"interactions: {LEFT}": left, "interactions: item is unknown": 2}
    assert drift.of_extract(as_json(result))["quarantine.interactions"] == pytest.approx(2 / 13)
    refused = [row for row in rows(tmp_path, QUARANTINE, "2026-03-08") if row["reason"] == LEFT]
    assert len(refused) == left
    assert json.loads(refused[0]["record"]).keys() == {"user_id", "item_id", "timestamp"}
    kept = [row["timestamp"] for row in rows(tmp_path, INTERACTIONS, "2026-03-08") if row["item_id"] == "new"]
    assert kept == [second("2026-03-06", 20)]
    whole = night(tmp_path, "2026-03-08", items=items, interactions={"whole_days": 1})
    assert whole.reading.since == ""
    assert sum(row["item_id"] == "new" for row in rows(tmp_path, INTERACTIONS, "2026-03-08")) == 2


def test_what_left_the_catalogue_does_not_count_against_the_new_records(tmp_path: Path, logs: Path, seventh: Path) -> None:
    put(logs, "2026-03-08", [("", "i1", second("2026-03-08"))])
    with pytest.raises(InputError, match="of 13 interactions records"):
        night(tmp_path, "2026-03-08", max_quarantine_share=0.05)
    night(tmp_path, "2026-03-08", items=CATALOGUE[:4], max_quarantine_share=0.4)


def test_what_was_forgotten_is_not_carried(tmp_path: Path, logs: Path, seventh: Path) -> None:
    bury(tmp_path / "lake", "i2", "2026-03-07")
    night(tmp_path, "2026-03-08")
    assert "i2" not in {row["item_id"] for row in rows(tmp_path, INTERACTIONS, "2026-03-08")}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"whole_days": 2}, "the last read of the whole table was for 2026-03-07"),
        ({"partition": ""}, "partition is not set"),
        ({"unit": "ms"}, "made by other settings"),
    ],
)
def test_the_whole_table_is_read_when_the_last_snapshot_is_no_base(
    tmp_path: Path, eighth: Path, changed: dict[str, Any], why: str
) -> None:
    made = config(tmp_path, "2026-03-09", interactions=changed)
    assert window.decide(eighth, "2026-03-09", config(tmp_path, "2026-03-09").interactions).carried_from == "2026-03-08"
    reading = window.decide(eighth, "2026-03-09", made.interactions)
    assert (reading.since, reading.carried_from, reading.whole_ds) == ("", "", "2026-03-09")
    assert why in reading.why


def test_a_snapshot_without_a_manifest_is_no_base(tmp_path: Path, logs: Path, seventh: Path) -> None:
    shutil.rmtree(seventh / "manifests")
    assert "other settings" in night(tmp_path, "2026-03-08").reading.why


def test_a_backfilled_date_goes_on_from_the_snapshot_before_it(tmp_path: Path, logs: Path, week: Path, eighth: Path) -> None:
    shutil.copytree(eighth, tmp_path / "lake", ignore=shutil.ignore_patterns("ds=2026-03-07"))
    night(tmp_path, "2026-03-05")
    assert night(tmp_path, "2026-03-07").reading.carried_from == "2026-03-05"
    assert rows(tmp_path, INTERACTIONS, "2026-03-07") == rows(week, INTERACTIONS, "2026-03-07"), "which was read whole"


def written_days(tmp: Path, form: str) -> dict[str, str]:
    """One event a day up to 2026-03-09 in one file, its days written in a form."""
    written = [dt.date.fromisoformat(day) for day in days("2026-03-01", 9)]
    value = pa.array(written) if form in ("date", "timestamp") else pa.array([day.strftime(form) for day in written])
    value = value.cast(pa.timestamp("us")) if form == "timestamp" else value
    values = [
        pa.array(["u0"] * 9),
        pa.array([f"i{n % 5}" for n in range(9)]),
        pa.array([second(f"{day}") for day in written]),
        value,
    ]
    pq.write_table(pa.table(values, names=["user_id", "item_id", "timestamp", "day"]), tmp / "logs.parquet")
    return {"table": str(tmp / "logs.parquet")}


@pytest.mark.parametrize("form", ["%Y%m%d", "%Y-%m-%d", "date", "timestamp"])
def test_days_are_read_as_people_write_them(tmp_path: Path, form: str) -> None:
    made = config(tmp_path, "2026-03-08", interactions=written_days(tmp_path, form))
    reading = window.Reading(since="2026-03-05", carried_from="2026-03-06", whole_ds="2026-03-06")
    found = judge.read_events(session("test", {}), made, reading).collect()
    assert sorted(f"{row.day}" for row in found) == days("2026-03-05", 5)


def test_a_night_reads_its_own_days_of_a_table_whose_days_are_texts(tmp_path: Path) -> None:
    table = written_days(tmp_path, "%Y%m%d")
    night(tmp_path, "2026-03-06", interactions=table)
    result = night(tmp_path, "2026-03-08", interactions=table)
    assert (result.seen["interactions"], result.carried, result.rows["interactions"]) == (4, 6, 8)


def test_partitions_without_a_readable_day_are_read_every_night(tmp_path: Path, logs: Path) -> None:
    put(logs, "__HIVE_DEFAULT_PARTITION__", [("u7", "i1", second("2026-03-01"))])
    night(tmp_path, "2026-03-07")
    put(logs, "__HIVE_DEFAULT_PARTITION__", [("u8", "i1", second("2026-03-01"))])
    night(tmp_path, "2026-03-08")
    assert {"u7", "u8"} < {row["user_id"] for row in rows(tmp_path, INTERACTIONS, "2026-03-08")}


def test_bad_settings_and_empty_windows_are_one_error_with_the_remedy(tmp_path: Path, logs: Path) -> None:
    with pytest.raises(InputError, match=r"no column 'dt'; it has .*day"):
        night(tmp_path, "2026-03-07", interactions={"partition": "dt"})
    for bad in ({"late_days": -1}, {"whole_days": 0}):
        with pytest.raises(InputError, match=r"late_days must be at least 0, whole_days at least 1"):
            config(tmp_path, "2026-03-07", interactions=bad)
    night(tmp_path, "2026-03-10")
    with pytest.raises(Unavailable, match=r"no record up to 2026-03-11 from 2026-03-11 on: has the upstream load run\?"):
        night(tmp_path, "2026-03-11", interactions={"late_days": 0})


def test_a_night_that_waits_for_its_partition_asks_for_that_alone(
    tmp_path: Path, seventh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("nothing is judged before the logs are there")

    for ds, most, oldest in (("2026-03-11", 0, "2026-03-11"), ("2026-03-13", 2, "2026-03-11")):
        with monkeypatch.context() as patch:
            patch.setattr(counts, "of_items", never)
            with pytest.raises(Unavailable, match=rf"logs has no partition from {oldest} on .*max_age_days = {most}"):
                night(tmp_path, ds, max_age_days=most)
        assert not partitions.is_committed(tmp_path / "lake", QUARANTINE.name, f"ds={ds}")
    assert night(tmp_path, "2026-03-12", max_age_days=2).rows["interactions"] == 40
