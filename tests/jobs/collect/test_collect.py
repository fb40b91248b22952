"""Collect: what no reader needs goes after its grace period; the serving space and the one before stay."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo import spaces
from feature_repo.feature_definitions import item_embedding, serving_pointer
from feature_repo.keys import serialized
from feature_repo.leases import Store
from feature_repo.reader import Reader, offline_folder, settings
from feature_repo.stores import lease, open_writer
from feature_repo.strangers import remove_items
from feature_repo.transport import entity_keys
from jobs import collect, lookup, publish, rollback
from jobs.collect import retention
from jobs.engines import registry
from jobs.lake import arrivals, partitions
from jobs.lake.locks import alone
from jobs.lake.tables import ITEM_CODES, ITEMS, llm_embeddings
from jobs.run import InputError, Run, Unavailable
from tests.jobs.small_lake import remember

A, B, C = "a" * 16, "b" * 16, "c" * 16
RUN_DS = "2026-01-01"


@pytest.fixture
def lake(catalogue: Callable[..., Path]) -> Path:
    """C serves, B before it, A before that."""
    for space in (A, B, C):
        lake = catalogue(space=space)
        publish.run(publish.Config(run=Run(ds=RUN_DS, lake=lake), space=space))
    return lake


def sweep(lake: Path, grace_days: float) -> collect.Result:
    return collect.run(collect.Config(run=Run(ds=RUN_DS, lake=lake), grace_days=grace_days))


def online(lake: Path) -> dict[str, int]:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        return store.spaces()


def test_only_what_neither_serves_nor_served_last_is_removed(lake: Path) -> None:
    result = sweep(lake, 0)
    assert (result.removed, result.kept, result.indexes_removed) == ({A: 40}, [B, C], 1)
    assert online(lake) == {B: 40, C: 40}
    assert lookup.run(lookup.Config(run=Run(ds=RUN_DS, lake=lake))).compared == 40
    assert sweep(lake, 0).removed == {}


def test_within_the_grace_period_all_stay(lake: Path) -> None:
    for _ in range(2):
        result = sweep(lake, 7)
        assert result.removed == {}
        assert result.waiting[A] == pytest.approx(168, abs=0.1)
    assert online(lake) == {A: 40, B: 40, C: 40}


def test_a_space_that_serves_again_starts_its_grace_anew(lake: Path) -> None:
    sweep(lake, 7)
    publish.run(publish.Config(run=Run(ds=RUN_DS, lake=lake), space=A))
    assert open_writer(settings(lake)).notes() == {}
    assert set(sweep(lake, 7).waiting) == {B}


def test_a_space_left_half_staged_is_removed(catalogue: Callable[..., Path], lake: Path) -> None:
    pointer = Reader.open(lake).pointer()
    store = open_writer(settings(lake))
    with lease(store, "test"):
        half = spaces.embedding_rows(pointer, ["x", "y"], [bytes(64)] * 2)
        for key, *_ in half:
            key.entity_values[1].string_val = "d" * 16
        store.write(item_embedding, half)
    assert sweep(lake, 0).removed == {A: 40, "d" * 16: 2}


@pytest.mark.parametrize("what", ["lost", "moved"])
def test_a_pointer_that_was_lost_or_moved_before_the_lease_was_held_costs_no_space(
    catalogue: Callable[..., Path], lake: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    catalogue(space="d" * 16)
    held = collect.lease

    @contextlib.contextmanager
    def late(store: Any, *given: Any) -> Iterator[int]:
        if what == "moved":
            publish.run(publish.Config(run=Run(ds=RUN_DS, lake=lake), space="d" * 16))
        with held(store, *given) as token:
            if what == "lost":
                store.delete(serving_pointer, [key for keys in store.keys(serving_pointer) for key in keys])
            yield token

    monkeypatch.setattr(collect, "lease", late)
    with pytest.raises(Unavailable, match="the pointer moved, or was lost, while collect waited for its lease"):
        sweep(lake, 0)
    assert online(lake).items() >= {A: 40, B: 40, C: 40}.items()


def test_a_clock_that_was_ahead_only_lengthens_the_grace(lake: Path) -> None:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        store.note(A, (dt.datetime.now(dt.UTC) + dt.timedelta(days=30)).isoformat())
    result = sweep(lake, 7)
    assert result.removed == {} and result.waiting[A] == pytest.approx(37 * 24, abs=0.1)


def test_rollback_still_works_after_collect(lake: Path) -> None:
    sweep(lake, 0)
    assert rollback.run(rollback.Config(run=Run(ds=RUN_DS, lake=lake))).space_id == B


DATES = [f"2026-01-{day:02}" for day in range(1, 11)]
LONG_AGO = time.time() - 100 * 86_400


@pytest.fixture
def old(catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten dates of a lake, all written long ago. B serves 01-08, A of 01-03 was before; C was of a challenger.

    The encoder was trained on 01-02, the reference on 01-01. Of three encoders the first is A's and B's, the second nobody's.
    """
    for ds in DATES:
        for space in (A, B, C):
            lake = catalogue(ds=ds, space=space)
        if ds == "2026-01-03":
            publish.run(publish.Config(run=Run(ds=ds, lake=lake), space=A))
    publish.run(publish.Config(run=Run(ds="2026-01-08", lake=lake), space=B))
    home = Path(offline_folder(lake))
    for ds in ("2026-01-04", "2026-01-05"):
        for name in (f"item_embedding/{A}-{ds}", f"item_attributes/{ds}"):
            shutil.copy(home / f"{name[:-10]}2026-01-03.parquet", home / f"{name}.parquet")
    texts = llm_embeddings(2)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2, np.float16)), 2)
    for encoder in ("e1", "e2", "e3"):
        rows = {"item_id": ["m1"], "content_hash": ["h"], "embedding": vectors}
        partitions.write(lake, texts, f"encoder={encoder}/shard=0", [pa.table(rows, texts.schema)])
    run = Run(ds="2026-01-02", lake=lake)
    remember(run, "scft", {"encoder_id": "e3", "snapshot": "ds=2026-01-02"})
    alias = {"recommender_id": "r", "encoder_id": "e1", "ds": "2026-01-01", "version": "1"}
    monkeypatch.setattr(registry, "by_alias", lambda run, name: alias if name == "reference" else None)
    monkeypatch.setattr(retention, "recommender_of", lambda lake, space: {"encoder_id": "e1", "recommender_id": "r"})
    for path in lake.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    return lake


def tidy(lake: Path, **values: Any) -> collect.Result:
    ages = {"snapshot_days": 3, "embedding_days": 3, "offline_days": 3, **values}
    run = Run(ds="2026-01-10", lake=lake, tracking_uri="sqlite://")
    return collect.run(collect.Config(run=run, **ages))


def dates_of(lake: Path, name: str) -> list[str]:
    return [partition.partition("ds=")[2] for partition in partitions.committed(lake, name)]


def test_old_dates_go_and_what_somebody_needs_stays(old: Path) -> None:
    result = tidy(old)
    stay = [ds for ds in DATES if ds not in ("2026-01-04", "2026-01-05", "2026-01-06")]
    assert dates_of(old, "items") == dates_of(old, "sequences") == stay
    assert dates_of(old, "item_embeddings/space=" + A) == stay
    assert dates_of(old, "item_embeddings/space=" + C) == DATES[6:], "no space that stays: what is old goes"
    assert partitions.committed(old, "llm_embeddings") == ["encoder=e1/shard=0", "encoder=e3/shard=0"]
    offline = {path.relative_to(offline_folder(old)).as_posix() for path in Path(offline_folder(old)).glob("item_*/*.parquet")}
    assert {f"item_embedding/{A}-2026-01-03.parquet", f"item_embedding/{B}-2026-01-08.parquet"} < offline
    assert not [name for name in offline if "2026-01-04" in name]
    assert set(result.lake_bytes) == {"items", "sequences", "item_embeddings", "llm_embeddings", "feast_offline"}
    assert lookup.run(lookup.Config(run=Run(ds="2026-01-10", lake=old))).compared == 40
    assert rollback.run(rollback.Config(run=Run(ds="2026-01-10", lake=old))).space_id == A
    assert tidy(old).lake_removed == []


def test_a_dry_run_prints_the_bytes_and_removes_nothing(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_size for path in old.rglob("*") if path.is_file() and path.suffix == ".parquet"}
    planned = tidy(old, dry_run=True, grace_days=0)
    assert "would remove items/ds=2026-01-04" in capsys.readouterr().err
    assert before == {path: path.stat().st_size for path in before} and planned.removed == {}
    done = tidy(old)
    assert (done.lake_removed, done.lake_bytes) == (planned.lake_removed, planned.lake_bytes)
    gone = sum(size for path, size in before.items() if not path.exists())
    assert 0 < gone <= sum(done.lake_bytes.values())


def test_a_dry_run_tells_the_bytes_of_spaces_and_indexes_too(lake: Path) -> None:
    files = {path: path.stat().st_size for path in (lake / "indexes" / f"space={A}").rglob("*") if path.is_file()}
    reader, store = Reader.open(lake), open_writer(settings(lake))
    space = reader.pointer().space
    ids = [item for ids in store.members(A) for item in ids]
    rows = reader.rows(dataclasses.replace(space, space_id=A), ids)
    keys = [serialized(key) for key in entity_keys({"item_id": ids, "space_id": [A] * len(ids)})]
    wanted = sum(len(raw or b"") for _, raw in rows) + sum(map(len, keys))
    run = Run(ds=RUN_DS, lake=lake)
    planned = collect.run(collect.Config(run=run, grace_days=0, dry_run=True))
    assert (planned.removed, planned.indexes_removed, planned.kept) == ({A: 40}, 1, [B, C])
    assert planned.online_bytes_estimate == {A: wanted} and wanted > 40 * 64
    assert planned.lake_bytes == {"indexes": sum(files.values())} and planned.rows == {"item_embedding": 0}
    assert online(lake) == {A: 40, B: 40, C: 40} and all(path.exists() for path in files) and store.notes() == {}
    done = sweep(lake, 0)
    assert dataclasses.replace(done, dry_run=True, rows=planned.rows) == planned
    assert not (lake / "indexes" / f"space={A}" / f"ds={RUN_DS}").exists()
    assert collect.run(collect.Config(run=run, grace_days=7, dry_run=True)).removed == {}


def test_a_space_that_was_half_removed_goes_on_going(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        store.note(A, (dt.datetime.now(dt.UTC) - dt.timedelta(days=8)).isoformat())

    def dies(store: Store, space_id: str) -> int:
        remove_items(store, space_id, ["m1", "m2"])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("feature_repo.leaving.remove_space", dies)
        with pytest.raises(KeyboardInterrupt):
            sweep(lake, 7)
    assert online(lake)[A] == 38
    assert sweep(lake, 7).removed == {A: 38}


def arrived(lake: Path, ds: str) -> None:
    """What an hour brings for a snapshot: a text, its embedding, and its vector in spaces A and C."""
    rows = partitions.read(lake, ITEMS, f"ds={ds}").slice(0, 1)
    partitions.write(lake, arrivals.ARRIVING_ITEMS, f"ds={ds}", [rows])
    texts = arrivals.llm_embeddings(2)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2, np.float16)), 2)
    text = {"item_id": ["m1"], "content_hash": ["h"], "embedding": vectors}
    partitions.write(lake, texts, f"encoder=e1/ds={ds}/shard=0", [pa.table(text, texts.schema)])
    for space in (A, C):
        name = f"space={space}/ds={ds}"
        here = partitions.folder(lake, arrivals.VECTORS, name)
        shutil.copytree(partitions.folder(lake, "item_embeddings", name), here)
    for path in [path for name in arrivals.TABLES for path in (lake / name).rglob("*")]:
        os.utime(path, (LONG_AGO, LONG_AGO))


def test_what_arrived_goes_with_its_snapshot_and_stays_with_the_one_that_serves(old: Path) -> None:
    for ds in ("2026-01-04", "2026-01-05", "2026-01-03", "2026-01-08"):  # A of 01-03 served before, B serves 01-08
        arrived(old, ds)
    os.utime(old / arrivals.LLM / "encoder=e1" / "ds=2026-01-05" / "shard=0" / partitions.COMMIT)  # an hour is at it again
    planned = tidy(old, dry_run=True)
    wanted = {f"arriving_items/ds=2026-01-0{day}" for day in (4, 5)}
    wanted |= {f"arriving_embeddings/space={space}/ds=2026-01-0{day}" for space in (A, C) for day in (4, 5)}
    wanted |= {f"arriving_embeddings/space={C}/ds=2026-01-03", "arriving_llm_embeddings/encoder=e1/ds=2026-01-04"}
    assert {name for name in planned.lake_removed if name.startswith("arriving")} == wanted
    assert all(planned.lake_bytes[name] > 0 for name in arrivals.TABLES)
    done = tidy(old)
    assert (done.lake_removed, done.lake_bytes) == (planned.lake_removed, planned.lake_bytes)
    assert dates_of(old, arrivals.ARRIVING_ITEMS.name) == ["2026-01-03", "2026-01-08"]
    assert {"2026-01-03", "2026-01-08"} == set(dates_of(old, f"{arrivals.VECTORS}/space={A}"))


def test_old_codes_go_but_for_the_newest_of_each_books_and_dates_that_are_needed(old: Path) -> None:
    for books, dates in (("p", DATES[:6]), ("q", DATES[2:])):  # p was refitted as q
        for ds in dates:
            row = {"item_id": ["m1"], "books_id": [books], "codes": [[1]], "number": [0], "content_hash": ["h"]}
            partitions.write(old, ITEM_CODES, f"books={books}/ds={ds}", [pa.table(row, ITEM_CODES.schema)])
    for path in (old / "item_codes").rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    planned = tidy(old, dry_run=True)
    done = tidy(old)
    assert done.lake_removed == planned.lake_removed and done.lake_bytes["item_codes"] > 0
    # needed are 01-01, 01-02, 01-03 and 01-08; younger than three days are 01-07 and later
    assert dates_of(old, "item_codes/books=p") == [*DATES[:3], "2026-01-06"]
    assert dates_of(old, "item_codes/books=q") == ["2026-01-03", *DATES[6:]]


def test_a_checkpoint_that_nobody_resumes_goes_and_one_at_work_stays(old: Path) -> None:
    home = old / "checkpoints"
    home.mkdir()
    for name in ("rat-old.safetensors", "scft-old.aside", "rat-at-work.safetensors"):
        (home / name).write_bytes(b"0123456789")
        os.utime(home / name, (LONG_AGO, LONG_AGO) if "old" in name else None)
    assert tidy(old, snapshot_days=None).lake_bytes.get("checkpoints") is None
    assert tidy(old, dry_run=True).lake_bytes["checkpoints"] == 20
    assert len(list(home.iterdir())) == 3
    assert tidy(old).lake_bytes["checkpoints"] == 20
    assert [path.name for path in home.iterdir()] == ["rat-at-work.safetensors"]


def test_what_a_backfill_has_just_written_and_what_the_recipe_does_not_name_stays(old: Path) -> None:
    assert collect.run(collect.Config(run=Run(ds="2026-01-10", lake=old))).lake_removed == []
    for name in ("items", "sequences"):
        os.utime(old / name / "ds=2026-01-05" / partitions.COMMIT)
    with alone(old, "extract 2026-01-04"):
        tidy(old)
    assert {"2026-01-04", "2026-01-05"} <= set(dates_of(old, "items")) and "2026-01-06" not in dates_of(old, "items")


def test_what_is_written_between_the_listing_and_the_removal_stays(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, rows, home = retention.old_rows, partitions.read(old, ITEMS, "ds=2026-01-04"), Path(offline_folder(old))

    def then_written(run: Run, needs: retention.Needed, days: int) -> Iterator[retention.Old]:
        yield from list(found(run, needs, days))
        partitions.write(old, ITEMS, "ds=2026-01-04", [rows])
        (old / "llm_embeddings" / "encoder=e2" / "shard=1").mkdir()
        os.utime(home / "item_attributes" / "2026-01-04.parquet")

    monkeypatch.setattr(retention, "old_rows", then_written)
    removed = tidy(old).lake_removed
    assert partitions.read(old, ITEMS, "ds=2026-01-04").equals(rows) and "2026-01-05" not in dates_of(old, "items")
    assert "2026-01-04" not in dates_of(old, "sequences"), "of that date only what was written stays"
    assert "encoder=e2/shard=0" in partitions.committed(old, "llm_embeddings")
    attributes = {path.stem for path in (home / "item_attributes").iterdir()}
    assert "2026-01-04" in attributes and "2026-01-05" not in attributes
    written = {"items/ds=2026-01-04", "llm_embeddings/encoder=e2", "feast_offline/item_attributes/2026-01-04.parquet"}
    assert not written & {*removed}


def test_a_space_s_first_and_newest_dates_are_those_of_whole_partitions(old: Path) -> None:
    space = old / "item_embeddings" / f"space={A}"
    for ds in (*DATES[:3], *DATES[6:]):
        (space / f"ds={ds}" / partitions.COMMIT).unlink()
        os.utime(space / f"ds={ds}", (LONG_AGO, LONG_AGO))
    tidy(old)
    assert dates_of(old, f"item_embeddings/space={A}") == ["2026-01-04", "2026-01-06"]


def test_a_challenger_that_waits_for_a_person_keeps_its_snapshot_and_its_encoder(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = {"recommender_id": "r", "encoder_id": "e2", "ds": "2026-01-05", "version": "2"}
    monkeypatch.setattr(registry, "by_alias", lambda run, name: alias if name == "challenger" else None)
    tidy(old)
    assert {"2026-01-04", "2026-01-05", "2026-01-06"} & {*dates_of(old, "items")} == {"2026-01-05"}
    assert "encoder=e2/shard=0" in partitions.committed(old, "llm_embeddings")


def test_without_a_registry_no_encoder_goes_and_with_one_that_is_away_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(ds="2026-01-10", lake=old)
    assert collect.run(collect.Config(run=run, embedding_days=3)).lake_removed == []

    def away(*_: Any) -> None:
        raise Unavailable("MLflow is down")

    monkeypatch.setattr(registry, "by_alias", away)
    with pytest.raises(Unavailable):
        tidy(old)
    assert dates_of(old, "items") == DATES


def test_killed_between_its_deletes_it_finishes_when_run_again(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Stands for a kill."""

    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(Killed):
            tidy(old)
    assert "2026-01-04" not in dates_of(old, "items") and (old / "items" / "ds=2026-01-04").exists()
    os.utime(old / "items" / "ds=2026-01-04", (LONG_AGO, LONG_AGO))
    tidy(old)
    assert not (old / "items" / "ds=2026-01-04").exists()


def test_an_age_of_no_day_is_refused(lake: Path) -> None:
    with pytest.raises(InputError, match=r"collect.snapshot_days is 0"):
        collect.Config(run=Run(ds=RUN_DS, lake=lake), snapshot_days=0)


def test_a_negative_grace_period_is_refused(lake: Path) -> None:
    with pytest.raises(InputError, match="grace_days is -1"):
        sweep(lake, -1)
