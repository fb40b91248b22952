"""The trainings on all events, and the artifact of what they made.

Shapes: V items + 1 (row 0 is padding), N items, E LLM width, K whitened width, D width of a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.lake.tensors import Catalogue, checkpoint_path, progress_log, read_embeddings
from jobs.rat import fuse, make, rotation
from jobs.rat.config import Config
from jobs.run import as_json
from models.behaviour import fusion
from models.behaviour.artifact import save_fused
from models.behaviour.assembly import Material, centres, part_options, scored
from models.behaviour.data import Histories, train_counts
from models.behaviour.fused import FusedRecommender, Part, Weights
from models.behaviour.graph import graph_recommender
from models.behaviour.items import IdItems
from models.behaviour.progress import Trained
from models.behaviour.recommender import LoadedRecommender, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import Whitening


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
    """None for a teacher that takes no training: the graph."""
    whitening: Whitening


class Work:
    """What is trained again, on what, and the artifact of it."""

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
        self.checkpoints: list[Path] = []

    def train(self, name: str, recommender: Recommender, training: Training, epochs: int, aligner: Aligner | None) -> Trained:
        """All epochs on all events. Validation runs once, at the end, on events that were trained on: nothing goes by it."""
        whole = dataclasses.replace(training, epochs=epochs, validate_every=epochs, patience=epochs)
        inputs = {"judged": self.judged.id, "part": name}
        self.checkpoints.append(checkpoint_path("refit", self.settings, inputs, self.config.run.lake))
        return train(
            recommender, self.events, whole, max_len=self.settings.backbone.max_len, seed=self.config.run.seed,
            log=progress_log("refit", epochs), candidates_M=self.counts_V.nonzero().flatten(), aligner=aligner,
            checkpoint=self.checkpoints[-1], unseen=self.config.run.exclude_seen, validate_on=self.split,
        )  # fmt: skip

    def teacher(self) -> tuple[Recommender | None, Trained | None]:
        """The teacher of all events."""
        backbone = self.settings.backbone
        if self.judged.teacher_told is None:
            return None, None
        if self.judged.teacher_training is None:
            return graph_recommender(self.events, backbone, self.config.run.seed), None
        torch.manual_seed(self.config.run.seed)
        teacher = Recommender(IdItems(self.events.catalogue + 1, backbone.width), build_sequence(backbone))
        return teacher, self.train("teacher", teacher, self.judged.teacher_training, self.judged.teacher_told["best_epoch"], None)

    def llmemb(self, teacher: Recommender | None) -> tuple[Recommender, Trained]:
        """The llmemb part of all events, aligned to the teacher of all events."""
        torch.manual_seed(self.config.run.seed)
        sequence = build_sequence(self.settings.backbone, self.settings.adapter)
        recommender = Recommender(make.make_items(self.settings, self.white_NK, self.judged.whitening.spread_K), sequence)
        aligner = None
        if teacher is not None:
            known_V = torch.ones_like(self.counts_V, dtype=torch.bool)
            aligner = make.make_aligner(self.settings, teacher.item_table().detach(), known_V, self.catalogue, self.counts_V)
        trained = self.train("llmemb", recommender, make.training_of(self.settings), self.judged.told["best_epoch"], aligner)
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
        given = self.material(own, teacher)
        if not isinstance(self.judged.loaded, FusedRecommender):
            fuse.keep_alone(staged, given, goal, meta)
            return
        made = [self.part(known, member, given) for known, member in
                zip(self.judged.loaded.meta["parts"], self.judged.loaded.members, strict=True)]  # fmt: skip
        turns, told = fuse.turned(made, given, goal)
        weights, means = self.weights(made, given)
        save_fused(
            staged, made, weights, item_ids=self.catalogue.item_ids, counts_V=self.counts_V, whitening=self.judged.whitening,
            turns=turns, centres=centres(weights.centre, means, turns),
            meta=meta | {"rotation": as_json(told)} if turns else meta,
        )  # fmt: skip

    def item_config(self) -> dict[str, Any]:
        """What builds the llmemb part's items, as the judged artifact says."""
        loaded = self.judged.loaded
        if isinstance(loaded, FusedRecommender):
            return next((dict(part["items"]) for part in loaded.meta["parts"] if part["name"] == "llmemb"), {})
        return dict(loaded.meta["items"])

    def part(self, known: Mapping[str, Any], member: LoadedRecommender, given: Material) -> Part:
        """One part of all events: trained, shrunk or counted anew, as validation chose; text stays as it was."""
        name, told = str(known["name"]), self.judged.told["fused"]
        if name == "llmemb":
            return given.llmemb
        if name == "text":
            return Part(name=name, items=member.items, sequence=member.sequence, backbone=member.backbone, config=known["items"],
                        fading=known.get("fading"))  # fmt: skip
        fusion_, kind = self.settings.fusion, told.get("counted", "")
        if name == "counting" and kind:
            fusion_ = dataclasses.replace(fusion_, counting=(kind,))
        options = part_options(fusion_, given, name, self.white_NK)
        return next(part for (value, _), part in options.items() if value == told["chosen"].get(name, value))

    def material(self, own: Part, teacher: Recommender | None) -> Material:
        """What parts are made of."""
        alone = None
        if teacher is not None:
            known = Part(name="collaborative", items=teacher.items, sequence=teacher.sequence, backbone=self.settings.backbone,
                         config={"kind": "id"}, fading=getattr(teacher.sequence, "fade", None))  # fmt: skip
            alone = known.loaded(self.catalogue.item_ids, self.judged.whitening, self.device)
        return Material(
            events=self.events, counts_V=self.counts_V, white_NK=self.white_NK, whitening=self.judged.whitening,
            item_ids=self.catalogue.item_ids, llmemb=own, teacher=alone, teacher_VD=None if alone is None else alone.table(),
            unseen=self.config.run.exclude_seen,
        )  # fmt: skip

    def weights(self, made: Sequence[Part], given: Material) -> tuple[Weights, dict[str, Tensor]]:
        """The weights that validation chose, over the spread that each part's scores have now; and mean user vectors."""
        told = self.judged.told["fused"]
        longest = max(part.backbone.max_len for part in made)
        sample = fusion.sample_cases(self.split, self.counts_V, max_len=longest, unseen=self.config.run.exclude_seen,
                                     width=sum(part.backbone.width for part in made))  # fmt: skip
        scores = {part.name: scored(given, sample, part, self.white_NK) for part in made}
        _, columns = fusion.candidates(sample, list(scores.values()))
        scale = {name: told["weights"][name] / column.spread for name, column in zip(scores, columns, strict=True)}
        weights = Weights(scale=scale, gates=tuple(told["gates"]), centre=dict(told["centre"]))
        return weights, {name: one.user_CD.mean(0) for name, one in scores.items()}
