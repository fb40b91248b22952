"""Collect: what no reader needs goes after its grace period; the serving space and the one before stay."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from feature_repo import spaces
from feature_repo.feature_definitions import item_embedding
from feature_repo.reader import Reader, settings
from feature_repo.stores import lease, open_writer
from jobs import collect, lookup, publish, rollback
from jobs.run import InputError, Run

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
        return spaces.spaces_online(store)


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


def test_a_clock_that_was_ahead_only_lengthens_the_grace(lake: Path) -> None:
    store = open_writer(settings(lake))
    with lease(store, "test"):
        store.note(A, (dt.datetime.now(dt.UTC) + dt.timedelta(days=30)).isoformat())
    result = sweep(lake, 7)
    assert result.removed == {} and result.waiting[A] == pytest.approx(37 * 24, abs=0.1)


def test_rollback_still_works_after_collect(lake: Path) -> None:
    sweep(lake, 0)
    assert rollback.run(rollback.Config(run=Run(ds=RUN_DS, lake=lake))).space_id == B


def test_a_negative_grace_period_is_refused(lake: Path) -> None:
    with pytest.raises(InputError, match="grace_days is -1"):
        sweep(lake, -1)
