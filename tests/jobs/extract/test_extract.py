"""extract: what comes in bad lies in quarantine with its reason; what is kept keeps the contract."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import DataFrameWriter

from jobs import extract
from jobs.__main__ import build
from jobs.engines.spark import session
from jobs.extract import judge
from jobs.lake import partitions
from jobs.lake.items import bury, content_hash
from jobs.lake.locks import alone
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES
from jobs.run import InputError, Refused, Unavailable
from tests.jobs.extract.small_spark import SPARK, shared
from tests.jobs.small_lake import remember
from tests.jobs.waiting import until

DS = "2026-03-10"
NOON = int(dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC).timestamp())
DAY = 86_400

Item = tuple[str | None, str | None, list[str] | None]
Event = tuple[str | None, str | None, int | None]


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    with shared():
        yield


def item_table(path: Path, rows: list[Item]) -> str:
    columns = list(zip(*rows, strict=True))
    schema = pa.schema([("item_id", pa.string()), ("title", pa.string()), ("genres", pa.list_(pa.string()))])
    pq.write_table(pa.table([pa.array(c, t.type) for c, t in zip(columns, schema, strict=True)], schema), path)
    return str(path)


def event_table(path: Path, rows: list[Event]) -> str:
    columns = list(zip(*rows, strict=True)) or [[], [], []]
    schema = pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())])
    pq.write_table(pa.table([pa.array(c, t.type) for c, t in zip(columns, schema, strict=True)], schema), path)
    return str(path)


def config(tmp: Path, items: list[Item] | str, events: list[Event] | str, **values: Any) -> extract.Config:
    items = items if isinstance(items, str) else item_table(tmp / "items.parquet", items)
    events = events if isinstance(events, str) else event_table(tmp / "events.parquet", events)
    run = {"ds": values.pop("ds", DS), "lake": str(tmp / "lake")}
    more = {"spark": SPARK, "max_quarantine_share": 1.0, **values}
    table = {"run": run, "items": {"table": items, "attributes": ["title", "genres"]}, "interactions": {"table": events}}
    table["interactions"] |= more.pop("interactions", {})  # type: ignore[operator]
    return build(extract.Config, {**table, **more}, "extract")


CATALOGUE: list[Item] = [(f"i{n}", f"Title {n}", ["drama", "war"]) for n in range(5)]
LOGS: list[Event] = [(f"u{u}", f"i{n}", NOON + (u + n) * DAY) for u in range(4) for n in range(5)]


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, extract.Result]:
    """A folder with a lake after a night of good input, and its figures. Nobody writes here."""
    home = tmp_path_factory.mktemp("night")
    result = extract.run(config(home, CATALOGUE, LOGS))
    assert isinstance(result, extract.Result)
    return home, result


@pytest.fixture
def first(tmp_path: Path, night: tuple[Path, extract.Result]) -> extract.Result:
    """The lake after that night, to go on from, and its figures."""
    shutil.copytree(night[0], tmp_path, dirs_exist_ok=True)
    return night[1]


def test_good_input_becomes_three_tables_that_keep_their_contracts(night: tuple[Path, extract.Result]) -> None:
    (home, result), part = night, f"ds={DS}"
    lake = home / "lake"
    items = {row["item_id"]: row for row in partitions.read(lake, ITEMS, part).to_pylist()}
    assert items["i3"]["attributes"] == [{"name": "title", "value": "Title 3"}, {"name": "genres", "value": "drama, war"}]
    assert items["i3"]["content_hash"] == content_hash([("title", "Title 3"), ("genres", "drama, war")])
    assert items["i3"]["first_seen_ds"] == DS
    assert partitions.read(lake, INTERACTIONS, part).num_rows == 20
    users = {row["user_id"]: row for row in partitions.read(lake, SEQUENCES, part).to_pylist()}
    assert users["u1"]["item_ids"] == ["i0", "i1", "i2", "i3", "i4"]
    assert users["u1"]["timestamps"] == sorted(users["u1"]["timestamps"])
    cut = int(dt.datetime.fromisoformat(result.cuts["test"] + "T00:00:00+00:00").timestamp())
    assert all(row["valid_end"] == sum(t < cut for t in row["timestamps"]) for row in users.values())
    assert 0 < sum(row["train_end"] for row in users.values()) < 20
    assert result.rows == {"items": 5, "interactions": 20, "sequences": 4, "quarantine": 0}
    assert result.fill == {"title": 1.0, "genres": 1.0}
    assert result.lists == {"genres": ", "}, "filters of serving are told which texts are lists"


def test_a_text_that_holds_several_values_is_a_list_where_the_recipe_says_so(tmp_path: Path) -> None:
    some = config(tmp_path, CATALOGUE, LOGS)
    told = dataclasses.replace(some, items=dataclasses.replace(some.items, lists={"title": "|"}))
    assert judge.lists(judge.read_items(session("test", {}), told), told) == {"genres": ", ", "title": "|"}
    for lists in ({"brand": "|"}, {"title": ""}):
        with pytest.raises(InputError, match=r"extract\.items\.lists has"):
            dataclasses.replace(some.items, lists=lists)


def test_an_event_at_the_cut_belongs_to_the_later_part(tmp_path: Path) -> None:
    midnight = NOON - DAY // 2
    logs: list[Event] = [(f"u{u}", f"i{n}", midnight + (u + n) * DAY) for u in range(4) for n in range(5)]
    result = extract.run(config(tmp_path, CATALOGUE, logs))
    valid, test = (
        int(dt.datetime.fromisoformat(f"{result.cuts[part]}T00:00:00+00:00").timestamp()) for part in ("valid", "test")
    )
    rows = partitions.read(tmp_path / "lake", SEQUENCES, f"ds={DS}").to_pylist()
    assert {valid, test} <= {moment for row in rows for moment in row["timestamps"]}
    for row in rows:
        assert row["train_end"] == sum(moment < valid for moment in row["timestamps"])
        assert row["valid_end"] == sum(moment < test for moment in row["timestamps"])


def test_every_bad_record_lies_in_quarantine_with_its_reason(tmp_path: Path) -> None:
    now = int(dt.datetime.now(dt.UTC).timestamp())
    items: list[Item] = [
        *CATALOGUE,
        (None, "no id", None),
        ("  ", "blank id", None),
        ("i1", "Title 1 again", None),
        ("bare", None, []),
        ("blank", "  ", [" "]),
    ]
    events: list[Event] = [
        *LOGS,
        (None, "i1", NOON),
        ("u1", "", NOON),
        ("u1", "i1", None),
        ("u1", "i1", -5),
        ("u1", "i1", NOON * 1000),
        ("u1", "i1", now + 90 * DAY),
        ("u1", "nobody", NOON),
        ("u1", "bare", NOON),
        LOGS[0],
    ]
    result = extract.run(config(tmp_path, items, events))
    reasons = {
        "items: item_id is null or empty": 2,
        "items: duplicate item_id: the fullest record was kept": 1,
        "items: no attributes": 2,
        "interactions: user_id is null or empty": 1,
        "interactions: item_id is null or empty": 1,
        "interactions: timestamp is null or not a number": 1,
        "interactions: timestamp is before 1970": 1,
        "interactions: timestamp is not in s: set extract.interactions.unit": 1,
        "interactions: timestamp is in the future": 1,
        "interactions: item is unknown": 2,
        "interactions: duplicate event": 1,
    }
    assert result.quarantined == reasons
    rows = partitions.read(tmp_path / "lake", QUARANTINE, f"ds={DS}").to_pylist()
    assert Counter(f"{row['source']}: {row['reason']}" for row in rows) == reasons
    assert {"item_id": "i1", "title": "Title 1 again"} in [json.loads(row["record"]) for row in rows]
    assert result.rows["items"] == 5 and result.rows["interactions"] == 20
    kept = partitions.read(tmp_path / "lake", ITEMS, f"ds={DS}").to_pylist()
    assert [row["attributes"][0]["value"] for row in kept if row["item_id"] == "i1"] == ["Title 1"]


def test_odd_characters_hash_as_python_hashes_them(tmp_path: Path) -> None:
    odd = ["a;b\nc", "日本語 ☃ 😀", '<script>"x"</script>', "tab\tand \\ and 'quote'"]
    extract.run(config(tmp_path, [(f"i{n}", text, None) for n, text in enumerate(odd)] + CATALOGUE[4:], LOGS))
    for row in partitions.read(tmp_path / "lake", ITEMS, f"ds={DS}").to_pylist():
        pairs = [(pair["name"], pair["value"]) for pair in row["attributes"]]
        assert row["content_hash"] == content_hash(pairs)
    values = {row["attributes"][0]["value"] for row in partitions.read(tmp_path / "lake", ITEMS, f"ds={DS}").to_pylist()}
    assert set(odd) <= values


def test_a_rerun_leaves_the_same_bytes(tmp_path: Path, night: tuple[Path, extract.Result], first: extract.Result) -> None:
    tables = (f"{night[0]}/{name}.parquet" for name in ("items", "events"))
    assert extract.run(config(tmp_path, *tables)) == first


def test_of_two_runs_of_one_date_the_second_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, told = config(tmp_path, CATALOGUE, LOGS), [""]

    def waiting() -> bool:
        told.append(capsys.readouterr().err)
        return "waiting for extract" in "".join(told)

    with ThreadPoolExecutor(1) as aside:
        with alone(tmp_path / "lake", f"extract {DS}"):
            second = aside.submit(extract.run, made)
            until(lambda: waiting() or second.done(), "the second run's word that it waits")
            assert not second.done() and not partitions.committed(tmp_path / "lake", "items")
        assert second.result(120).rows["items"] == len(CATALOGUE)


def test_the_next_snapshot_knows_new_and_changed_items(tmp_path: Path, first: extract.Result) -> None:
    later: list[Item] = [("i0", "Title 0, second edition", None), *CATALOGUE[1:], ("i9", "New", None)]
    bad: list[Item] = [("i1", "Title 1 again", None), ("bare", None, None), (None, "No id", None)]
    result = extract.run(config(tmp_path, [*later, *bad], LOGS, ds="2026-03-11"))
    assert (result.new_items, result.changed_items) == (1, 1), "what is refused is neither"
    assert (result.seen["items"], result.fill) == (9, {"title": 1.0, "genres": 0.6667})
    seen = {
        row["item_id"]: row["first_seen_ds"] for row in partitions.read(tmp_path / "lake", ITEMS, "ds=2026-03-11").to_pylist()
    }
    assert seen["i0"] == DS and seen["i9"] == "2026-03-11"


def test_events_after_ds_wait_for_their_own_snapshot(tmp_path: Path) -> None:
    result = extract.run(config(tmp_path, CATALOGUE, [*LOGS, ("u1", "i1", NOON + 40 * DAY)]))
    assert result.later == 1 and result.rows["interactions"] == 20 and not result.quarantined


def test_milliseconds_are_read_where_the_recipe_says_so(tmp_path: Path) -> None:
    logs: list[Event] = [(user, item, (moment or 0) * 1000) for user, item, moment in LOGS]
    extract.run(config(tmp_path, CATALOGUE, logs, interactions={"unit": "ms"}))
    rows = partitions.read(tmp_path / "lake", INTERACTIONS, f"ds={DS}")
    assert min(rows["timestamp"].to_pylist()) == NOON


def test_leave_one_out_gives_the_last_two_events_to_validation_and_test(tmp_path: Path) -> None:
    logs: list[Event] = [*LOGS, ("short", "i1", NOON), ("short", "i2", NOON + DAY)]
    extract.run(config(tmp_path, CATALOGUE, logs, split="leave_one_out"))
    rows = {row["user_id"]: row for row in partitions.read(tmp_path / "lake", SEQUENCES, f"ds={DS}").to_pylist()}
    assert (rows["u1"]["train_end"], rows["u1"]["valid_end"]) == (3, 4)
    assert (rows["short"]["train_end"], rows["short"]["valid_end"]) == (2, 2)


def test_a_long_history_keeps_its_newest_events(tmp_path: Path) -> None:
    extract.run(config(tmp_path, CATALOGUE, LOGS, max_history=3))
    rows = partitions.read(tmp_path / "lake", SEQUENCES, f"ds={DS}").to_pylist()
    assert {tuple(row["item_ids"]) for row in rows} == {("i2", "i3", "i4")}


def test_what_was_forgotten_does_not_come_back(tmp_path: Path) -> None:
    bury(tmp_path / "lake", "i2", DS)
    result = extract.run(config(tmp_path, CATALOGUE, LOGS))
    for table in (ITEMS, INTERACTIONS):
        assert "i2" not in partitions.read(tmp_path / "lake", table, f"ds={DS}")["item_id"].to_pylist()
    assert all("i2" not in row["item_ids"] for row in partitions.read(tmp_path / "lake", SEQUENCES, f"ds={DS}").to_pylist())
    assert result.forgotten == 1 and not result.quarantined


def test_registered_tables_are_read_by_name(tmp_path: Path) -> None:
    spark = session("test", {})
    items, events = item_table(tmp_path / "i.parquet", CATALOGUE), event_table(tmp_path / "e.parquet", LOGS)
    spark.read.parquet(items).createOrReplaceGlobalTempView("catalogue")
    spark.read.parquet(events).createOrReplaceGlobalTempView("logs")
    assert extract.run(config(tmp_path, "global_temp.catalogue", "global_temp.logs")).rows["items"] == 5


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"items": "no.such_table"}, "extract.items.table = 'no.such_table' cannot be read"),
        ({"items": "/no/such/path"}, "cannot be read .*name a table or a Parquet path"),
        ({"interactions": {"timestamp": "at"}}, "has no column 'at'; it has user_id, item_id, timestamp"),
        ({"events": []}, "has no record up to 2026-03-10: check the table and --ds"),
        ({"ds": "2020-01-01"}, "has no record up to 2020-01-01"),
        ({"min_day_share": 1}, "min_day_share must be at least 0 and below 1"),
        ({"max_age_days": -1}, "max_age_days at least 0"),
        ({"items": "no.such TIMESTAMP AS OF '{ds}'"}, "items.table = \"no.such TIMESTAMP AS OF '2026-03-10'\" cannot be read"),
        ({"events": LOGS[:5]}, 'cannot be cut into train, validation and test .* set extract.split = "leave_one_out"'),
        (
            {"events": [(u, i, (t or 0) * 1000) for u, i, t in LOGS], "max_quarantine_share": 0.1},
            "20 of 20 .*not in s: set extract",
        ),
    ],
)
def test_bad_input_is_one_error_with_its_remedy(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    items = values.pop("items", CATALOGUE)
    if values.get("events") == LOGS[:5]:
        values["events"] = [("u", f"i{n}", NOON) for n in range(5)]
    with pytest.raises(InputError, match=complaint):
        extract.run(config(tmp_path, items, values.pop("events", LOGS), **values))


def test_logs_that_are_not_there_yet_may_come_later(tmp_path: Path) -> None:
    for most, ds in (1, "2026-03-20"), (0, "2026-03-09"):
        with pytest.raises(Unavailable, match=rf"the newest event .* is \d+ days older than {ds}"):
            extract.run(config(tmp_path, CATALOGUE, LOGS, max_age_days=most, ds=ds))
    assert extract.run(config(tmp_path, CATALOGUE, LOGS, max_age_days=0, ds="2026-03-08")).rows["interactions"] == 20


@pytest.mark.parametrize("side", ["items", "interactions"])
def test_a_table_of_a_date_that_is_not_there_yet_may_come_later(tmp_path: Path, side: str) -> None:
    tables = {"items": item_table(tmp_path / "i.parquet", CATALOGUE), "interactions": event_table(tmp_path / "e.parquet", LOGS)}
    (tmp_path / f"empty-{DS}").mkdir()
    for missing in (f"{tmp_path}/ds={{ds}}", f"{tmp_path}/empty-{{ds}}", "shop.`of_{ds}`"):
        given = tables | {side: missing}
        with pytest.raises(Unavailable, match=rf"extract.{side}.table = .* is not there: has the upstream load run"):
            extract.run(config(tmp_path, given["items"], given["interactions"]))
    with pytest.raises(InputError, match="cannot be read"):  # one that has no date in its name comes no more
        given = tables | {side: f"{tmp_path}/nowhere"}
        extract.run(config(tmp_path, given["items"], given["interactions"]))
    with pytest.raises(InputError, match="dashes or blanks stands in backticks"):
        given = tables | {side: "shop.of_{ds}"}
        extract.run(config(tmp_path, given["items"], given["interactions"]))


HUNDRED: list[Event] = [(f"u{u}", f"i{u % 5}", NOON + (day - 99) * DAY + u) for day in range(100) for u in range(40)]
"""A hundred days of forty events each, up to 2026-03-01."""


def of_day(event: Event) -> int:
    return ((event[2] or 0) - NOON + 100 * DAY) // DAY - 1


def test_a_lost_day_of_a_hundred_is_refused(tmp_path: Path) -> None:
    extract_night(tmp_path, [event for event in HUNDRED if of_day(event) < 98], "2026-02-27")
    kinds: list[tuple[int, int, type[Exception]]] = [(99, 0, Unavailable), (98, 0, Refused), (99, 10, Unavailable)]
    for lost, count, kind in kinds:  # the date's own day may still be filling
        some = [event for event in HUNDRED if of_day(event) != lost or int((event[0] or "u0")[1:]) < count]
        day = dt.date(2026, 3, 1) - dt.timedelta(days=99 - lost)
        with pytest.raises(kind, match=rf"lacks events: {day} has {count}, usual of its weekday: 40 .*min_day_share=0"):
            extract_night(tmp_path, some, "2026-03-01")
    assert extract.run(config(tmp_path, CATALOGUE, some, ds="2026-03-01", min_day_share=0)).rows["interactions"] > 3900
    assert extract_night(tmp_path, HUNDRED, "2026-03-01").days["2026-03-01"] == 40
    some = [event for event in HUNDRED if of_day(event) != 90]
    with pytest.raises(Refused, match="2026-02-20 has 0, usual when it was last read: 40"):
        extract_night(tmp_path, some, "2026-03-02", min_day_share=0.01, extra=[("u1", "i1", NOON + DAY + n) for n in range(40)])


def extract_night(tmp: Path, events: list[Event], ds: str, extra: list[Event] | None = None, **values: Any) -> extract.Result:
    """A run with its manifest, as the command line leaves it."""
    made = config(tmp, CATALOGUE, [*events, *(extra or [])], ds=ds, **values)
    result = extract.run(made)
    remember(made.run, "extract", result)
    return result


def test_bad_records_after_ds_are_not_judged(tmp_path: Path) -> None:
    """A year of one bad record in a hundred, half of them without a time, fails no date of a backfill."""
    year: list[Event] = [(f"u{n % 7}", f"i{n % 5}", NOON + n * 3 * 3600) for n in range(2_000)]
    bad: list[Event] = [("u1", "nobody", NOON + n * 2 * DAY) for n in range(10)] + [("u1", "i1", None)] * 10
    result = extract.run(
        config(tmp_path, CATALOGUE, [*year, *bad], ds="2026-03-03", max_quarantine_share=0.1, split="leave_one_out")
    )
    early = sum(NOON <= (event[2] or 0) < NOON + 2.5 * DAY for event in year)
    assert (result.rows["interactions"], result.later, result.undated) == (early, 2_000 - early + 8, 10)
    assert result.quarantined == {
        "interactions: item is unknown": 2,
        "interactions: timestamp is null or not a number": 10,
    }
    with pytest.raises(InputError, match=r"22 of 42 interactions records \(52\.\d%\)"):
        more: list[Event] = [("u1", "nobody", NOON + n) for n in range(20)]
        extract.run(
            config(tmp_path, CATALOGUE, [*year, *bad, *more], ds="2026-03-03", max_quarantine_share=0.1, split="leave_one_out")
        )
    assert partitions.read(tmp_path / "lake", QUARANTINE, "ds=2026-03-03").num_rows == 32, "what it refused can be looked at"
    assert partitions.read(tmp_path / "lake", INTERACTIONS, "ds=2026-03-03").num_rows == early, "and the snapshot stays"


def test_the_catalogue_of_a_backfill_is_that_of_its_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ds=2026-03-09").mkdir()
    item_table(tmp_path / "ds=2026-03-09" / "items.parquet", CATALOGUE)
    (tmp_path / "ds=2026-03-09" / "_SUCCESS").touch()
    then = config(tmp_path, f"{tmp_path}/ds={{ds}}", LOGS, ds="2026-03-09")
    result = extract.run(then)
    assert (result.catalogue, result.rows["items"]) == ("of 2026-03-09", 5)
    assert f"{tmp_path}/ds=2026-03-09" in result.inputs
    assert "is of today" not in capsys.readouterr().err
    now = extract.run(config(tmp_path, CATALOGUE, LOGS, ds="2026-03-09"))
    assert now.catalogue == "of the time of reading"
    assert capsys.readouterr().err.count("is of today, whatever --ds says") == 1


def test_a_jump_in_row_counts_is_refused_with_the_numbers(tmp_path: Path, first: extract.Result) -> None:
    few = [event for event in LOGS if event[0] == "u1"]
    with pytest.raises(Refused, match=r"interactions went from 20 .* to 5 rows, a change of 75%"):
        extract.run(config(tmp_path, CATALOGUE, few, ds="2026-03-11", split="leave_one_out"))


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """Spark's default file system is another one than the driver's disk: a folder, behind Hadoop's view file system."""
    home = tmp_path / "elsewhere"
    home.mkdir()
    hadoop = session("test", {}).sparkContext._jsc.hadoopConfiguration()
    before = hadoop.get("fs.defaultFS")
    hadoop.set("fs.viewfs.mounttable.default.linkMergeSlash", f"file://{home}")
    hadoop.set("fs.defaultFS", "viewfs:///")
    yield home
    hadoop.set("fs.defaultFS", before)


def test_the_lake_is_written_where_the_driver_reads_whatever_the_default_file_system(tmp_path: Path, elsewhere: Path) -> None:
    items, events = item_table(tmp_path / "i.parquet", CATALOGUE), event_table(tmp_path / "e.parquet", LOGS)
    result = extract.run(config(tmp_path, f"file://{items}", f"file://{events}"))
    assert result.rows == {"items": 5, "interactions": 20, "sequences": 4, "quarantine": 0}
    assert partitions.read(tmp_path / "lake", INTERACTIONS, f"ds={DS}").num_rows == 20
    again = extract.run(config(tmp_path, f"file://{items}", f"file://{events}", ds="2026-03-11"))
    assert again.new_items == 0, "the last snapshot was found"
    assert not list(elsewhere.rglob("*.parquet"))


def test_a_path_that_could_mean_two_places_is_one_error(tmp_path: Path, elsewhere: Path) -> None:
    with pytest.raises(InputError, match=r"extract.items.table = .*names no file system, .* viewfs:/// .*write file:///.*items"):
        extract.run(config(tmp_path, CATALOGUE, LOGS))
    assert not partitions.committed(tmp_path / "lake", "items")


def test_a_relative_path_is_read_from_where_the_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    item_table(tmp_path / "i.parquet", CATALOGUE)
    event_table(tmp_path / "e.parquet", LOGS)
    monkeypatch.chdir(tmp_path)
    assert extract.run(config(tmp_path, "./i.parquet", "./e.parquet")).rows["items"] == 5


@pytest.mark.parametrize(("lost", "found"), [("all", r"0 files with 0 rows"), ("one", r"\d+ files with \d+ rows")])
def test_rows_that_the_driver_does_not_find_are_not_committed(
    tmp_path: Path, first: extract.Result, monkeypatch: pytest.MonkeyPatch, lost: str, found: str
) -> None:
    """What an executor without the lake's mount wrote is nowhere: the driver's commit finds the others' files alone."""
    before = partitions.read(tmp_path / "lake", INTERACTIONS, f"ds={DS}")
    honest = DataFrameWriter.parquet

    def unmounted(writer: DataFrameWriter, path: str, *words: Any, **more: Any) -> None:
        honest(writer, path, *words, **more)
        files = sorted(Path(path.removeprefix("file://")).glob("part-*.parquet"))
        if path.endswith("/interactions"):
            for file in files if lost == "all" else files[:1]:
                file.unlink()

    monkeypatch.setattr(DataFrameWriter, "parquet", unmounted)
    with pytest.raises(InputError, match=rf"interactions/ds={DS}: {found} lie in the lake .*, 24 rows were written: does every"):
        extract.run(config(tmp_path, CATALOGUE, [*LOGS, *[("u9", f"i{n}", NOON) for n in range(4)]], part_rows=5))
    assert partitions.read(tmp_path / "lake", INTERACTIONS, f"ds={DS}") == before
