"""Forget: nothing of an item is found afterwards, and nothing brings it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo import spaces
from feature_repo.reader import Reader, settings
from feature_repo.stores import open_writer
from jobs import forget, lookup, publish
from jobs.engines import online
from jobs.lake import manifests, partitions
from jobs.lake.items import tombstones
from jobs.lake.partitions import write_json
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, llm_embeddings
from jobs.run import InputError, Run

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


@pytest.mark.parametrize("moment", ["forget_online", "forget_partition", "forget_answers"])
def test_killed_at_any_of_its_deletes_the_tombstone_stands_already(
    lake: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(forget, moment, dies)
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
