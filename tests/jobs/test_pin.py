"""pin: which models and date a night uses, asked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import pin, publish
from jobs.lake import partitions
from jobs.lake.tables import space_of
from jobs.run import InputError, Run

DS = "2026-01-01"


@pytest.fixture
def run(catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A lake with snapshots of two dates, and a registry with a champion."""
    lake = catalogue()
    catalogue(ds="2026-01-03")
    monkeypatch.setattr(pin.registry, "resolve", lambda run, which: {"recommender_id": "r" * 16, "encoder_id": "e" * 16})
    return Run(ds=DS, lake=lake)


def test_the_champion_is_told_with_its_encoder_and_space(run: Run) -> None:
    found = pin.run(pin.Config(run=run))
    assert (found.ds, found.recommender_id, found.encoder_id) == (DS, "r" * 16, "e" * 16)
    assert found.space_id == space_of("e" * 16, "r" * 16)


def test_a_promotion_approved_days_later_serves_with_the_newest_snapshot(run: Run) -> None:
    assert pin.run(pin.Config(run=run, newest=True)).ds == "2026-01-03"
    later = dataclasses.replace(run, ds="2026-01-05")
    assert pin.run(pin.Config(run=later, newest=True)).ds == "2026-01-05"


def test_without_a_champion_the_remedy_is_told(catalogue: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no recommender is champion"):
        pin.run(pin.Config(run=Run(ds=DS, lake=catalogue())))


def test_what_serves_is_told_with_its_date(catalogue: Callable[..., Path], trained: Callable[[Path], tuple[str, str]]) -> None:
    space_id, recommender_id = trained(catalogue())
    lake = catalogue(space=space_id)
    run = Run(ds="2026-01-02", lake=lake)
    with pytest.raises(InputError, match="publish"):
        pin.run(pin.Config(run=run, which="serving"))
    publish.run(publish.Config(run=dataclasses.replace(run, ds=DS), space=space_id))
    found = pin.run(pin.Config(run=run, which="serving"))
    assert (found.ds, found.recommender_id, found.space_id) == (DS, recommender_id, space_id)
    assert partitions.committed(lake, "items") == [f"ds={DS}"]
