"""Lookup: fails on any difference between what a client sees and the lake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feature_repo import feature_definitions, spaces
from feature_repo.reader import Reader, settings
from feature_repo.stores import lease, open_writer
from jobs import lookup, publish
from jobs.lake import partitions
from jobs.lake.tables import item_embeddings
from jobs.run import InputError, Refused, Run, Unavailable

A = "a" * 16


@pytest.fixture
def lake(catalogue: Callable[..., Path]) -> Path:
    lake = catalogue()
    publish.run(publish.Config(run=Run(ds="2026-01-01", lake=lake), space=A))
    return lake


def look(lake: Path, **more: Any) -> lookup.Result:
    return lookup.run(lookup.Config(run=Run(ds="2026-01-01", lake=lake), **more))


def test_an_items_vector_is_shown(lake: Path) -> None:
    result = look(lake, item="m4")
    rows = partitions.read(lake, item_embeddings(16), f"space={A}/ds=2026-01-01").to_pylist()
    assert result.vector == pytest.approx(rows[4]["embedding"][:8], abs=1e-6)
    assert result.rows == {}


def test_a_sample_is_spread_over_the_catalogue(lake: Path) -> None:
    assert look(lake, sample=10).compared == 10


def test_a_vector_that_differs_is_refused(lake: Path, catalogue: Callable[..., Path]) -> None:
    catalogue(version={"m11": 1})
    with pytest.raises(Refused, match=r"1 vectors .* differ online, for example 'm11'"):
        look(lake)


def test_a_vector_that_is_absent_is_refused(lake: Path, catalogue: Callable[..., Path]) -> None:
    catalogue(ids=[f"m{number}" for number in range(41)])
    with pytest.raises(Refused, match=r"1 items .* are not online, for example 'm40'"):
        look(lake)


def test_a_partition_that_shrank_is_refused(lake: Path, catalogue: Callable[..., Path]) -> None:
    catalogue(ids=[f"m{number}" for number in range(39)])
    with pytest.raises(Refused, match="promises 40 items"):
        look(lake)


def test_a_space_that_is_too_old_is_refused(lake: Path) -> None:
    with pytest.raises(Refused, match="more than lookup"):
        look(lake, max_age_days=1)


def test_a_store_that_lost_what_this_night_published_is_refused(lake: Path) -> None:
    assert look(lake, space=A, sequence=1).sequence == 1
    with pytest.raises(Refused, match=rf"space {A} serves by write 1 .* but {'b' * 16} was published by write 2: the store lost"):
        look(lake, space="b" * 16, sequence=2)
    with pytest.raises(Refused, match="was published by write 1: the store lost it"):  # a replica that went on by itself
        look(lake, space="b" * 16, sequence=1)
    with pytest.raises(Refused, match="published by write 2"):
        look(lake, sequence=2)


def test_a_later_write_of_the_pointer_is_told_and_compared(
    lake: Path, catalogue: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue(space="b" * 16)
    publish.run(publish.Config(run=Run(ds="2026-01-01", lake=lake), space="b" * 16))
    assert look(lake, space=A, sequence=1).compared == 40
    assert f"serves by a later write than that of {A}" in capsys.readouterr().err


def test_an_unknown_item_names_one_that_is_there(lake: Path) -> None:
    with pytest.raises(InputError, match=r"'nope' is not in the space that serves.*'m0'"):
        look(lake, item="nope")


def test_before_the_first_publish_the_remedy_is_named(catalogue: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="jobs publish"):
        look(catalogue())


def test_a_row_that_the_lake_does_not_know_is_found(lake: Path) -> None:
    store, space = open_writer(settings(lake)), Reader.open(lake).pointer().space
    with lease(store, "test"):
        rows = spaces.embedding_rows(space, ["stranger"], [b"\0" * 64])
        store.write(feature_definitions.item_embedding, rows)
    with pytest.raises(Refused, match=r"1 items of space a+ are online and not in .*, for example 'stranger'"):
        look(lake)
    assert look(lake, sample=10).compared == 10


def test_rows_of_a_publishing_at_work_are_waited_for(lake: Path) -> None:
    store, space = open_writer(settings(lake)), Reader.open(lake).pointer().space
    with lease(store, "publish"):
        store.write(feature_definitions.item_embedding, spaces.embedding_rows(space, ["soon"], [b"\0" * 64]))
        with pytest.raises(Unavailable, match="another writer holds the lease"):
            look(lake, lease_wait_s=0)
