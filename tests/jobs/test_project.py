"""project: every item of the snapshot has its own vector in one space, in bounded batches, or the old space stays."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import project, rat
from jobs.lake import artifacts, partitions
from jobs.lake.items import bury
from jobs.lake.tables import ITEMS, SEQUENCES, item_embeddings, space_of
from jobs.run import InputError, Run
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion
from models.behaviour.recommender import Backbone, LoadedRecommender
from models.behaviour.training import Training
from tests.jobs.small_lake import ENCODER, LATER, make, remember, sequence_rows


@pytest.fixture
def small_lake(tmp_path: Path) -> Run:
    """The run of a lake in which `extract`, `scft` and `embed` have run."""
    return make(tmp_path)


@pytest.fixture
def recommended(small_lake: Run) -> Run:
    """The small lake after `rat`."""
    result = rat.run(
        rat.Config(
            run=small_lake,
            teacher="none",
            hidden=16,
            backbone=Backbone(width=8, max_len=6),
            fusion=Fusion(parts=("llmemb",)),
            training=Training(epochs=1, batch=8),
        )
    )
    remember(small_lake, "rat", result)
    return small_lake


def projected(run: Run, **more: Any) -> tuple[project.Result, pa.Table]:
    result = project.run(project.Config(run=run, **{"recommender": "latest", **more}))
    rows = partitions.read(run.lake, item_embeddings(8), f"space={result.space_id}/ds={run.ds}")
    return result, rows.sort_by("item_id")


def test_every_item_gets_the_vector_of_its_own_text(recommended: Run) -> None:
    result, rows = projected(recommended)
    assert rows["item_id"].to_pylist() == [f"i{number:02d}" for number in range(20)]
    assert result.space_id == space_of(ENCODER, result.recommender_id)
    assert set(rows["space_id"].to_pylist()) == {result.space_id}
    loaded = load_recommender(artifacts.find(recommended.lake, "recommender", result.recommender_id))
    for row in rows.to_pylist():
        llm = np.random.default_rng(int(row["content_hash"][:8], 16)).normal(size=12).astype(np.float16)
        own = loaded.project(torch.from_numpy(llm)[None], [row["item_id"]])[0]
        assert np.allclose(row["embedding"], own.numpy(), atol=1e-5)


def test_groups_come_from_train_rows_and_an_item_nobody_touched_is_cold(recommended: Run) -> None:
    _, rows = projected(recommended)
    assert grouped(rows)["i19"] == "cold"
    # test events alone warm no item, however many they are
    events = sequence_rows(tested="i19")
    assert sum(items[-1] == "i19" for items in events["item_ids"].to_pylist()) == 12
    partitions.write(recommended.lake, SEQUENCES, f"ds={recommended.ds}", [events])
    result, rows = projected(recommended)
    groups = grouped(rows)
    assert groups["i19"] == "cold"
    assert result.groups == {"cold": 1, "tail": 15, "head": 4}
    # the items of most train events; at a tie those that come first
    trained = [items[:end] for items, end in zip(events["item_ids"].to_pylist(), events["train_end"].to_pylist(), strict=True)]
    counts = {item: sum(items.count(item) for items in trained) for item in groups}
    heads = [item for item, group in groups.items() if group == "head"]
    assert len(heads) == 4
    assert min(counts[item] for item in heads) >= max(counts[item] for item, group in groups.items() if group == "tail")


def grouped(rows: pa.Table) -> dict[str, str]:
    return dict(zip(rows["item_id"].to_pylist(), rows["group"].to_pylist(), strict=True))


def test_of_two_dates_the_run_s_own_is_projected(recommended: Run) -> None:
    result, rows = projected(recommended)
    assert rows.num_rows == 20
    for name in ("items", "sequences"):
        assert result.inputs[name] == partitions.read_commit(recommended.lake, name, f"ds={recommended.ds}").digest


@pytest.mark.parametrize("sizes", [{"pass_items": 6}, {"batch_rows": 3}, {"pass_items": 5, "batch_rows": 2}])
def test_batches_and_passes_change_no_vector_and_no_group(recommended: Run, sizes: dict[str, int]) -> None:
    _, whole = projected(recommended)
    _, parts = projected(recommended, **sizes)
    assert parts.drop_columns("embedding").equals(whole.drop_columns("embedding"))
    vectors = [np.array(rows["embedding"].to_pylist()) for rows in (whole, parts)]
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)


def test_an_odd_last_batch_of_one_row_is_written_too(recommended: Run) -> None:
    result, rows = projected(recommended, batch_rows=19)
    assert (result.rows["item_embeddings"], rows.num_rows) == (20, 20)


def test_a_rerun_leaves_the_same_bytes(recommended: Run) -> None:
    assert projected(recommended)[0].outputs == projected(recommended)[0].outputs


def test_a_new_item_is_projected_without_retraining(recommended: Run) -> None:
    items = partitions.read(recommended.lake, ITEMS, f"ds={recommended.ds}")
    twin = items.slice(3, 1).set_column(0, "item_id", pa.array(["brand new"]))
    partitions.write(recommended.lake, ITEMS, f"ds={recommended.ds}", [pa.concat_tables([items, twin])])
    _, rows = projected(recommended)
    vectors = dict(zip(rows["item_id"].to_pylist(), rows["embedding"].to_pylist(), strict=True))
    assert np.allclose(vectors["brand new"], vectors["i03"], atol=1e-6)
    assert dict(zip(rows["item_id"].to_pylist(), rows["group"].to_pylist(), strict=True))["brand new"] == "cold"


def test_texts_not_embedded_yet_are_counted_and_the_old_space_stays(recommended: Run) -> None:
    result, before = projected(recommended)
    items = partitions.read(recommended.lake, ITEMS, f"ds={recommended.ds}")
    stranger = items.slice(0, 1).set_column(0, "item_id", pa.array(["new"])).set_column(2, "content_hash", pa.array(["0" * 32]))
    partitions.write(recommended.lake, ITEMS, f"ds={recommended.ds}", [pa.concat_tables([items, stranger])])
    with pytest.raises(InputError, match=r"1 of 21 items have no embedding under encoder .*: run embed"):
        projected(recommended)
    rows = partitions.read(recommended.lake, item_embeddings(8), f"space={result.space_id}/ds={recommended.ds}")
    assert rows.sort_by("item_id").equals(before)


def test_what_was_forgotten_is_not_projected(recommended: Run) -> None:
    bury(recommended.lake, "i05", recommended.ds)
    _, rows = projected(recommended)
    assert "i05" not in rows["item_id"].to_pylist()
    assert rows.num_rows == 19


def test_a_zero_vector_is_never_written(recommended: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = LoadedRecommender.project

    def faulty(self: LoadedRecommender, llm_NE: torch.Tensor, item_ids: list[str]) -> torch.Tensor:
        emb_ND = whole(self, llm_NE, item_ids)
        emb_ND[-1] = 0
        return emb_ND

    monkeypatch.setattr(LoadedRecommender, "project", faulty)
    with pytest.raises(ValueError, match="1 items have a vector that is zero"):
        projected(recommended)


def test_a_recommender_that_is_not_there_is_refused(recommended: Run) -> None:
    with pytest.raises(InputError):
        projected(recommended, recommender="ffffffffffffffff")


@pytest.mark.parametrize("key", ["pass_items", "batch_rows"])
def test_sizes_below_one_are_refused(small_lake: Run, key: str) -> None:
    with pytest.raises(InputError, match=key):
        project.Config(run=small_lake, **{key: 0})  # type: ignore[arg-type]


def test_a_catalogue_of_another_date_does_not_get_this_one(recommended: Run) -> None:
    later = dataclasses.replace(recommended, ds="2030-01-01")
    with pytest.raises(InputError, match=f"is of {LATER}, .* project with --ds {LATER}"):
        projected(later)
