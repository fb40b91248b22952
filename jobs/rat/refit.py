"""The champion that gates let out, trained on a split -> the same recommender trained on all events: what serves.

The gates judge a model that never saw the newest events; what serves should know them. The settings, the number of epochs, the
whitening, the parts and their weights are those that validation chose; teacher and llmemb part are trained again on every event,
counts are counted again. Nothing is left to judge it by, so its loss is held against that of the judged training, epoch by epoch.

Later challengers are compared with the recommender that was judged, not with this one: it has seen what they are tested on.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jobs.engines import registry
from jobs.lake import artifacts, manifests
from jobs.lake.locks import alone
from jobs.lake.tensors import Catalogue, checkpoint_path, pick_device, progress_log, read_catalogue, read_embeddings, read_histories
from jobs.rat import rotation
from jobs.rat.fuse import TRAINED
from jobs.rat.rotation import Goal, Rotation
from jobs.recipe import build
from jobs.run import InputError, Refused, Run, as_json
from models.behaviour import fusion, parts
from models.behaviour.artifact import load_recommender, save_fused, save_recommender
from models.behaviour.data import Histories, train_counts
from models.behaviour.fused import FusedRecommender, Part, Weights
from models.behaviour.fusion import Scores
from models.behaviour.items import IdItems, TableItems
from models.behaviour.progress import Trained
from models.behaviour.recommender import LoadedRecommender, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import Whitening
from models.processes import join

if TYPE_CHECKING:
    from jobs.rat import Config

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


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The recommender to be trained again, and how it was trained."""

    id: str
    folder: Path
    settings: Config
    """Of the `rat` that trained it."""
    told: Mapping[str, Any]
    """The Result of that run."""
    loaded: FusedRecommender | LoadedRecommender
    teacher_told: Mapping[str, Any] | None
    """The Result of the `pretrain` that trained its teacher; None without one."""
    teacher_training: Training | None
    whitening: Whitening


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
    judged = found(config.run, done.gated_id)
    if judged.settings.cold_share:
        return dataclasses.replace(done, note="items are held out of its training (rat.cold_share): it is an experiment")
    return trained_anew(config, judged, champion)


def found(run: Run, recommender_id: str) -> Judged:
    """The recommender and how it was trained. Raises InputError where the lake does not tell."""
    from jobs.rat import Config

    folder = registry.fetch(run, "recommender", recommender_id)
    manifest = made_by(run, "rat", "recommender_id", recommender_id)
    settings = build(Config, {**manifest["config"], "run": run}, "rat")
    told = manifest["result"]
    teacher_told, teacher_training = None, None
    if told["teacher_id"] != "none":
        pretrained = made_by(run, "pretrain", "teacher_id", told["teacher_id"])
        teacher_told = pretrained["result"]
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
    raise InputError(f"no run of {job} up to {run.ds} is on record that made {identity}: it can't be trained again; set rat.refit "
                     "to false, or train anew")  # fmt: skip


def trained_anew(config: Config, judged: Judged, champion: Mapping[str, str]) -> Result:
    """Both trainings, the comparison of losses, the artifact, and the alias."""
    catalogue = read_catalogue(config.run)
    split, digest = read_histories(config.run, catalogue.item_ids)
    if (catalogue.digest, digest) != (judged.told["inputs"]["items"], judged.told["inputs"]["sequences"]):
        raise InputError(f"items or sequences of {config.run.ds} are not those that {judged.id} was trained on: run extract, rat and "
                         "evaluate again")  # fmt: skip
    split = split.to(pick_device(config.run))
    work = Work(config, judged, catalogue, split)
    teacher, teacher_trained = work.teacher()
    llmemb, trained = work.llmemb(teacher)
    history, ratio = compared(judged, trained, teacher_trained)
    log.info("loss on all events is %.3f times that of the judged training", ratio)
    if not ratio <= 1 + config.refit_loss:
        raise Refused(f"trained on all events, the loss is {ratio:.3f} times the judged training's at the same epoch, more than "
                      f"1 + rat.refit_loss = {1 + config.refit_loss}: {judged.id}, which was judged, goes on serving")  # fmt: skip
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


def compared(judged: Judged, trained: Trained, teacher: Trained | None) -> tuple[tuple[dict[str, float], ...], float]:
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
            raise Refused(f"{champion['recommender_id']} is no longer champion: what replaced it is trained on all events by its own run")
        version = registry.log_run(
            run, "refit", {"gated_id": result.gated_id}, {"loss_ratio": result.loss_ratio or 0.0}, artifact, registry.RECOMMENDER,
            registry.RECOMMENDER_CODE, inputs=result.inputs, tags={"gated_id": result.gated_id},
            documents={"refit": as_json(result)},
        )  # fmt: skip
        assert version is not None
        registry.set_aliases(run, [("champion", version)])
    return version


class Work:
    """The trainings on all events, and the artifact of what they made.

    Shapes: V items + 1 (row 0 is padding), N items, E LLM width, K whitened width, D width of a part.
    """

    def __init__(self, config: Config, judged: Judged, catalogue: Catalogue, split: Histories) -> None:
        self.config, self.judged, self.catalogue, self.split = config, judged, catalogue, split
        self.settings = judged.settings
        length_U = split.length_U
        self.events = dataclasses.replace(split, train_end_U=length_U, valid_end_U=length_U)
        self.counts_V = train_counts(self.events)
        self.device = split.items_N.device
        llm_NE = read_embeddings(config.run, judged.told["encoder_id"], catalogue.content_hashes).to(self.device)
        with torch.no_grad():
            self.white_NK = judged.whitening(llm_NE)
        self.llm_NE = llm_NE
        self.checkpoints: list[Path] = []

    def train(self, name: str, recommender: Recommender, training: Training, epochs: int, aligner: Aligner | None) -> Trained:
        """All epochs on all events. Validation runs once, at the end, on events that were trained on: nothing goes by it."""
        whole = dataclasses.replace(training, epochs=epochs, validate_every=epochs, patience=epochs)
        inputs = {"judged": self.judged.id, "part": name}
        self.checkpoints.append(checkpoint_path("refit", self.settings, inputs, self.config.run.lake))
        return train(
            recommender, self.events, whole, max_len=self.settings.backbone.max_len, seed=self.config.run.seed,
            log=progress_log("refit"), candidates_M=self.counts_V.nonzero().flatten(), aligner=aligner,
            checkpoint=self.checkpoints[-1], unseen=self.config.run.exclude_seen, validate_on=self.split,
        )  # fmt: skip

    def teacher(self) -> tuple[Recommender | None, Trained | None]:
        """The teacher of all events."""
        if self.judged.teacher_told is None or self.judged.teacher_training is None:
            return None, None
        torch.manual_seed(self.config.run.seed)
        backbone = self.settings.backbone
        teacher = Recommender(IdItems(self.events.catalogue + 1, backbone.width), build_sequence(backbone))
        return teacher, self.train("teacher", teacher, self.judged.teacher_training, self.judged.teacher_told["best_epoch"], None)

    def llmemb(self, teacher: Recommender | None) -> tuple[Recommender, Trained]:
        """The llmemb part of all events, aligned to the teacher of all events."""
        from jobs import rat

        torch.manual_seed(self.config.run.seed)
        sequence = build_sequence(self.settings.backbone, self.settings.adapter)
        recommender = Recommender(rat.make_items(self.settings, self.judged.whitening, self.llm_NE), sequence)
        aligner = None
        if teacher is not None and self.settings.alpha and self.settings.adapter != "llm_esr":
            weight_V = self.counts_V / (self.counts_V + self.settings.popularity_prior).clamp_min(1e-9)
            aligner = Aligner(
                teacher_VD=teacher.item_table().detach(), weight_V=weight_V, alpha=self.settings.alpha,
                temperature=self.settings.temperature, text_V=rat.texts_of(self.catalogue).to(self.device),
            )  # fmt: skip
        trained = self.train("llmemb", recommender, self.settings.training, self.judged.told["best_epoch"], aligner)
        return recommender.eval(), trained

    def keep(self, staged: Path, teacher: Recommender | None, llmemb: Recommender) -> None:
        """Writes the artifact, turned as the judged one was, towards the space that served before."""
        meta = {
            **{name: self.judged.loaded.meta[name] for name in ("encoder_id", "cold_share", "seed", "ds")},
            "teacher_id": self.judged.told["teacher_id"], "gated_id": self.judged.id,
        }  # fmt: skip
        goal = rotation.find(self.config.run, self.settings.rotate_to, self.catalogue, self.settings.backbone.width)
        own = Part(name="llmemb", items=llmemb.items, sequence=llmemb.sequence, backbone=self.settings.backbone,
                   config=self.item_config())  # fmt: skip
        if not isinstance(self.judged.loaded, FusedRecommender):
            turn_DD, told = rotation.turn(goal, "llmemb", self.goal_rows(own, goal))
            save_recommender(
                staged, llmemb, item_ids=self.catalogue.item_ids, backbone=self.settings.backbone, items=own.config,
                whitening=self.judged.whitening, turn_DD=turn_DD,
                meta=meta if turn_DD is None else meta | {"rotation": as_json(told)},
            )  # fmt: skip
            return
        made = [self.part(known, member, own, teacher) for known, member in
                zip(self.judged.loaded.meta["parts"], self.judged.loaded.members, strict=True)]  # fmt: skip
        turns, told = self.turns(made, goal)
        weights, means = self.weights(made)
        centres = {name: share * (means[name] @ turns[name] if name in turns else means[name])
                   for name, share in weights.centre.items()}  # fmt: skip
        save_fused(
            staged, made, weights, item_ids=self.catalogue.item_ids, counts_V=self.counts_V, whitening=self.judged.whitening,
            turns=turns, centres=centres, meta=meta | {"rotation": as_json(told)} if turns else meta,
        )  # fmt: skip

    def item_config(self) -> dict[str, Any]:
        """What builds the llmemb part's items, as the judged artifact says."""
        loaded = self.judged.loaded
        if isinstance(loaded, FusedRecommender):
            return next((dict(part["items"]) for part in loaded.meta["parts"] if part["name"] == "llmemb"), {})
        return dict(loaded.meta["items"])

    def part(self, known: Mapping[str, Any], member: LoadedRecommender, own: Part, teacher: Recommender | None) -> Part:
        """One part of all events: trained, shrunk or counted anew; text stays as it was chosen."""
        if known["name"] == "llmemb":
            return own
        if known["name"] == "collaborative":
            assert teacher is not None
            k = self.judged.told["fused"]["chosen"].get("collaborative", self.settings.fusion.shrink[0])
            items = parts.shrunk_items(teacher.eval().item_table().detach(), self.counts_V, self.white_NK, k)
            return Part(name="collaborative", items=items, sequence=teacher.sequence, backbone=self.settings.backbone,
                        config={"kind": "shrunk"})  # fmt: skip
        counted = isinstance(member.items, TableItems)
        again = parts.counting_items(self.events, self.settings.fusion.counting_width) if counted else member.items
        return Part(name=known["name"], items=again, sequence=member.sequence, backbone=member.backbone, config=known["items"],
                    fading=known.get("fading"))  # fmt: skip

    def turns(self, made: Sequence[Part], goal: Goal | Rotation) -> tuple[dict[str, Tensor], Rotation]:
        """turn_DD of each trained part towards the space that served, and how near the first one came."""
        turns, told = dict[str, Tensor](), Rotation(note="nothing to turn")
        for part in sorted((part for part in made if part.name in TRAINED), key=lambda part: TRAINED.index(part.name)):
            turn_DD, one = rotation.turn(goal, part.name, self.goal_rows(part, goal))
            if turn_DD is not None:
                told = told if turns else one
                turns[part.name] = turn_DD
        return turns, told

    def goal_rows(self, part: Part, goal: Goal | Rotation) -> Tensor:
        """new_ND of the goal's items."""
        if isinstance(goal, Rotation):
            return torch.zeros(0, 0)
        row_N = torch.from_numpy(goal.row_N).to(self.device)
        with torch.no_grad():
            alone = part.loaded(self.catalogue.item_ids, self.judged.whitening, self.device)
            return alone.from_white(self.white_NK[row_N - 1], row_N)

    def weights(self, made: Sequence[Part]) -> tuple[Weights, dict[str, Tensor]]:
        """The weights that validation chose, over the spread that each part's scores have now; and mean user vectors."""
        told = self.judged.told["fused"]
        longest = max(part.backbone.max_len for part in made)
        sample = fusion.sample_cases(self.split, self.counts_V, max_len=longest, unseen=self.config.run.exclude_seen,
                                     width=sum(part.backbone.width for part in made))  # fmt: skip
        scores = {part.name: self.scored(sample, part) for part in made}
        _, columns = fusion.candidates(sample, list(scores.values()))
        scale = {name: told["weights"][name] / column.spread for name, column in zip(scores, columns, strict=True)}
        weights = Weights(scale=scale, gates=tuple(told["gates"]), centre=dict(told["centre"]))
        return weights, {name: one.user_CD.mean(0) for name, one in scores.items()}

    def scored(self, sample: fusion.Sample, part: Part) -> Scores:
        """The part's side of the sample, as it would serve."""
        alone = part.loaded(self.catalogue.item_ids, self.judged.whitening, self.device)
        row_N = torch.arange(1, len(self.counts_V), device=self.device)
        with torch.no_grad():
            table_VD = torch.nn.functional.pad(alone.from_white(self.white_NK, row_N).float(), (0, 0, 1, 0))
        return fusion.scored(sample, table_VD, alone.encode)
