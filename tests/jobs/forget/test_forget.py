"""Forget: nothing of an item is found afterwards, and nothing brings it back."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo import spaces
from feature_repo.reader import Reader, settings
from feature_repo.stores import open_writer
from jobs import forget, lookup, publish
from jobs.engines import online
from jobs.forget import known
from jobs.lake import manifests, partitions
from jobs.lake.items import bury, tombstones
from jobs.lake.locks import at_work, others_ended
from jobs.lake.partitions import write_json
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, llm_embeddings
from jobs.run import InputError, Refused, Run, Unavailable

A, B = "a" * 16, "b" * 16
DS = "2026-01-01"


@pytest.fixture
def lake(catalogue: Callable[..., Path]) -> Path:
    """Item m4 stands in every table, in two spaces, in a history, and in a lookup's answer."""
    for space in (A, B):
        lake = catalogue(space=space)
        publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=space))
    events = {"user_id": ["u1", "u2"], "item_id": ["m4", "m5"], "timestamp": [1, 2]}
    partitions.write(lake, INTERACTIONS, f"ds={DS}", [pa.table(events, INTERACTIONS.schema)])
    records = [json.dumps({"film": "m4", "stars": 3}), json.dumps({"film": "m44"})]
    refused = {"source": ["interactions"] * 2, "key": ["u1"] * 2, "reason": ["r"] * 2, "record": records}
    partitions.write(lake, QUARANTINE, f"ds={DS}", [pa.table(refused, QUARANTINE.schema)])
    texts = llm_embeddings(4)
    halves = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8, np.float16)), 4)
    columns = {"item_id": ["m4", "m5"], "content_hash": ["h4", "h5"], "embedding": halves}
    partitions.write(lake, texts, f"encoder=e/ds={DS}", [pa.table(columns, texts.schema)])
    write_json(manifests.path_of(lake, DS, "lookup"), {"status": "done", "result": {"item": "m4"}})
    return lake


def gone(lake: Path, item: Any = "m4") -> forget.Result:
    return forget.run(forget.Config(run=Run(ds=DS, lake=lake), item=item, lease_wait_s=0))


def test_nothing_of_the_item_is_left(lake: Path) -> None:
    result = gone(lake)
    assert result.online_removed == 2
    expected = {"items": 1, "interactions": 1, "sequences": 2, "quarantine": 1, "llm_embeddings": 1, "item_embeddings": 2}
    assert {name: count for name, count in result.lake_removed.items() if name != "feast_offline"} == expected
    assert result.lake_removed["feast_offline"] == 3
    assert (result.left_online, result.left_in_lake, result.manifests_removed, result.indexes) == (0, [], 1, 2)
    index = online.open_index(lake, Reader.open(lake).pointer().space)
    assert "m4" not in index.item_ids and len(index.item_ids) == len(index.vector_ND)
    assert not manifests.path_of(lake, DS, "lookup").exists()


def test_rows_that_a_killed_first_publish_left_are_removed_though_nothing_serves(
    catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = catalogue()

    def killed(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(publish.spaces, "flip", killed)
        publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=A))
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    assert spaces.current(reader) is None and known.is_online(lake, "m4")
    assert forget.still_online(forget.Config(run=Run(ds=DS, lake=lake), item="m4"), frozenset({"m4"})) == 1
    result = gone(lake)
    assert (result.online_removed, result.left_online, result.left_in_lake) == (1, 0, [])
    assert (store.rows_of("m4"), len(store.rows_of("m5"))) == ([], 1)
    assert reader.forgotten(["m4", "m5"]) == {"m4"}


ODD = "sku-4f9c81-λ"
"""An id whose bytes stand nowhere by chance."""


def everywhere(lake: Path, item: str) -> list[str]:
    """Files of the lake in whose bytes, or unpacked rows, an id stands: a search that knows nothing of names."""
    found = []
    for path in sorted(path for path in lake.rglob("*") if path.is_file()):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:  # SQLite takes its -shm and -wal away when the last connection closes
            continue
        text = repr(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else raw.decode(errors="ignore")
        escaped = json.dumps(item)[1:-1]
        if item.encode() in raw or item in text or escaped in text:
            found.append(path.relative_to(lake).as_posix())
    return found


def strange_lake(catalogue: Callable[..., Path]) -> Path:
    """A lake with the odd item and a second one in every place that could keep them."""
    ids = [*(f"m{number}" for number in range(20)), ODD, "sku-second"]
    lake = catalogue(ids=ids)
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=A))
    events = {"user_id": ["u1", "u2"], "item_id": [ODD, "m5"], "timestamp": [1, 2]}
    partitions.write(lake, INTERACTIONS, f"ds={DS}", [pa.table(events, INTERACTIONS.schema)])
    home = lake / "manifests" / f"ds={DS}"
    write_json(home / "asked-lookup.json", {"job": "lookup", "config": {"item": ODD}, "result": {"item": ODD}})
    write_json(home / "recommend" / "20260101T000000.json", {"job": "recommend", "result": {"items": ["m1", ODD]}})
    write_json(home / "publish.json", {"job": "publish", "error": f"lacks 1 item, for example '{ODD}': run", "rows": {"n": 3}})
    page = lake / "reports" / f"ds={DS}" / "openlineage.jsonl"
    page.parent.mkdir(parents=True)
    page.write_text(json.dumps({"errorMessage": f"for example '{ODD}'"}) + "\n")
    left = lake / ".staging" / "extract-1" / "items"
    left.mkdir(parents=True)
    pq.write_table(pa.table({"item_id": [ODD]}), left / "part-0.parquet")
    return lake


def test_the_whole_lake_searched_byte_by_byte_names_it_nowhere(catalogue: Callable[..., Path]) -> None:
    lake = strange_lake(catalogue)
    before = everywhere(lake, ODD)
    assert {"manifests/ds=2026-01-01/asked-lookup.json", ".staging/extract-1/items/part-0.parquet"} < set(before)
    result = forget.run(forget.Config(run=Run(ds=DS, lake=lake), item=ODD, items=("sku-second",), lease_wait_s=0))
    assert result.online_removed == 2 and result.left_in_lake == []
    for item in (ODD, "sku-second"):
        left = [name for name in everywhere(lake, item) if not name.startswith(("tombstones/", "feast/offline/item_tombstone/"))]
        for name in [name for name in left if name.endswith(".db")]:
            with closing(sqlite3.connect(lake / name, isolation_level=None)) as database:
                database.execute("PRAGMA secure_delete = ON")
                tables = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                for table in tables:
                    if "tombstone" in table:
                        database.execute(f'DELETE FROM "{table}"')
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        left = [name for name in everywhere(lake, item) if not name.startswith(("tombstones/", "feast/offline/item_tombstone/"))]
        assert left == [], "but for its tombstones, no file and no free page of a database has it"
    kept = json.loads((lake / "manifests" / f"ds={DS}" / "publish.json").read_text())
    assert kept == {"job": "publish", "error": "lacks 1 item, for example (forgotten): run", "rows": {"n": 3}}
    assert tombstones(lake) == {ODD, "sku-second"}


def test_free_pages_of_a_database_keep_no_row_that_was_deleted(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "online.db", isolation_level=None)) as database:
        database.execute("PRAGMA secure_delete = OFF")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE rows (item TEXT)")
        database.execute("INSERT INTO rows VALUES (?)", (ODD,))
        database.execute("DELETE FROM rows")
    assert everywhere(tmp_path, ODD), "as SQLite leaves it"
    forget.proof.scrub(tmp_path)
    assert everywhere(tmp_path, ODD) == []


def test_the_proof_takes_no_lock_from_the_store_that_is_open_here(tmp_path: Path) -> None:
    """Whoever opens a file and closes it lets go of all locks that its process has there; SQLite would not know."""
    (tmp_path / "notes.txt").write_text(ODD)
    (tmp_path / "empty.db").touch()
    path = tmp_path / "online 100%?.db"

    def held() -> int:
        mine = f" {os.getpid()} "
        lines = Path("/proc/locks").read_text().splitlines()
        return sum("POSIX" in line and mine in line and line.split()[5].endswith(f":{path.stat().st_ino}") for line in lines)

    with closing(sqlite3.connect(path, isolation_level=None)) as store:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("CREATE TABLE rows (item TEXT)")
        store.execute("INSERT INTO rows VALUES (?)", (ODD,))
        before = held()
        assert list(forget.proof.mentions(tmp_path, frozenset({ODD}))) == ["notes.txt", path.name]
        store.execute("DELETE FROM rows")
        forget.proof.scrub(tmp_path)
        assert before == held() > 0
    assert everywhere(tmp_path, ODD) == ["notes.txt"]
    assert not (tmp_path / "empty.db").stat().st_size


def test_a_file_that_nobody_thought_of_is_found_and_said(catalogue: Callable[..., Path]) -> None:
    lake = strange_lake(catalogue)
    (lake / "notes").mkdir()
    (lake / "notes" / "strange.bin").write_bytes(b"\x00\x01" + ODD.encode() + b"\xff")
    with pytest.raises(Refused, match=r"still in \['notes/strange.bin'\]"):
        gone(lake, ODD)


def test_a_short_id_is_not_found_where_it_stands_by_chance(catalogue: Callable[..., Path]) -> None:
    lake = catalogue(ids=["50", "51", "52", *(f"m{number}" for number in range(10))], texts={"51": 50})
    events = {"user_id": ["50", "u2"], "item_id": ["51", "50"], "timestamp": [1, 2]}
    partitions.write(lake, INTERACTIONS, f"ds={DS}", [pa.table(events, INTERACTIONS.schema)])
    write_json(manifests.path_of(lake, DS, "extract"), {"job": "extract", "result": {"rows": 50}, "config": {"n": "50"}})
    assert gone(lake, "50").left_in_lake == []
    assert partitions.read(lake, INTERACTIONS, f"ds={DS}")["user_id"].to_pylist() == ["50"], "a user of that name stays"
    assert manifests.path_of(lake, DS, "extract").exists()


def test_a_report_that_shows_the_item_goes_and_others_stay(lake: Path) -> None:
    for ds, named in (("2026-01-01", ["m3", "m4"]), ("2026-01-02", ["m44"])):
        page = lake / "reports" / f"ds={ds}" / "report.html"
        page.parent.mkdir(parents=True)
        page.write_text(f'<p><script type="application/json" id="titles">{json.dumps({"named": named})}</script></p>')
    result = gone(lake)
    assert result.left_in_lake == []
    assert [page.parent.name for page in (lake / "reports").glob("*/*.html")] == ["ds=2026-01-02"]


def test_readers_tell_it_deleted_and_the_rest_is_untouched(lake: Path) -> None:
    gone(lake)
    answer = Reader.open(lake).vectors(["m3", "m4", "m44"])
    assert (answer.item_ids, answer.deleted, answer.missing) == (["m3"], ["m4"], ["m44"])
    assert lookup.run(lookup.Config(run=Run(ds=DS, lake=lake))).compared == 39
    assert partitions.read(lake, QUARANTINE, f"ds={DS}").num_rows == 1
    assert partitions.read(lake, ITEMS, f"ds={DS}").num_rows == 39


def test_a_history_loses_the_item_and_its_split_stays_between_the_same_events(lake: Path) -> None:
    gone(lake)
    first, second = partitions.read(lake, SEQUENCES, f"ds={DS}").to_pylist()
    assert (first["item_ids"], first["timestamps"]) == (["m0", "m1", "m2", "m3"], [1, 2, 3, 4])
    assert (first["train_end"], first["valid_end"]) == (3, 4)
    assert (second["item_ids"], second["train_end"], second["valid_end"]) == (["m3", "m5", "m6", "m7", "m8"], 3, 4)


def test_forgetting_again_finds_nothing_and_changes_nothing(lake: Path) -> None:
    gone(lake)
    digests = {name: partitions.read_commit(lake, name, f"ds={DS}").digest for name in ("items", "sequences")}
    again = gone(lake)
    assert (again.online_removed, again.lake_removed, again.inputs) == (0, {}, {})
    assert digests == {name: partitions.read_commit(lake, name, f"ds={DS}").digest for name in digests}


def test_a_backfill_does_not_bring_it_back(lake: Path, catalogue: Callable[..., Path]) -> None:
    gone(lake)
    catalogue(space=B)  # a projection that did not know
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=B))
    assert Reader.open(lake).vectors(["m4"]).deleted == ["m4"]
    assert spaces.vectors_of(open_writer(settings(lake)), "m4") == 0


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize(
    ("room", "moment"),
    [(forget, "forget_online"), (forget.tables, "forget_partition"), (forget.proof, "forget_answers")],
)
def test_killed_at_any_of_its_deletes_the_tombstone_stands_already(
    lake: Path, monkeypatch: pytest.MonkeyPatch, room: Any, moment: str
) -> None:
    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(room, moment, dies)
        with pytest.raises(Killed):
            gone(lake)
    assert tombstones(lake) == {"m4"}
    assert gone(lake).left_in_lake == []


def test_an_item_of_another_name_that_begins_alike_stays(lake: Path) -> None:
    gone(lake, "m1")
    assert Reader.open(lake).vectors(["m10", "m11"]).item_ids == ["m10", "m11"]


def test_before_anything_was_published_the_lake_is_cleaned(catalogue: Callable[..., Path]) -> None:
    lake = catalogue()
    assert gone(lake).lake_removed == {"items": 1, "sequences": 2, "item_embeddings": 1}
    assert tombstones(lake) == {"m4"}


def test_an_empty_id_is_refused(catalogue: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"forget.item is empty"):
        gone(catalogue(), "")


def test_the_pointer_names_the_new_indexes_and_the_old_ones_are_gone(lake: Path) -> None:
    before = Reader.open(lake).pointer()
    assert gone(lake).left_in_lake == []
    after = Reader.open(lake).pointer()
    assert after.withheld == () and after.previous is not None and before.previous is not None
    for old, new in ((before.space, after.space), (before.previous, after.previous)):
        assert new.index not in ("", old.index)
        home = online.index_home(lake, new)
        assert [folder.name for folder in home.iterdir() if folder.is_dir()] == [new.index[:16]]
    again = gone(lake)
    assert again.left_in_lake == [] and Reader.open(lake).pointer().index == after.index


def test_an_unknown_id_is_refused_and_nothing_is_buried(lake: Path) -> None:
    for item in ("m444", '"m4"', "M4", "u1"):
        with pytest.raises(InputError, match=r"is no item that the lake or the online store knows \(1 of 1"):
            gone(lake, item)
    assert tombstones(lake) == frozenset()


def test_an_unknown_id_can_be_kept_away_before_it_comes(lake: Path, catalogue: Callable[..., Path]) -> None:
    forget.run(forget.Config(run=Run(ds=DS, lake=lake), item="m99", unknown=True, lease_wait_s=0))
    gone(lake, "m99")  # known by its tombstone: a rerun needs no second word
    catalogue(ids=[*(f"m{number}" for number in range(10)), "m99"])
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=A, max_churn=1.0))
    assert Reader.open(lake).vectors(["m99"]).deleted == ["m99"]


def test_an_item_that_is_online_alone_is_known(lake: Path, catalogue: Callable[..., Path]) -> None:
    for space in (A, B):
        catalogue(ids=[f"m{number}" for number in range(10)], space=space)
    assert known.is_online(lake, "m30")
    assert gone(lake, "m30").online_removed == 2


def test_a_job_that_began_before_is_waited_for_and_what_it_wrote_is_searched(lake: Path) -> None:
    """`extract` has read its source before the tombstone, and commits when `forget` has been waiting for a while."""
    begun, asked = threading.Event(), threading.Event()
    rows = partitions.read(lake, INTERACTIONS, f"ds={DS}")

    def extracts() -> None:
        with at_work(lake, "extract"):
            begun.set()
            asked.wait(10)
            asked.clear()
            asked.wait(0.5)
            partitions.write(lake, INTERACTIONS, "ds=2026-01-02", [rows])

    def waits(lake: Path, wait_s: float) -> bool:
        asked.set()
        return others_ended(lake, wait_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forget, "others_ended", waits)
        job = threading.Thread(target=extracts)
        job.start()
        begun.wait(60)
        result = gone(lake)
        job.join()
    assert result.lake_removed["interactions"] == 2 and result.left_in_lake == []
    assert "m4" not in partitions.read(lake, INTERACTIONS, "ds=2026-01-02")["item_id"].to_pylist()
    assert list((lake / "locks").glob("at-work-*")) == []


def test_a_first_publish_that_began_before_leaves_nothing_online(catalogue: Callable[..., Path]) -> None:
    """Nothing serves yet when the store is looked at, and everything a moment later."""
    lake = catalogue()
    buried = threading.Event()

    def publishes(forgotten: frozenset[str]) -> None:
        with at_work(lake, "publish"):
            begun.set()
            assert buried.wait(60)
            config = publish.Config(run=Run(ds=DS, lake=lake), space=A, approximate=False)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(publish, "tombstones", lambda lake: forgotten)
                publish.run(config)

    def told(lake: Path, item: str, ds: str) -> None:
        bury(lake, item, ds)
        buried.set()

    begun = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forget, "bury", told)
        job = threading.Thread(target=publishes, args=(frozenset(),))
        job.start()
        begun.wait(60)
        result = gone(lake)
        job.join()
    assert (result.online_removed, result.left_online) == (1, 0)
    assert Reader.open(lake).vectors(["m4"]).deleted == ["m4"]


def test_a_job_that_does_not_end_is_told_and_one_that_was_killed_is_not_waited_for(lake: Path) -> None:
    (lake / "locks").mkdir(exist_ok=True)
    (lake / "locks" / "at-work-extract-0.lock").write_text("killed")
    with at_work(lake, "embed"), pytest.raises(Unavailable, match=r"embed is under way already \(process \d+ on .*, since"):
        forget.run(forget.Config(run=Run(ds=DS, lake=lake), item="m4", jobs_wait_s=0.2, lease_wait_s=0))
    assert tombstones(lake) == {"m4"}
    assert gone(lake).left_in_lake == []


def test_the_command_line_shows_that_a_job_is_at_work(lake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.__main__ import main

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{lake}"\n')
    shown: list[list[str]] = []

    def run(config: Any) -> Any:
        shown.append([path.name.rpartition("-")[0] for path in (lake / "locks").glob("at-work-*")])
        raise InputError("enough")

    monkeypatch.setattr(lookup, "run", run)
    monkeypatch.setattr(forget, "run", run)
    for job in ("lookup", "forget"):
        assert main([job, "--recipe", str(recipe), "--ds", DS]) == 2
    assert shown == [["at-work-lookup"], []]


def test_run_again_after_its_end_it_moves_nothing(lake: Path) -> None:
    before = Reader.open(lake).pointer()
    gone(lake)
    after = Reader.open(lake).pointer()
    assert after.sequence > before.sequence and after.withheld == ()
    gone(lake)
    assert Reader.open(lake).pointer() == after
