"""The way back from a bad delta: rows of the serving space as the lake has them for an earlier date."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_repo.feature_definitions import item_embedding
from feature_repo.reader import Reader, settings
from feature_repo.spaces import embedding_rows, stage
from feature_repo.stores import SqliteStore, lease, open_writer
from jobs import lookup, publish
from jobs.lake import partitions
from jobs.lake.tables import item_embeddings
from jobs.run import InputError, Older, Refused, Run, Unavailable

A, B = "a" * 16, "b" * 16
FIRST, SECOND, THIRD = "2026-01-01", "2026-01-02", "2026-01-03"
IDS = [f"m{number}" for number in range(1, 42)]
Catalogue = Callable[..., Path]


def put(lake: Path, ds: str, space: str = A, **more: Any) -> publish.Result:
    run = Run(ds=ds, lake=lake)
    return publish.run(publish.Config(run=run, space=space, approximate=False, lease_wait_s=0, max_churn=1.0, **more))


def serves(lake: Path, ds: str) -> bool:
    """Whether every vector online is that of a date, and no other item is there."""
    looked = lookup.run(lookup.Config(run=Run(ds=ds, lake=lake)))
    rows = partitions.read_commit(lake, "item_embeddings", f"space={A}/ds={ds}").rows
    return same_vectors(lake, ds) and (looked.serves_ds, looked.compared) == (ds, rows)


def same_vectors(lake: Path, ds: str) -> bool:
    """Whether the vectors online of a date's items are that date's."""
    rows = partitions.read(lake, item_embeddings(16), f"space={A}/ds={ds}")
    answer = Reader.open(lake).vectors(rows["item_id"].to_pylist())
    return np.array_equal(answer.vector_ND, np.asarray(rows["embedding"].to_pylist(), np.float32))


@pytest.fixture
def lake(catalogue: Catalogue) -> Path:
    """The first date serves; the second changes an item, brings one and takes one away."""
    lake = catalogue(ds=FIRST)
    put(lake, FIRST)
    return catalogue(ds=SECOND, ids=IDS[:40], version={"m5": 1, "m6": 1})


def test_an_earlier_date_of_the_serving_space_comes_back_and_the_next_night_goes_on(lake: Path, catalogue: Catalogue) -> None:
    put(lake, SECOND)
    with pytest.raises(Older, match=r"publish\.restore to an earlier date"):
        put(lake, FIRST)
    result = put(lake, FIRST, restore=True)
    assert (result.kind, result.written, result.removed, result.sequence) == ("delta", 3, 1, 3)
    assert serves(lake, FIRST)
    assert put(lake, FIRST, restore=True).kind == "nothing to do"
    assert put(catalogue(ds=THIRD, ids=IDS), THIRD).kind == "delta"
    assert serves(lake, THIRD)


def test_restore_is_no_way_to_another_space_nor_to_a_newer_date(lake: Path, catalogue: Catalogue) -> None:
    with pytest.raises(Refused, match="is newer than what serves"):
        put(lake, SECOND, restore=True)
    put(catalogue(ds=SECOND, space=B), SECOND, B)
    with pytest.raises(Refused, match="`rollback` goes back to another space"):
        put(lake, FIRST, restore=True)
    with pytest.raises(InputError, match="exclude each other"):
        put(lake, FIRST, restore=True, arriving=True)


def damaged_after_staging(patch: pytest.MonkeyPatch, times: int) -> None:
    """Another program writes over a row between staging and verifying, so many times."""
    left = [times]

    def staged(store: Any, reader: Reader, space: Any, *given: Any, **more: Any) -> Any:
        done = stage(store, reader, space, *given, **more)
        if left[0]:
            left[0] -= 1
            store.write(item_embedding, embedding_rows(space, ["m7"], [b"\1" * 64]))
        return done

    patch.setattr("feature_repo.spaces.stage", staged)


def test_a_delta_that_does_not_verify_restores_what_served_by_itself(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Reader.open(lake).pointer()
    damaged_after_staging(monkeypatch, 1)
    with pytest.raises(Refused, match=r"'m7' is different.* The snapshot of 2026-01-01 serves again .*: 4 rows restored, 1 "):
        put(lake, SECOND)
    assert Reader.open(lake).pointer() == before
    assert serves(lake, FIRST)
    monkeypatch.undo()
    assert put(lake, SECOND).kind == "delta"


@pytest.mark.parametrize(
    "room, told",
    [
        (
            True,
            r"\(OperationalError: database or disk is full\).* The snapshot of 2026-01-01 serves again .*: 1 rows restored, 0 ",
        ),
        (False, r"disk is full.* could not be restored .*disk is full.* may be mixed of two dates: .*publish\.restore=true"),
    ],
)
def test_a_delta_that_the_store_cuts_off_at_its_second_chunk_is_undone_or_told(
    lake: Path, monkeypatch: pytest.MonkeyPatch, room: bool, told: str
) -> None:
    """Of chunks of five the first changes m5, the second m6; `room` is made before what served is brought back."""
    before, write, calls = Reader.open(lake).pointer(), SqliteStore.write, iter(range(9))

    def full(store: SqliteStore, view: Any, rows: Any) -> None:
        call = next(calls) if view is item_embedding else 0
        if call == 1 or (call > 1 and not room):
            raise sqlite3.OperationalError("database or disk is full")
        write(store, view, rows)

    with monkeypatch.context() as patch:
        patch.setattr(SqliteStore, "write", full)
        with pytest.raises(Unavailable, match=told):
            put(lake, SECOND, chunk_rows=5)
    assert Reader.open(lake).pointer() == before
    assert serves(lake, FIRST) if room else not same_vectors(lake, FIRST)
    assert put(lake, SECOND).kind == "delta"
    assert serves(lake, SECOND)


def test_an_item_forgotten_while_a_delta_is_undone_does_not_end_that(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feature_repo.strangers import remove_strangers
    from jobs.lake.items import bury

    calls = iter(("publish", "restore"))

    def removed(*given: Any) -> Any:
        if next(calls) == "restore":
            bury(lake, "m9", SECOND)  # `forget` then waits for the lease, and removes the row
        return remove_strangers(*given)

    damaged_after_staging(monkeypatch, 1)
    monkeypatch.setattr("feature_repo.strangers.remove_strangers", removed)
    with pytest.raises(Refused, match="The snapshot of 2026-01-01 serves again"):
        put(lake, SECOND)


def test_a_restore_that_fails_too_names_the_way_by_hand(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_after_staging(monkeypatch, 2)
    with pytest.raises(Refused, match=r"could not be restored .*'m7' is different.*publish\.restore=true"):
        put(lake, SECOND)


def test_a_new_space_that_does_not_verify_touches_nothing_that_serves(
    lake: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_after_staging(monkeypatch, 1)
    with pytest.raises(Refused, match="What serves is untouched"):
        put(catalogue(ds=SECOND, space=B), SECOND, B)
    assert serves(lake, FIRST)


def test_items_forgotten_since_a_publish_began_send_it_back(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.lake.items import bury

    real = publish.lease

    def late(*given: Any) -> Any:
        bury(lake, "m9", SECOND)
        return real(*given)

    monkeypatch.setattr(publish, "lease", late)
    with pytest.raises(Unavailable, match="items were forgotten since this publish began"):
        put(lake, SECOND)
    monkeypatch.undo()
    assert put(lake, SECOND).items == 39


def test_an_item_forgotten_while_a_publish_holds_the_lease_does_not_end_it(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.lake.items import bury

    def staged(*given: Any, **more: Any) -> Any:
        bury(lake, "m9", SECOND)  # `forget` then waits for the lease, and removes the row
        return stage(*given, **more)

    monkeypatch.setattr("feature_repo.spaces.stage", staged)
    assert put(lake, SECOND).verified == 40


def test_a_lease_is_free_after_a_failed_restore(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_after_staging(monkeypatch, 2)
    with pytest.raises(Refused):
        put(lake, SECOND)
    with lease(open_writer(settings(lake)), "test"):
        pass
