"""The champion trained again on all events: what serves knows the newest, what later challengers meet does not."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import mlflow
import pytest
import torch

from jobs import pretrain, rat
from jobs.engines import registry
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.tables import SEQUENCES
from jobs.rat import refit
from jobs.run import InputError, Refused, Run
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion
from models.behaviour.recommender import Backbone, FadingMean
from models.behaviour.training import Training
from tests.jobs import small_registry
from tests.jobs.small_lake import DS, make, remember, sequence_rows

SMALL: dict[str, Any] = {"backbone": Backbone(width=8, max_len=6), "training": Training(epochs=3, batch=8, negatives=4)}
PARTS = Fusion(text_width=5, counting_width=4)


@pytest.fixture(autouse=True)
def bare_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers versions without logging the model, which takes a second each; test_registry does it in full."""

    def add_version(model: str, artifact: Path, code: Path, tags: dict[str, str]) -> str:
        client = mlflow.MlflowClient()
        with contextlib.suppress(mlflow.exceptions.MlflowException):  # there already
            client.create_registered_model(model)
        known = {**tags, **registry.identity(artifact), "artifact_id": artifact.name}
        return str(client.create_model_version(model, str(artifact), tags=known).version)

    monkeypatch.setattr(registry, "add_version", add_version)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A lake in which every second user's newest event is of an item that no train row has, and an MLflow."""
    made = make(tmp_path)
    partitions.write(made.lake, SEQUENCES, f"ds={DS}", [sequence_rows(tested="i19")])
    return dataclasses.replace(small_registry.fresh(tmp_path, DS), lake=made.lake)


def config(run: Run, **more: Any) -> rat.Config:
    return rat.Config(run=run, **{**SMALL, "hidden": 16, "whitened_width": 8, "fusion": PARTS, "refit_loss": 9.0, **more})


def promoted(run: Run, view: Literal["trained", "graph"] = "trained", **more: Any) -> rat.Result:
    """A recommender trained on the split, let out."""
    taught = pretrain.Config(run=run, view=view, **SMALL)
    remember(run, "pretrain", pretrain.run(taught), taught)
    settings = config(run, **more)
    result = rat.run(settings)
    assert isinstance(result, rat.Result)
    remember(run, "rat", result, settings)
    artifact = artifacts.find(run.lake, "recommender", result.recommender_id)
    version = registry.log_run(run, "promote", {}, {}, artifact, registry.RECOMMENDER, registry.RECOMMENDER_CODE)
    registry.set_aliases(run, [("champion", version)])
    return result


def again(run: Run, **more: Any) -> refit.Result:
    result = rat.run(config(run, stage="refit", **more))
    assert isinstance(result, refit.Result)
    return result


@pytest.mark.parametrize("fusion", [PARTS, Fusion(parts=("llmemb",))], ids=["parts", "llmemb alone"])
def test_what_serves_was_trained_on_all_events_as_the_judged_one_was(run: Run, fusion: Fusion) -> None:
    judged = promoted(run, fusion=fusion)
    result = again(run)
    champion = registry.champion(run)
    assert champion is not None
    assert (champion["recommender_id"], champion["gated_id"]) == (result.recommender_id, judged.recommender_id)
    resolved = registry.resolve(run, "champion")
    assert (resolved["recommender_id"], resolved["encoder_id"]) == (result.recommender_id, judged.encoder_id)
    assert len(result.history) >= judged.best_epoch and {"gated", "all", "teacher_all"} <= set(result.history[0])
    assert result.rows["events"] > result.rows["train_events"]
    ids = (judged.recommender_id, result.recommender_id)
    old, new = (load_recommender(artifacts.find(run.lake, "recommender", name)) for name in ids)
    assert old.parts == new.parts
    assert (new.meta["gated_id"], new.meta["ds"], new.meta["encoder_id"]) == (judged.recommender_id, DS, judged.encoder_id)
    llm_NE = torch.randn(3, 12)
    emb_ND = new.project(llm_NE, ["i00", "i19", "never seen"])
    assert emb_ND.shape == (3, old.width) and emb_ND.isfinite().all()
    assert not torch.allclose(emb_ND, old.project(llm_NE, ["i00", "i19", "never seen"]))


def test_a_graph_as_teacher_and_as_a_part_is_spread_anew_over_all_events(run: Run) -> None:
    judged = promoted(run, view="graph", fusion=dataclasses.replace(PARTS, parts=(*PARTS.parts, "graph"), graph_width=6))
    result = again(run)
    old, new = (load_recommender(artifacts.find(run.lake, "recommender", one.recommender_id)) for one in (judged, result))
    assert (
        [part.name for part in new.parts]
        == ["collaborative", "llmemb", "text", "counting", "graph"]
        == [p.name for p in old.parts]
    )
    assert "teacher_all" not in result.history[0]
    parts = [dict(zip([part.name for part in loaded.parts], loaded.members, strict=True)) for loaded in (old, new)]  # type: ignore[union-attr]
    for name in ("collaborative", "graph"):
        # i19 is met by the newest events alone
        before, after = (part[name].items.weight[old.row["i19"]] for part in parts)
        assert not torch.allclose(before, after)
        assert isinstance(parts[1][name].sequence, FadingMean)


def test_an_item_of_the_newest_events_alone_is_cold_to_the_judge_and_known_to_what_serves(run: Run) -> None:
    judged = promoted(run)
    result = again(run)
    for name, known in ((judged.recommender_id, False), (result.recommender_id, True)):
        loaded = load_recommender(artifacts.find(run.lake, "recommender", name))
        counting = next(member for part, member in zip(loaded.parts, loaded.members, strict=True) if part.name == "counting")  # type: ignore[union-attr]
        assert bool(counting.items.weight[loaded.row["i19"]].any()) is known
    loaded = load_recommender(artifacts.find(run.lake, "recommender", result.recommender_id))
    told = {part["name"]: part["scale"] for part in loaded.meta["parts"]}
    assert set(told) == set(judged.fused.weights) and all(scale > 0 for scale in told.values())


def test_later_challengers_are_compared_with_what_was_judged(run: Run) -> None:
    judged = promoted(run)
    again(run)
    assert registry.opponent(run, "another") == judged.recommender_id
    assert registry.opponent(run, judged.recommender_id) == "", "a night that is run again compares as it did"
    champion = registry.champion(run)
    assert champion is not None
    registry.set_aliases(run, [("reference", champion["version"])])
    assert registry.reference(run, "another") == judged.recommender_id


def test_a_second_time_nothing_is_done_and_latest_stays_the_judged_one(run: Run) -> None:
    judged = promoted(run)
    first = again(run)
    remember(run, config(run, stage="refit").manifest, first)
    second = again(run)
    assert (second.recommender_id, second.promoted) == (first.recommender_id, True)
    assert "already" in second.note
    assert manifests.latest(run, "rat")["recommender_id"] == judged.recommender_id


def test_the_same_events_make_the_same_recommender(run: Run, tmp_path: Path) -> None:
    promoted(run)
    shutil.copytree(run.lake, tmp_path / "copy")
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "copy.db")
    copy = dataclasses.replace(run, lake=tmp_path / "copy", tracking_uri=f"sqlite:///{tmp_path}/copy.db")
    assert again(run).recommender_id == again(copy).recommender_id
    assert list((run.lake / "checkpoints").glob("*")) == []


def test_a_loss_far_above_the_judged_one_is_refused_and_the_judged_one_serves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = promoted(run)
    monkeypatch.setattr(refit, "compare_losses", lambda *given: ((), 1.31))
    with pytest.raises(Refused, match=r"1\.310 times the judged training's.*rat\.refit_loss = 1\.2"):
        again(run, refit_loss=0.2)
    champion = registry.champion(run)
    assert champion is not None and champion["recommender_id"] == judged.recommender_id


def test_losses_are_held_against_each_other_epoch_by_epoch(run: Run) -> None:
    promoted(run)
    result = again(run)
    last = max(at for at, one in enumerate(result.history) if "all" in one)
    teacher = max(at for at, one in enumerate(result.history) if "teacher_all" in one)
    ratios = [result.history[last]["all"] / result.history[last]["gated"],
              result.history[teacher]["teacher_all"] / result.history[teacher]["teacher_gated"]]  # fmt: skip
    assert result.loss_ratio == pytest.approx(max(ratios), abs=1e-4)


def test_without_a_champion_of_this_date_or_where_the_recipe_says_so_nothing_is_done(run: Run) -> None:
    assert again(run).note == f"no champion was trained on {DS}"
    judged = promoted(run)
    off = again(run, refit=False)
    assert (off.recommender_id, off.promoted) == (judged.recommender_id, True)
    assert "rat.refit is off" in off.note


def test_other_events_than_the_judged_training_read_are_refused_with_the_remedy(run: Run) -> None:
    promoted(run)
    partitions.write(run.lake, SEQUENCES, f"ds={DS}", [sequence_rows()])
    with pytest.raises(InputError, match="run rat and evaluate again"):
        again(run)


def test_a_champion_that_changed_meanwhile_is_left_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(run)
    other = small_registry.kept(run, seed=3)
    keep = refit.Work.keep

    def late(self: refit.Work, *given: Any) -> None:
        keep(self, *given)
        version = registry.log_run(run, "promote", {}, {}, other, registry.RECOMMENDER, registry.RECOMMENDER_CODE)
        registry.set_aliases(run, [("champion", version)])

    monkeypatch.setattr(refit.Work, "keep", late)
    with pytest.raises(Refused, match="no longer champion"):
        again(run)
    champion = registry.champion(run)
    assert champion is not None and champion["recommender_id"] == other.name
