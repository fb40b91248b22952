"""Publish: a space serves whole and verified, or what served before still does."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sqlalchemy.exc import OperationalError

from feature_repo import feature_definitions
from feature_repo.keys import key_texts
from feature_repo.reader import Reader, settings
from feature_repo.stores import SqliteStore, lease, open_writer
from jobs import lookup, publish, rollback
from jobs.engines import online
from jobs.lake import manifests, partitions
from jobs.lake.items import bury
from jobs.lake.tables import ITEMS, item_embeddings
from jobs.run import InputError, Older, Refused, Run, Unavailable
from tests.jobs.small_lake import remember

A, B, C = "a" * 16, "b" * 16, "c" * 16
Catalogue = Callable[..., Path]


def config(lake: Path, space: str = A, ds: str = "2026-01-01", **more: Any) -> publish.Config:
    return publish.Config(run=Run(ds=ds, lake=lake), space=space, **{"lease_wait_s": 0, **more})


def look(lake: Path, ds: str = "2026-01-01") -> lookup.Result:
    return lookup.run(lookup.Config(run=Run(ds=ds, lake=lake)))


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_what_was_published_is_read_back_equal(catalogue: Catalogue, codec: str) -> None:
    lake = catalogue()
    result = publish.run(config(lake, codec=codec))
    assert (result.kind, result.written, result.verified, result.sequence) == ("new space", 40, 40, 1)
    seen = look(lake)
    assert (seen.space_id, seen.compared, seen.codec, seen.width) == (A, 40, codec, 16)


def test_publishing_again_changes_nothing(catalogue: Catalogue) -> None:
    lake = catalogue()
    publish.run(config(lake))
    index = (online.index_home(lake, Reader.open(lake).pointer().space) / online.INDEX).read_bytes()
    again = publish.run(config(lake))
    assert (again.kind, again.written, again.verified, again.sequence) == ("nothing to do", 0, 40, 1)
    assert (online.index_home(lake, Reader.open(lake).pointer().space) / online.INDEX).read_bytes() == index


def test_a_delta_writes_only_what_changed(catalogue: Catalogue) -> None:
    publish.run(config(catalogue()))
    ids = [f"m{number}" for number in range(1, 41)]
    lake = catalogue(ds="2026-01-02", ids=ids, version={"m5": 1})
    result = publish.run(config(lake, ds="2026-01-02"))
    assert (result.kind, result.written, result.removed, result.verified) == ("delta", 2, 1, 40)
    assert result.attributes_written == 2
    assert look(lake, "2026-01-02").compared == 40
    answer = Reader.open(lake).vectors(["m0", "m40"])
    assert (answer.missing, answer.item_ids) == (["m0"], ["m40"])


def test_items_that_left_while_a_space_lay_half_published_are_not_served_from_it(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.run(config(catalogue()))
    lake = catalogue(space=B)

    def killed(*given: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(publish.spaces, "flip", killed)
        publish.run(config(lake, space=B))
    left = [f"m{number}" for number in range(2, 40)]
    lake = catalogue(ds="2026-01-02", space=B, ids=left)
    result = publish.run(config(lake, space=B, ds="2026-01-02"))
    assert (result.kind, result.items, result.verified, result.removed) == ("new space", 38, 38, 2)
    assert Reader.open(lake).vectors(["m0", "m1", "m2"]).missing == ["m0", "m1"]
    store = open_writer(settings(lake))
    keys = {key for keys in store.keys(feature_definitions.item_embedding) for key in keys}
    assert sum(key_texts(feature_definitions.item_embedding, key)[1] == B for key in keys) == 38
    assert look(lake, "2026-01-02").compared == 38


def test_a_space_that_serves_again_holds_nothing_of_its_first_time(catalogue: Catalogue) -> None:
    publish.run(config(catalogue()))
    publish.run(config(catalogue(space=B), space=B))
    lake = catalogue(ds="2026-01-02", ids=[f"m{number}" for number in range(1, 40)])
    assert publish.run(config(lake, ds="2026-01-02")).removed == 1
    assert Reader.open(lake).vectors(["m0"]).missing == ["m0"]


def test_a_row_too_many_is_never_pointed_to(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    publish.run(config(catalogue()))
    monkeypatch.setattr(publish.strangers, "remove_strangers", lambda *given: 0)
    lake = catalogue(ds="2026-01-02", ids=[f"m{number}" for number in range(1, 40)])
    with pytest.raises(Refused, match=r"1 rows of items that it should not have, for example 'm0'"):
        publish.run(config(lake, ds="2026-01-02"))
    assert Reader.open(lake).pointer().ds == "2026-01-01"


def test_neighbours_that_change_without_a_reason_are_refused_inside_a_space(catalogue: Catalogue) -> None:
    ids = [f"m{number}" for number in range(40)]
    publish.run(config(catalogue(texts=dict.fromkeys(ids, 0))))
    lake = catalogue(ds="2026-01-02", version=dict.fromkeys(ids, 1), texts=dict.fromkeys(ids, 0))
    with pytest.raises(Refused, match=r"'head': 0\.[0-9]+}, more than publish\.max_churn = 0\.05 \(same space"):
        publish.run(config(lake, ds="2026-01-02"))
    assert Reader.open(lake).pointer().ds == "2026-01-01"
    assert publish.run(config(lake, ds="2026-01-02", max_churn=1.0)).churn["head"] > 0.5


def test_another_space_is_told_breaking_and_may_have_a_budget_too(catalogue: Catalogue) -> None:
    publish.run(config(catalogue()))
    lake = catalogue(space=B)
    with pytest.raises(Refused, match=r"max_churn_new_space = 0\.3 \(breaking"):
        publish.run(config(lake, space=B, max_churn_new_space=0.3))
    result = publish.run(config(lake, space=B))
    assert (result.compatibility, result.churn["head"] > 0.5) == ("breaking", True)


def test_a_turned_space_is_told_alignable_and_one_whose_turn_was_folded_in_aligned(catalogue: Catalogue) -> None:
    lake = catalogue(space=B)
    catalogue()
    publish.run(config(lake))
    rows = partitions.read(lake, item_embeddings(16), f"space={A}/ds=2026-01-01")
    emb_ND = np.stack(rows["embedding"].to_pylist()).astype(np.float32)
    turn_DD = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)
    rows = rows.set_column(1, "space_id", pa.repeat(B, 40))
    for vector_ND, kind in ((emb_ND @ turn_DD, "alignable"), (emb_ND * 1.01, "aligned")):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(vector_ND.ravel()), 16)
        write_raw(lake, rows.set_column(2, "embedding", vectors), B)
        result = publish.run(config(lake, space=B, max_churn_new_space=0.0))
        assert (result.compatibility, result.residual < 0.02, result.churn) == (kind, True, {"head": 0.0})
        assert (result.distance <= 0.1) == (kind == "aligned")
        rollback.run(rollback.Config(run=Run(ds="2026-01-01", lake=lake)))


def test_the_serving_space_never_changes_its_width(catalogue: Catalogue) -> None:
    lake = catalogue()
    publish.run(config(lake))
    before = Reader.open(lake).pointer()
    rows = partitions.read(lake, item_embeddings(16), f"space={A}/ds=2026-01-01")
    narrow_ND = np.stack(rows["embedding"].to_pylist()).astype(np.float32)[:, :8]
    write_raw(lake, rows.set_column(2, "embedding", pa.FixedSizeListArray.from_arrays(pa.array(narrow_ND.ravel()), 8)))
    with pytest.raises(Refused, match=r"serves vectors of width 16, these are 8 wide"):
        publish.run(config(lake))
    assert Reader.open(lake).pointer() == before
    assert Reader.open(lake).vectors(["m1"]).vector_ND.shape == (1, 16)


def test_a_damaged_row_of_the_serving_space_is_mended_by_the_next_publish(catalogue: Catalogue) -> None:
    lake = catalogue()
    publish.run(config(lake))
    store = open_writer(settings(lake))
    store.connection.execute("DELETE FROM llmemb_item_embedding WHERE rowid = 3")  # type: ignore[attr-defined]
    store.connection.commit()  # type: ignore[attr-defined]
    with pytest.raises(Refused, match="not online"):
        look(lake)
    assert publish.run(config(lake)).written == 1
    assert look(lake).compared == 40


def test_a_change_of_codec_is_a_delta(catalogue: Catalogue) -> None:
    lake = catalogue()
    publish.run(config(lake))
    assert publish.run(config(lake, codec="float16")).kind == "delta"
    assert look(lake).codec == "float16"


def test_a_second_space_leaves_the_first_to_roll_back_to(catalogue: Catalogue) -> None:
    publish.run(config(catalogue()))
    result = publish.run(config(catalogue(space=B), space=B))
    assert (result.space_id, result.previous_space_id, result.sequence) == (B, A, 2)


def test_an_older_snapshot_never_goes_over_a_newer_one(catalogue: Catalogue) -> None:
    catalogue()
    lake = catalogue(ds="2026-01-02")
    publish.run(config(lake, ds="2026-01-02"))
    with pytest.raises(Older, match="older than what serves"):
        publish.run(config(lake))
    assert look(lake, "2026-01-02").serves_ds == "2026-01-02"


def test_of_two_dates_the_run_s_own_is_published(catalogue: Catalogue) -> None:
    later = [f"m{number}" for number in range(42)]
    catalogue(ds="2026-01-02", ids=later, version=dict.fromkeys(later, 1))
    lake = catalogue()
    result = publish.run(config(lake))
    assert (result.items, result.attributes_written, result.verified) == (40, 40, 40)
    pointer = Reader.open(lake).pointer()
    assert (pointer.ds, pointer.items) == ("2026-01-01", 40)
    partition = f"space={A}/ds=2026-01-01"
    assert result.inputs["item_embeddings"] == partitions.read_commit(lake, "item_embeddings", partition).digest
    rows = partitions.read(lake, item_embeddings(16), partition)
    answer = Reader.open(lake).vectors(rows["item_id"].to_pylist())
    assert np.array_equal(answer.vector_ND, np.asarray(rows["embedding"].to_pylist(), np.float32))
    hashes = partitions.read(lake, ITEMS, "ds=2026-01-01")["content_hash"].to_pylist()
    online_now = Reader.open(lake).transport.read("item_attributes", {"item_id": answer.item_ids}, ["content_hash"])
    assert [values["content_hash"] for _, values in online_now] == hashes


def test_a_pointer_that_moved_between_comparing_and_the_lease_stays_where_it_is(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.run(config(catalogue()))
    catalogue(space=B)
    lake = catalogue(space=C)
    held = publish.lease

    @contextlib.contextmanager
    def late(*given: Any) -> Iterator[int]:
        monkeypatch.setattr(publish, "lease", held)
        publish.run(config(lake, space=B))
        with held(*given) as token:
            yield token

    monkeypatch.setattr(publish, "lease", late)
    with pytest.raises(Unavailable, match="another writer moved the pointer since this publish began"):
        publish.run(config(lake, space=C))
    pointer = Reader.open(lake).pointer()
    assert (pointer.space_id, pointer.sequence) == (B, 2)
    assert {raw for _, raw in Reader.open(lake).rows(replaced(pointer.space, space_id=C), ["m1"])} == {None}


def test_of_two_publishers_the_second_is_told_who_is_at_work(catalogue: Catalogue) -> None:
    lake = catalogue()
    with (
        lease(open_writer(settings(lake)), "publish"),
        pytest.raises(Unavailable, match=r"another writer holds the lease.*publish on .* process"),
    ):
        publish.run(config(lake))
    assert publish.run(config(lake)).kind == "new space"


def test_forgotten_items_are_not_published_again(catalogue: Catalogue) -> None:
    lake = catalogue()
    bury(lake, "m3", "2026-01-01")
    assert publish.run(config(lake)).items == 39
    assert Reader.open(lake).vectors(["m3"]).deleted == ["m3"]


def write_raw(lake: Path, rows: pa.Table, space: str = A) -> None:
    """A partition as a careless tool might leave it: nothing checked."""
    import pyarrow.parquet as pq

    home = partitions.folder(lake, "item_embeddings", f"space={space}/ds=2026-01-01")
    pq.write_table(rows, home / ".x.parquet")
    partitions.commit_files(lake, "item_embeddings", f"space={space}/ds=2026-01-01", [home / ".x.parquet"])


def damage(rows: pa.Table, what: str) -> pa.Table:
    emb_ND = np.stack(rows["embedding"].to_pylist()).astype(np.float32)
    ids = rows["item_id"].to_pylist()
    if what == "nan":
        emb_ND[7, 3] = np.nan
    if what == "zero":
        emb_ND[7] = 0
    if what == "overflow":
        emb_ND[7, 0] = 1e6
    if what == "twice":
        ids[7] = ids[8]
    if what == "lost":
        return rows.slice(1)
    if what == "empty":
        return rows.slice(0, 0)
    if what == "foreign":
        return rows.set_column(1, "space_id", pa.repeat(B, rows.num_rows))
    if what == "list":
        return rows.set_column(2, "embedding", pa.array(emb_ND.tolist(), pa.list_(pa.float32())))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(emb_ND.ravel()), emb_ND.shape[1])
    return rows.set_column(2, "embedding", vectors).set_column(0, "item_id", pa.array(ids))


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("nan", "NaN values in embedding"),
        ("zero", "1 items have nothing but zeros as float16, for example 'm7'"),
        ("overflow", "1 items have a value that is not finite as float16, for example 'm7'"),
        ("twice", "1 item ids stand more than once"),
        ("lost", "lacks 1 items of the catalogue items/ds=2026-01-01, for example 'm0'"),
        ("empty", "the space has no items"),
        ("foreign", "rows of space bbbb"),
        ("list", "not a list of fixed size"),
    ],
)
def test_rows_that_must_not_be_served_are_refused_and_nothing_is_written(catalogue: Catalogue, what: str, complaint: str) -> None:
    lake = catalogue(space=B)
    publish.run(config(lake, space=B))
    before = Reader.open(lake).pointer()
    catalogue()
    good = partitions.read(lake, item_embeddings(16), f"space={A}/ds=2026-01-01")
    write_raw(lake, damage(good, what))
    with pytest.raises((InputError, Refused), match=complaint):
        publish.run(config(lake, codec="float16"))
    assert Reader.open(lake).pointer() == before
    assert [raw for _, raw in Reader.open(lake).rows(before, ["m7"])] != [None]


def test_a_space_that_is_not_in_the_lake_names_the_remedy(catalogue: Catalogue) -> None:
    lake = catalogue()
    with pytest.raises(InputError, match="run the job that writes item_embeddings"):
        publish.run(config(lake, ds="2026-02-02"))


def test_ids_with_odd_characters_come_back_under_themselves(catalogue: Catalogue) -> None:
    ids = ["a b", "ü/☃", "*?[x]", "'; DROP TABLE x;--", '"q"', "0", "-1", "a" * 300, "\t", "m\\n", "A", "a", "llmemb"]
    lake = catalogue(ids=ids)
    publish.run(config(lake))
    assert look(lake).compared == len(ids)
    assert Reader.open(lake).vectors(ids).item_ids == ids


def test_what_is_read_back_wrong_does_not_serve(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = catalogue()
    publish.run(config(lake))
    catalogue(space=B)
    real = Reader.rows

    def evicting(self: Reader, space: Any, item_ids: Any) -> Any:
        rows = zip(item_ids, real(self, space, item_ids), strict=True)
        return [(moment, None if item == "m9" else raw) for item, (moment, raw) in rows]

    monkeypatch.setattr(Reader, "rows", evicting)
    with pytest.raises(Refused, match=r"1 of 40 vectors read back differ.*'m9' is absent"):
        publish.run(config(lake, space=B))
    monkeypatch.undo()
    monkeypatch.delenv("LLMEMB_ONLINE_STORE", raising=False)
    assert Reader.open(lake).pointer().space_id == A


def test_a_registry_that_is_locked_is_told_and_what_serves_stays(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = catalogue()
    publish.run(config(lake))
    monkeypatch.setattr("jobs.publish.open_store", locked)
    monkeypatch.setattr("jobs.publish.time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match=r"registry can't be written .*locked"):
        publish.run(config(catalogue(space=B), space=B))
    assert Reader.open(lake).pointer().space_id == A


def locked(lake: Path) -> Any:
    raise OperationalError("", {}, Exception("database is locked"))


def test_a_store_that_is_locked_is_told_and_what_serves_stays(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = catalogue()
    publish.run(config(lake))
    monkeypatch.setattr(SqliteStore, "WAIT_MS", 100)
    with sqlite3.connect(lake / "feast" / "online.db") as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConnectionError, match=r"online store failed .*locked"):
            publish.run(config(catalogue(space=B), space=B))
        other.rollback()
    assert Reader.open(lake).pointer().space_id == A
    assert publish.run(config(lake, space=B)).kind == "new space"


def test_the_command_line_runs_it(catalogue: Catalogue, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.__main__ import main

    lake = catalogue()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{lake}"\n[publish]\nspace = "{A}"\n[publish.graph]\nneighbours = 8\n')
    assert main(["publish", "--recipe", str(recipe), "--ds", "2026-01-01"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verified"] == 40
    assert manifests.read(lake, "2026-01-01", "publish")["result"]["space_id"] == A


def test_the_pointer_names_the_index_and_rollback_names_the_one_before(catalogue: Catalogue) -> None:
    lake = catalogue()
    first = publish.run(config(lake)).outputs["index"]
    second = publish.run(config(catalogue(space=B), space=B)).outputs["index"]
    pointer = Reader.open(lake).pointer()
    assert pointer.previous is not None and (pointer.index, pointer.previous.index) == (second, first)
    rollback.run(rollback.Config(run=Run(ds="2026-01-01", lake=lake), lease_wait_s=0))
    assert Reader.open(lake).pointer().index == first


def test_the_index_holds_attributes_and_what_was_taken_of_late(catalogue: Catalogue) -> None:
    lake = catalogue()
    publish.run(config(lake))
    index = online.open_index(lake, Reader.open(lake).pointer().space)
    index.check(space_id=A, ds="2026-01-01", width=16)
    counts = dict(zip(index.item_ids, index.items["recent"].to_pylist(), strict=True))
    assert (counts["m0"], counts["m3"], counts["m8"], counts["m9"]) == (1, 2, 1, 0)
    assert index.attributes_of(3) == {"title": "Film m3, cut 0"}


def test_the_index_knows_which_attributes_are_lists_and_is_built_anew_when_that_changes(catalogue: Catalogue) -> None:
    lake = catalogue()
    before = publish.run(config(lake)).outputs["index"]
    remember(Run(ds="2026-01-01", lake=lake), "extract", {"lists": {"title": " "}})
    after = publish.run(config(lake)).outputs["index"]
    assert after != before and publish.run(config(lake)).outputs["index"] == after
    index = online.open_index(lake, Reader.open(lake).pointer().space)
    text = index.attributes_of(0)["title"]
    assert index.having("title", [text]).any() and index.having("title", text.split()[:1]).any()


def test_an_index_in_use_stays_when_another_takes_its_place(catalogue: Catalogue) -> None:
    from feature_repo.index import Graph

    lake = catalogue()
    publish.run(config(lake))
    before = Reader.open(lake).pointer()
    publish.run(config(lake, graph=Graph(from_items=0, neighbours=8)))
    after = Reader.open(lake).pointer()
    home = online.index_home(lake, after.space)
    assert {folder.name for folder in home.iterdir() if folder.is_dir()} == {before.index[:16], after.index[:16]}
    online.prune_index(home, older_s=60)
    assert (home / before.index[:16]).is_dir()
    online.prune_index(home)
    assert not (home / before.index[:16]).exists()


def test_a_space_that_finds_no_room_is_refused_before_a_row_is_written(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.run(config(catalogue()))
    monkeypatch.setattr(SqliteStore, "free_bytes", lambda store: 23_000)
    lake = catalogue(space=B)
    with pytest.raises(Refused, match=r"has 23,000 bytes free, and 40 rows of space b+ take about 25,360: run collect"):
        publish.run(config(lake, space=B))
    assert open_writer(settings(lake)).spaces() == {A: 40}
    catalogue(ds="2026-01-02", version={"m1": 1})
    assert publish.run(config(lake, ds="2026-01-02")).kind == "delta"  # its rows are there already
