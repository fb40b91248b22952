"""The champion that gates let out, trained on a split -> the same recommender trained on all events: what serves.

The gates judge a model that never saw the newest events; what serves should know them. The settings, the number of epochs, the
whitening, the parts and their weights are those that validation chose; teacher and llmemb part are trained again on every event,
counts are counted again. Nothing is left to judge it by, so its loss is held against that of the judged training, epoch by epoch.

Later challengers are compared with the recommender that was judged, not with this one: it has seen what they are tested on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.engines import registry
from jobs.lake import artifacts, manifests
from jobs.lake.locks import alone
from jobs.lake.tensors import pick_device, read_catalogue, read_histories
from jobs.rat.config import Config
from jobs.rat.whole import Judged, Work
from jobs.recipe import build
from jobs.run import InputError, Refused, Run, as_json
from models.behaviour.artifact import load_recommender
from models.behaviour.data import train_counts
from models.behaviour.progress import Trained
from models.behaviour.training import Training
from models.processes import join

log = logging.getLogger(__name__)
WAIT_S = 60.0
"""How long to wait for a promotion or rollback."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What serves from now on, and how its training went beside the judged one."""

    recommender_id: str
    """Trained on all events; the judged one where nothing was done."""
    gated_id: str
    """The recommender that was judged."""
    note: str
    """What was done, or why nothing was."""
    promoted: bool
    """Whether the champion is of this date: other jobs should bring it online."""
    history: tuple[dict[str, float], ...] = ()
    """Loss of each epoch: `gated`, `all`, and of the teachers `teacher_gated`, `teacher_all`."""
    loss_ratio: float | None = None
    """The last loss over the judged training's at the same epoch, the worse of teacher and llmemb part."""
    version: str = ""
    device: str = ""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    outputs: dict[str, str] = dataclasses.field(default_factory=dict)
    rows: dict[str, int] = dataclasses.field(default_factory=dict)


def run(config: Config) -> Result:
    """Trains the newest champion of this date again on all events and makes that the champion.

    Nothing is done without a champion of this date, where that is already one of all events, or where the recipe says so. Raises
    InputError where the runs that trained it are not on record, Refused where a loss is above `refit_loss`.
    """
    champion = registry.champion(config.run)
    if champion is None or champion["ds"] != config.run.ds:
        return Result(recommender_id="", gated_id="", note=f"no champion was trained on {config.run.ds}", promoted=False)
    done = Result(recommender_id=champion["recommender_id"], gated_id=registry.judged_id(champion), note="", promoted=True)
    if done.gated_id != done.recommender_id:
        return dataclasses.replace(done, note=f"{done.recommender_id} is trained on all events already")
    if not config.refit:
        return dataclasses.replace(done, note="rat.refit is off: what was judged serves")
    judged = read_judged(config.run, done.gated_id)
    if judged.settings.cold_share or judged.settings.adapter == "llm_esr":
        return dataclasses.replace(done, note="items are held out of its training, or it is a baseline: what was judged serves")
    return trained_anew(config, judged, champion)


def read_judged(run: Run, recommender_id: str) -> Judged:
    """The recommender and how it was trained. Raises InputError where the lake does not tell."""
    folder = registry.fetch(run, "recommender", recommender_id)
    manifest = made_by(run, "rat", "recommender_id", recommender_id)
    settings = build(Config, {**manifest["config"], "run": run}, "rat")
    told = manifest["result"]
    teacher_told, teacher_training = None, None
    if told["teacher_id"] != "none":
        pretrained = made_by(run, "pretrain", "teacher_id", told["teacher_id"])
        teacher_told = pretrained["result"]
        if pretrained["config"].get("view", "trained") == "trained":
            teacher_training = build(Training, pretrained["config"]["training"], "pretrain.training")
    loaded = load_recommender(folder, pick_device(run))
    assert loaded.whitening is not None
    return Judged(id=recommender_id, folder=folder, settings=settings, told=told, loaded=loaded, teacher_told=teacher_told,
                  teacher_training=teacher_training, whitening=loaded.whitening)  # fmt: skip


def made_by(run: Run, job: str, name: str, identity: str) -> dict[str, Any]:
    """The manifest of the run that made an artifact, whatever its experiment. Raises InputError where there is none."""
    for path in manifests.history(run.lake, job, run.ds):
        manifest = manifests.parsed(path)
        if manifest.get("status") == "done" and manifest.get("config") and manifest["result"].get(name) == identity:
            return manifest
    raise InputError(f"no run of {job} up to {run.ds} is on record that made {identity}: it can't be trained again; set "
                     "rat.refit to false, or train anew")  # fmt: skip


def trained_anew(config: Config, judged: Judged, champion: Mapping[str, str]) -> Result:
    """Both trainings, the comparison of losses, the artifact, and the alias."""
    catalogue = read_catalogue(config.run)
    split, digest = read_histories(config.run, catalogue.item_ids)
    if (catalogue.digest, digest) != (judged.told["inputs"]["items"], judged.told["inputs"]["sequences"]):
        raise InputError(
            f"items or sequences of {config.run.ds} aren't those that {judged.id} was trained on: run rat and evaluate again"
        )
    split = split.to(pick_device(config.run))
    work = Work(config, judged, catalogue, split)
    teacher, teacher_trained = work.teacher()
    llmemb, trained = work.llmemb(teacher)
    history, ratio = compare_losses(judged, trained, teacher_trained)
    log.info("loss on all events is %.3f times that of the judged training", ratio)
    if not ratio <= 1 + config.refit_loss:
        raise Refused(f"trained on all events, the loss is {ratio:.3f} times the judged training's at the same epoch, more than "
                      f"1 + rat.refit_loss = {1 + config.refit_loss}: {judged.id}, which was judged, serves on")  # fmt: skip
    result = Result(
        recommender_id="0" * 16, gated_id=judged.id, note=f"trained on all events for {trained.epochs} epochs", promoted=True,
        history=history, loss_ratio=round(ratio, 4), device=str(split.items_N.device),
        inputs={"items": catalogue.digest, "sequences": digest, "recommender": judged.id},
        rows={"items": split.catalogue, "events": len(split.items_N), "train_events": int(train_counts(split).sum())},
    )  # fmt: skip
    if join()[0]:
        return result
    staged = artifacts.stage(config.run.lake, "recommender")
    work.keep(staged, teacher, llmemb)
    made = artifacts.keep(config.run.lake, "recommender", staged)
    for checkpoint in work.checkpoints:
        checkpoint.unlink(missing_ok=True)
    version = released(config.run, made, result, champion)
    return dataclasses.replace(result, recommender_id=made, version=version, outputs={"recommender": made})


def compare_losses(judged: Judged, trained: Trained, teacher: Trained | None) -> tuple[tuple[dict[str, float], ...], float]:
    """Losses by epoch beside those of the judged training, and the worst ratio at the last epoch."""
    curves = {"gated": [one["loss"] for one in judged.told["history"]], "all": [one["loss"] for one in trained.history]}
    if teacher is not None and judged.teacher_told is not None:
        curves["teacher_gated"] = [one["loss"] for one in judged.teacher_told["history"]]
        curves["teacher_all"] = [one["loss"] for one in teacher.history]
    most = max(len(curve) for name, curve in curves.items() if name.endswith("all"))
    history = tuple({name: curve[at] for name, curve in curves.items() if at < len(curve)} for at in range(most))
    ratios = [curves[f"{name}all"][-1] / max(curves[f"{name}gated"][len(curves[f"{name}all"]) - 1], 1e-9)
              for name in ("", "teacher_") if f"{name}all" in curves]  # fmt: skip
    return history, max(ratios)


def released(run: Run, recommender_id: str, result: Result, champion: Mapping[str, str]) -> str:
    """Registers it and moves the alias from the judged one to it; its version. Raises Refused where another became champion."""
    artifact = artifacts.find(run.lake, "recommender", recommender_id)
    with alone(run.lake, "promotion", WAIT_S):
        if registry.champion(run) != dict(champion):
            raise Refused(
                f"{champion['recommender_id']} is no longer champion: what replaced it is trained on all events by its own run"
            )
        version = registry.log_run(
            run, "refit", {"gated_id": result.gated_id}, {"loss_ratio": result.loss_ratio or 0.0}, artifact, registry.RECOMMENDER,
            registry.RECOMMENDER_CODE, inputs=result.inputs, tags={"gated_id": result.gated_id},
            documents={"refit": as_json(result)},
        )  # fmt: skip
        assert version is not None
        registry.set_aliases(run, [("champion", version)])
        card = f"Recommender {result.gated_id}, judged as version {champion['version']}, whose card tells of it: {result.note}. "
        registry.describe(run, version, card + f"Its loss is {result.loss_ratio} times that of the judged training.")
    return version
