"""Trainings that were killed: taken up where they stood, best weights and all, and only on what they had begun with."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import pretrain, rat
from jobs.lake import partitions, tensors
from jobs.lake.tables import SEQUENCES, llm_embeddings
from jobs.run import Run
from models.behaviour import training
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from tests.jobs.small_lake import DS, ENCODER, LATER, WIDTH, make, remember, sequence_rows

EPOCHS = 5
LONG = Training(epochs=EPOCHS, patience=EPOCHS, batch=8, negatives=4)
SMALL: dict[str, Any] = {"backbone": Backbone(width=8, max_len=6), "training": LONG}
Job = Callable[[Run], "pretrain.Result | rat.Result"]


class Killed(BaseException):
    """Stands for a kill."""


def teacher(run: Run) -> pretrain.Result:
    return pretrain.run(pretrain.Config(run=run, **SMALL))


def recommender(run: Run) -> rat.Result:
    return rat.run(rat.Config(run=run, **SMALL, hidden=16, whitened_width=8))


def taught(run: Run) -> str:
    """Another teacher for each seed, remembered as the newest."""
    result = pretrain.run(pretrain.Config(run=run, **{**SMALL, "training": dataclasses.replace(LONG, epochs=1)}))
    remember(dataclasses.replace(run, seed=42), "pretrain", result)
    return result.teacher_id


def killed(monkeypatch: pytest.MonkeyPatch, job: Job, run: Run, epoch: int) -> None:
    """Runs a job until it dies after an epoch, before that epoch's checkpoint."""

    def dies(_: str, epochs: int) -> Callable[[dict[str, float], int], None]:
        def log(figures: dict[str, float], step: int) -> None:
            if step == epoch:
                raise Killed

        return log

    with monkeypatch.context() as patch:
        for module in (pretrain, rat):
            patch.setattr(module, "progress_log", dies)
        with pytest.raises(Killed):
            job(run)
    assert len(list((run.lake / "checkpoints").glob("*.safetensors"))) == 1


def best_at(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Lets validation find one epoch best and all others alike."""
    whole = training.Progress.add

    def add(self: Any, figures: dict[str, float]) -> None:
        whole(self, figures | {"ndcg": 0.9 if self.epoch + 1 == best else 0.1})

    monkeypatch.setattr(training.Progress, "add", add)


@pytest.mark.parametrize("job", [teacher, recommender])
@pytest.mark.parametrize("best", [1, 3])
def test_the_best_weights_of_before_the_kill_are_those_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job, best: int
) -> None:
    run = make(tmp_path)
    taught(run)
    shutil.copytree(run.lake, tmp_path / "calm")
    best_at(monkeypatch, best)
    calm = job(dataclasses.replace(run, lake=tmp_path / "calm"))
    killed(monkeypatch, job, run, epoch=4)
    resumed = job(run)
    assert (resumed.best_epoch, resumed.epochs) == (calm.best_epoch, calm.epochs) == (best, EPOCHS)
    assert resumed.outputs == calm.outputs
    assert [figures["loss"] for figures in resumed.history] == pytest.approx([figures["loss"] for figures in calm.history])


def other_sequences(run: Run) -> None:
    partitions.write(run.lake, SEQUENCES, f"ds={DS}", [sequence_rows(LATER)])


def other_embeddings(run: Run) -> None:
    partition = f"encoder={ENCODER}/shard=1"
    rows = partitions.read(run.lake, llm_embeddings(WIDTH), partition)
    flat = np.random.default_rng(5).normal(size=rows.num_rows * WIDTH).astype(np.float16)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), WIDTH)
    partitions.write(run.lake, llm_embeddings(WIDTH), partition, [rows.set_column(2, "embedding", vectors)])


def other_teacher(run: Run) -> None:
    taught(dataclasses.replace(run, seed=7))


@pytest.mark.parametrize(
    ("job", "change"),
    [(teacher, other_sequences), (recommender, other_sequences), (recommender, other_embeddings), (recommender, other_teacher)],
)
def test_a_checkpoint_is_not_taken_up_once_what_was_read_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Job, change: Callable[[Run], None]
) -> None:
    run = make(tmp_path)
    taught(run)
    killed(monkeypatch, job, run, epoch=4)
    change(run)
    after = job(run)
    shutil.rmtree(run.lake / "checkpoints")
    fresh = job(run)
    assert [figures["loss"] for figures in after.history] == pytest.approx([figures["loss"] for figures in fresh.history])
    assert after.outputs == fresh.outputs


def test_a_checkpoint_is_of_one_job_its_settings_its_inputs_and_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, inputs = pretrain.Config(run=Run(ds=DS, lake=tmp_path), **SMALL), {"items": "a", "sequences": "b"}
    path = tensors.checkpoint_path("pretrain", config, inputs, tmp_path)
    assert path == tensors.checkpoint_path("pretrain", config, dict(reversed(inputs.items())), tmp_path)
    others = [
        tensors.checkpoint_path("rat", config, inputs, tmp_path),
        tensors.checkpoint_path("pretrain", dataclasses.replace(config, cold_share=0.1), inputs, tmp_path),
        tensors.checkpoint_path("pretrain", config, inputs | {"sequences": "c"}, tmp_path),
    ]
    monkeypatch.setattr(tensors, "code_revision", lambda: "other")
    others.append(tensors.checkpoint_path("pretrain", config, inputs, tmp_path))
    assert len({path, *others}) == 5
