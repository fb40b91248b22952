"""rotation: a refresh keeps the basis of the space that served, and no ranking changes by it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo.compatibility import apart
from jobs import project, rat
from jobs.engines import registry
from jobs.lake import artifacts, partitions
from jobs.lake.tables import ITEMS, SEQUENCES, item_embeddings, space_of
from jobs.lake.tensors import read_catalogue, read_embeddings
from jobs.rat import rotation
from jobs.rat.rotation import Goal, Rotation
from jobs.run import Run, as_json
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.items import IdItems
from models.behaviour.recommender import Backbone, score
from models.behaviour.training import Training
from tests.jobs.small_lake import ENCODER, make

SMALL: dict[str, Any] = {
    "backbone": Backbone(width=8, max_len=6), "training": Training(epochs=2, batch=8, negatives=4), "hidden": 16,
    "whitened_width": 8, "text_width": 4, "encoder": ENCODER, "teacher": "none", "fusion": Fusion(parts=("llmemb",)),
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def served(tmp_path: Path) -> tuple[Run, str]:
    """A run a week after a recommender was trained and projected, with other chance, and that recommender's id."""
    run = make(tmp_path)
    first = trained(run)
    project.run(project.Config(run=run, recommender=first.recommender_id))
    for table in (ITEMS, SEQUENCES):  # the catalogue of a week later is the same
        rows = partitions.read(run.lake, table, f"ds={run.ds}")
        partitions.write(run.lake, table, "ds=2026-03-17", [rows])
    return dataclasses.replace(run, ds="2026-03-17", seed=7), first.recommender_id


def trained(run: Run, **more: Any) -> rat.Result:
    return rat.run(rat.Config(run=run, item_codes=Codes(books=2, entries=4), **{**SMALL, **more}))


def crown(monkeypatch: pytest.MonkeyPatch, **aliases: tuple[str, str]) -> None:
    """Lets aliases name a recommender and the date of its training."""
    found = {alias: {"recommender_id": identity, "ds": ds} for alias, (identity, ds) in aliases.items()}
    monkeypatch.setattr(registry, "by_alias", lambda run, alias: found.get(alias))


def vectors(run: Run, recommender_id: str) -> torch.Tensor:
    space = f"space={space_of(ENCODER, recommender_id)}"
    partition = partitions.committed(run.lake, "item_embeddings", space)[-1]
    rows = partitions.read(run.lake, item_embeddings(8), partition).sort_by("item_id")
    return torch.tensor(rows["embedding"].to_pylist())


@pytest.mark.parametrize("adapter", ["mlp", "residual", "null_space", "codes", "llm_esr"])
def test_a_refresh_lies_nearer_to_what_served_and_ranks_as_without_its_turn(served: tuple[Run, str], adapter: str) -> None:
    run, first = served
    plain, turned = (trained(run, adapter=adapter, rotate_to=goal) for goal in ("none", first))
    assert turned.recommender_id != plain.recommender_id
    done = turned.rotation
    assert (done.to, done.items) == (first, 20)
    assert done.residual is not None and done.distance is not None and done.residual < done.distance
    assert done.cosine is not None and done.cosine_before is not None and done.cosine > done.cosine_before
    catalogue = read_catalogue(run)
    llm_NE = read_embeddings(run, ENCODER, catalogue.content_hashes)
    history = torch.tensor([[0, 0, 0, 0, 4, 9], [1, 2, 3, 4, 5, 20]])
    scores = []
    for result in (plain, turned):
        loaded = load_recommender(artifacts.find(run.lake, "recommender", result.recommender_id))
        table_VD = torch.cat([torch.zeros(1, 8), loaded.project(llm_NE, catalogue.item_ids)])
        scores.append(score(loaded.encode(table_VD[history], history != 0), table_VD))
    assert torch.allclose(scores[0], scores[1], atol=1e-5)


def test_what_project_writes_is_as_near_as_was_told(served: tuple[Run, str]) -> None:
    run, first = served
    second = trained(run, rotate_to=first)
    project.run(project.Config(run=run, recommender=second.recommender_id))
    assert apart(vectors(run, first).numpy(), vectors(run, second.recommender_id).numpy()) == pytest.approx(
        second.rotation.residual, abs=1e-3
    )


def test_the_turn_is_kept_with_the_recommender_and_named_among_its_inputs(served: tuple[Run, str]) -> None:
    run, first = served
    result = trained(run, rotate_to=first)
    folder = artifacts.find(run.lake, "recommender", result.recommender_id)
    assert json.loads((folder / "recommender.json").read_text())["rotation"] == as_json(result.rotation)
    goal = f"space={space_of(ENCODER, first)}/ds=2026-03-10"
    assert result.inputs["rotate_to"] == first
    assert result.inputs["item_embeddings"] == partitions.read_commit(run.lake, "item_embeddings", goal).digest


def test_the_goal_is_the_champion_of_an_earlier_date_also_after_the_refresh_was_promoted(
    served: tuple[Run, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first = served
    crown(monkeypatch, champion=(first, "2026-03-10"))
    second = trained(run)
    assert second.rotation.to == first
    project.run(project.Config(run=run, recommender=second.recommender_id))
    crown(monkeypatch, champion=(second.recommender_id, run.ds), previous=(first, "2026-03-10"))
    again = trained(run)
    assert (again.recommender_id, again.rotation) == (second.recommender_id, second.rotation)


def test_the_first_night_turns_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path)
    plain, result = trained(run, rotate_to="none"), trained(run)
    assert result.recommender_id == plain.recommender_id
    assert result.rotation.note == "no champion of a date before 2026-03-10: nothing serves whose basis could be kept"
    assert result.rotation.residual is None
    assert f"rat: {result.rotation.note}" in capsys.readouterr().err


def test_another_width_is_a_breaking_refresh_and_turns_nothing(served: tuple[Run, str]) -> None:
    run, first = served
    result = trained(run, rotate_to=first, backbone=Backbone(width=4, max_len=6), text_width=2)
    assert result.rotation.note == f"recommender {first} is 8 wide, this one 4: a breaking refresh, no rotation joins them"
    assert "rotate_to" not in result.inputs


def test_a_space_that_was_never_projected_is_no_goal(tmp_path: Path) -> None:
    run = make(tmp_path)
    first = trained(run)
    later = dataclasses.replace(run, ds="2026-03-17")
    assert "was not projected" in trained(later, rotate_to=first.recommender_id).rotation.note


def rewritten(run: Run, changed: int) -> None:
    """The later snapshot, in which the first items have another text."""
    rows = partitions.read(run.lake, ITEMS, "ds=2026-03-10")
    hashes = [f"{number:032d}" if number < changed else known for number, known in enumerate(rows["content_hash"].to_pylist())]
    partitions.write(run.lake, ITEMS, f"ds={run.ds}", [rows.set_column(2, "content_hash", pa.array(hashes))])


def test_items_whose_text_changed_or_that_are_new_are_not_compared(served: tuple[Run, str]) -> None:
    run, first = served
    rewritten(run, 5)
    goal = rotation.find(run, first, read_catalogue(run), 8)
    assert isinstance(goal, Goal)
    assert goal.row_N.tolist() == list(range(6, 21))
    assert np.array_equal(goal.old_ND, vectors(run, first)[5:].numpy())


def test_too_few_items_in_common_are_no_goal(served: tuple[Run, str]) -> None:
    run, first = served
    rewritten(run, 15)
    goal = rotation.find(run, first, read_catalogue(run), 8)
    assert isinstance(goal, Rotation)
    assert goal.note.startswith("5 items have the same text")


def test_of_a_large_catalogue_a_part_is_compared_each_item_with_itself(
    served: tuple[Run, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first = served
    monkeypatch.setattr(rotation, "MOST", 10)
    goal = rotation.find(run, first, read_catalogue(run), 8)
    assert isinstance(goal, Goal)
    assert goal.row_N.tolist() == list(range(1, 21, 2))
    assert np.array_equal(goal.old_ND, vectors(run, first)[::2].numpy())


def test_of_a_space_that_was_turned_and_shaken_only_the_shaking_is_left() -> None:
    generator = np.random.default_rng(0)
    old_ND = generator.normal(size=(200, 8)).astype(np.float32)
    turn_DD = np.linalg.qr(generator.normal(size=(8, 8)))[0].astype(np.float32)
    items = IdItems(201, 8)
    items.weight.data[1:] = torch.from_numpy(old_ND @ turn_DD + 0.05 * generator.normal(size=(200, 8)).astype(np.float32))
    goal = Goal(to="r", partition="p", digest="d", row_N=np.arange(1, 201), old_ND=old_ND, spans={"llmemb": (0, old_ND.shape[1])})
    found_DD, done = rotation.turn(goal, "llmemb", items(torch.arange(1, 201)).detach())
    assert found_DD is not None
    assert np.allclose(found_DD.numpy(), turn_DD.T, atol=0.02)
    assert done.residual == pytest.approx(0.05, abs=0.01)
    assert done.distance is not None and done.distance > 1
    assert done.cosine == pytest.approx(1, abs=0.01)
