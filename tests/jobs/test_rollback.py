"""Rollback: one write, and the space before serves again."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from feature_repo import spaces
from feature_repo.reader import Reader, settings
from feature_repo.spaces import remove_space
from feature_repo.stores import lease, open_writer
from feature_repo.strangers import remove_items
from jobs import lookup, publish, rollback
from jobs.engines import registry
from jobs.lake.items import bury
from jobs.lake.tables import space_of
from jobs.run import InputError, Refused, Run, Unavailable
from tests.jobs.small_registry import fresh, kept

A, B, C = "a" * 16, "b" * 16, "c" * 16
RUN_DS = "2026-01-01"


def put(lake: Path, space: str) -> None:
    publish.run(publish.Config(run=Run(ds=RUN_DS, lake=lake), space=space))


def back(lake: Path, space: str = "") -> rollback.Result:
    return rollback.run(rollback.Config(run=Run(ds=RUN_DS, lake=lake), space=space, lease_wait_s=0))


def test_the_space_before_serves_again_whole(catalogue: Callable[..., Path]) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    put(lake, B)
    result = back(lake)
    assert (result.space_id, result.from_space_id, result.sequence) == (A, B, 3)
    assert lookup.run(lookup.Config(run=Run(ds=RUN_DS, lake=lake))).compared == 40


def test_a_second_rollback_undoes_the_first(catalogue: Callable[..., Path]) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    put(lake, B)
    back(lake)
    assert back(lake).space_id == B


def test_a_rollback_to_a_named_space_can_be_repeated(catalogue: Callable[..., Path]) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    put(lake, B)
    assert [back(lake, A).sequence, back(lake, A).sequence] == [3, 3]
    with pytest.raises(Refused, match="is not the one before"):
        back(lake, "c" * 16)


def test_each_write_of_the_pointer_is_later_than_the_last(catalogue: Callable[..., Path]) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    first = Reader.open(lake).pointer().written
    put(lake, B)
    second = Reader.open(lake).pointer().written
    back(lake)
    assert first < second < Reader.open(lake).pointer().written


def test_a_clock_that_goes_back_moves_neither_the_pointer_s_order_nor_the_bytes(
    catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    before = Reader.open(lake).pointer()
    monkeypatch.setattr(time, "time", lambda: 1.0)  # 1970
    put(lake, B)
    after = Reader.open(lake).pointer()
    assert (after.space_id, after.sequence) == (B, before.sequence + 1) and after.written > before.written
    assert back(lake).space_id == A


def test_the_first_space_has_none_to_go_back_to(catalogue: Callable[..., Path]) -> None:
    lake = catalogue()
    put(lake, A)
    with pytest.raises(Refused, match="none to go back to"):
        back(lake)


def test_a_space_that_is_gone_is_not_pointed_to(catalogue: Callable[..., Path]) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    put(lake, B)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        assert remove_space(store, A) == 40
    with pytest.raises(Refused, match=r"no longer whole in the store: .* publish it again"):
        back(lake)
    assert Reader.open(lake).pointer().space_id == B


def test_a_space_that_lacks_items_anywhere_is_not_pointed_to(catalogue: Callable[..., Path]) -> None:
    """Half of it is gone, and the first hundred items are there."""
    ids = [f"m{number}" for number in range(3_000)]
    put(catalogue(ids=ids), A)
    lake = catalogue(space=B, ids=ids)
    put(lake, B)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        assert remove_items(store, A, ids[1_500:]) == 1_500
    with pytest.raises(Refused, match=r"no longer whole in the store: of 1,000 of its items 500 are absent, for example 'm15"):
        back(lake)
    assert Reader.open(lake).pointer().space_id == B
    with lease(store, "test"):
        spaces.bury(store, ids[1_500:], RUN_DS)
    assert back(lake).space_id == A  # what was forgotten on purpose is no loss


def test_a_space_whose_snapshot_left_the_lake_is_counted(catalogue: Callable[..., Path]) -> None:
    put(catalogue(), A)
    lake = catalogue(space=B)
    put(lake, B)
    for item_id in ("x1", "x2"):
        bury(lake, item_id, "2025-12-31")  # before the space was made: no row of it is missed for that
    shutil.rmtree(lake / "item_embeddings" / f"space={A}")
    store = open_writer(settings(lake))
    with lease(store, "test"):
        assert remove_items(store, A, ["m3", "m4"]) == 2
    with pytest.raises(
        Refused, match=r"it holds 38 of 40 items, and the lake no longer has the snapshot of .*; publish it again"
    ):
        back(lake)
    assert Reader.open(lake).pointer().space_id == B
    for item_id in ("m3", "m4"):
        bury(lake, item_id, RUN_DS)
    assert back(lake).space_id == A  # both were forgotten on purpose


def test_a_sample_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rollback\.sample is 0: at least 1"):
        rollback.Config(run=Run(ds=RUN_DS, lake=tmp_path), sample=0)


def test_a_pointer_that_moved_before_the_lease_was_held_is_not_turned_back(
    catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(catalogue(), A)
    put(catalogue(space=B), B)
    lake = catalogue(space=C)
    held = rollback.lease

    @contextlib.contextmanager
    def late(*given: Any) -> Iterator[int]:
        put(lake, C)
        with held(*given) as token:
            yield token

    monkeypatch.setattr(rollback, "lease", late)
    with pytest.raises(Unavailable, match="the pointer moved while rollback waited for its lease"):
        back(lake)
    pointer = Reader.open(lake).pointer()
    assert (pointer.space_id, pointer.sequence) == (C, 3)


def test_before_the_first_publish_the_remedy_is_named(catalogue: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="jobs publish"):
        back(catalogue())


@pytest.fixture
def two_models(catalogue: Callable[..., Path], tmp_path: Path) -> tuple[Run, str, str]:
    """Two recommenders published one after the other, the second the champion and the first the previous one."""
    run, ids = fresh(tmp_path), []
    for seed in (0, 1):
        artifact = kept(run, seed)
        version = registry.log_run(run, "rat", {}, {}, artifact, registry.RECOMMENDER, registry.RECOMMENDER_CODE)
        served = space_of("e" * 16, artifact.name)
        catalogue(space=served)
        publish.run(publish.Config(run=run, space=served))
        registry.set_aliases(run, [("previous" if seed == 0 else "champion", version)])
        ids.append(artifact.name)
    return run, ids[0], ids[1]


def test_the_champion_follows_so_that_the_next_night_does_too(two_models: tuple[Run, str, str]) -> None:
    run, first, second = two_models
    result = rollback.run(rollback.Config(run=run))
    assert (result.recommender_id, result.champion) == (first, first)
    assert registry.resolve(run, "champion")["recommender_id"] == first
    assert registry.resolve(run, "previous")["recommender_id"] == second
    assert rollback.run(rollback.Config(run=run)).champion == second


def test_a_champion_that_stays_is_told(two_models: tuple[Run, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _, second = two_models
    assert rollback.run(rollback.Config(run=run, demote=False)).champion == second
    assert "the next night publishes it" in capsys.readouterr().err


def test_a_registry_that_is_down_does_not_hold_a_rollback_up(
    two_models: tuple[Run, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, first, _ = two_models

    def down(*_: object) -> None:
        raise InputError("MLflow failed")

    monkeypatch.setattr(registry, "champion", down)
    result = rollback.run(rollback.Config(run=run))
    assert (result.recommender_id, result.champion) == (first, "")
    assert "MLflow failed" in capsys.readouterr().err
