"""pretrain: a teacher from train rows, the same after a rerun or a kill."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from jobs import pretrain, rat
from jobs.__main__ import build
from jobs.lake import artifacts, partitions
from jobs.lake.tables import ITEMS, SEQUENCES
from jobs.run import InputError, Run
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion
from models.behaviour.data import held_out
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from tests.jobs.small_lake import DS, LATER, make, remember, sequence_rows

SMALL = {"backbone": Backbone(width=8, max_len=6), "training": Training(epochs=2, batch=8, negatives=4)}


@pytest.fixture
def small_lake(tmp_path: Path) -> Run:
    """The run of a lake in which `extract`, `scft` and `embed` have run."""
    return make(tmp_path)


def config(run: Run, **more: object) -> pretrain.Config:
    return pretrain.Config(run=run, **{**SMALL, **more})  # type: ignore[arg-type]


def test_the_teacher_has_a_vector_for_every_item_and_its_manifest_figures(small_lake: Run) -> None:
    result = pretrain.run(config(small_lake))
    teacher = load_recommender(artifacts.find(small_lake.lake, "teacher", result.teacher_id))
    assert teacher.item_ids == [f"i{number:02d}" for number in range(20)]
    assert teacher.table().shape == (21, 8)
    assert result.outputs == {"teacher": result.teacher_id}
    assert set(result.inputs) == {"items", "sequences"}
    assert result.rows == {"users": 24, "items": 20, "train_events": 23 * 6 + 1}
    assert len(result.history) == result.epochs == 2


def test_an_epoch_tells_how_long_the_others_take(small_lake: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="jobs"):
        pretrain.run(config(small_lake))
    first = next(told for told in caplog.messages if told.startswith("epoch 1 "))
    assert re.search(r"at most \d+ s to go$", first)


def test_a_rerun_leaves_the_same_teacher_and_no_checkpoint(small_lake: Run) -> None:
    assert pretrain.run(config(small_lake)).teacher_id == pretrain.run(config(small_lake)).teacher_id
    assert list((small_lake.lake / "checkpoints").iterdir()) == []
    assert len(list((small_lake.lake / "models" / "teacher").iterdir())) == 1


def test_killed_in_training_and_run_again_it_ends_with_the_same_teacher(small_lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def dies(_: str, epochs: int) -> object:
        def log(figures: dict[str, float], epoch: int) -> None:
            if epoch == 3:
                raise Killed

        return log

    longer = config(small_lake, training=Training(epochs=4, batch=8, negatives=4))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "progress_log", dies)
        with pytest.raises(Killed):
            pretrain.run(longer)
    assert len(list((small_lake.lake / "checkpoints").iterdir())) == 1
    resumed = pretrain.run(longer).teacher_id
    for path in (small_lake.lake / "models" / "teacher").iterdir():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert pretrain.run(longer).teacher_id == resumed


def test_items_held_out_leave_the_teachers_train_rows(small_lake: Run) -> None:
    ids = [f"i{number:02d}" for number in range(20)]
    rows = sequence_rows()
    trained = [events[:end] for events, end in zip(rows["item_ids"].to_pylist(), rows["train_end"].to_pylist(), strict=True)]
    counts = set()
    for seed in (7, 42):
        held = {item for item, out in zip(ids, held_out(ids, 0.3, seed)[1:].tolist(), strict=True) if out}
        result = pretrain.run(config(dataclasses.replace(small_lake, seed=seed), cold_share=0.3))
        assert result.rows["train_events"] == sum(item not in held for events in trained for item in events)
        counts.add(result.rows["train_events"])
    assert len(counts) == 2


def test_validation_and_test_events_do_not_change_the_teachers_losses(small_lake: Run) -> None:
    rows = partitions.read(small_lake.lake, SEQUENCES, f"ds={small_lake.ds}")
    before = pretrain.run(config(small_lake))
    lists = [
        [*events[:end], *[events[0]] * (len(events) - end)]
        for events, end in zip(rows["item_ids"].to_pylist(), rows["train_end"].to_pylist(), strict=True)
    ]
    changed = rows.set_column(1, "item_ids", pa.array(lists, pa.list_(pa.string())))
    partitions.write(small_lake.lake, SEQUENCES, f"ds={small_lake.ds}", [changed])
    after = pretrain.run(config(small_lake))
    assert [figures["loss"] for figures in after.history] == [figures["loss"] for figures in before.history]


def test_of_two_dates_the_run_s_own_is_trained_on(small_lake: Run) -> None:
    results = {ds: pretrain.run(config(dataclasses.replace(small_lake, ds=ds))) for ds in (DS, LATER)}
    for ds, result in results.items():
        for name in ("items", "sequences"):
            assert result.inputs[name] == partitions.read_commit(small_lake.lake, name, f"ds={ds}").digest
    assert [result.rows["items"] for result in results.values()] == [20, 21]
    # users walk the other way at LATER
    assert results[DS].history[0]["loss"] != results[LATER].history[0]["loss"]


def test_an_event_of_an_item_outside_the_catalogue_is_refused_by_its_id(small_lake: Run) -> None:
    items = partitions.read(small_lake.lake, ITEMS, f"ds={small_lake.ds}")
    partitions.write(small_lake.lake, ITEMS, f"ds={small_lake.ds}", [items.slice(1)])
    with pytest.raises(InputError, match="'i00'"):
        pretrain.run(config(small_lake))


def test_logs_without_a_held_out_event_are_refused_with_the_remedy(small_lake: Run) -> None:
    rows = partitions.read(small_lake.lake, SEQUENCES, f"ds={small_lake.ds}")
    length = pa.array([len(events) for events in rows["item_ids"].to_pylist()], pa.int32())
    whole = rows.set_column(3, "train_end", length).set_column(4, "valid_end", length)
    partitions.write(small_lake.lake, SEQUENCES, f"ds={small_lake.ds}", [whole])
    with pytest.raises(ValueError, match="no user has an event to validate on"):
        pretrain.run(config(small_lake))


def test_missing_tables_and_an_absent_gpu_name_the_remedy(tmp_path: Path, small_lake: Run) -> None:
    with pytest.raises(InputError, match="items has no partition"):
        pretrain.run(config(Run(ds="2026-03-10", lake=tmp_path / "empty", device="cpu")))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no GPU"):
            pretrain.run(config(dataclasses.replace(small_lake, device="cuda")))


def test_a_recipe_may_set_every_part_and_a_strange_key_is_named(small_lake: Run) -> None:
    values = {"run": small_lake, "backbone": {"name": "gru4rec"}, "training": {"loss": "gbce"}, "cold_share": 0.1}
    assert build(pretrain.Config, values, "pretrain").backbone.name == "gru4rec"
    with pytest.raises(InputError, match=r"pretrain\.training\.epoch"):
        build(pretrain.Config, {"run": small_lake, "training": {"epoch": 1}}, "pretrain")
    with pytest.raises(InputError, match="cold_share"):
        config(small_lake, cold_share=1.0)


def test_the_graph_is_a_teacher_without_training_that_rat_can_align_to(small_lake: Run) -> None:
    result = pretrain.run(config(small_lake, view="graph"))
    assert (result.epochs, result.history) == (0, ()) and result.validation_ndcg > 0
    teacher = load_recommender(artifacts.find(small_lake.lake, "teacher", result.teacher_id))
    assert teacher.table().shape == (21, 8)
    assert not teacher.table()[teacher.row["i19"]].any()  # nobody touched it
    # its users are fading means: the one of a single item is that item's direction
    own_D = teacher.table()[teacher.row["i03"]]
    user_1D = teacher.encode(own_D[None, None], torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(user_1D[0], own_D / own_D.norm())
    assert pretrain.run(config(small_lake, view="graph")).teacher_id == result.teacher_id
    remember(small_lake, "pretrain", result)
    trained = rat.run(rat.Config(run=small_lake, hidden=16, **SMALL, fusion=Fusion(parts=("llmemb", "collaborative"))))  # type: ignore[arg-type]
    assert isinstance(trained, rat.Result) and trained.teacher_id == result.teacher_id
