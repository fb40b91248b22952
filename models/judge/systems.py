"""The systems of LLMEmb's family, each made on one split under one harness: a name, what it takes to make it, what serves.

A system is a function of a `Kit`, which holds the split and makes what several systems share (the ID-only teacher) once; the
seconds of a system count all that it needs. What is off here is off by its name in the caller's list.

Shapes: N items, V items + 1 (row 0 is padding), E LLM width, K whitened width, D width, B rows, L positions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.artifact import load_recommender, save_fused
from models.behaviour.assembly import Assembled, Fusion, Material, assemble, centres
from models.behaviour.codes import Codes
from models.behaviour.data import Histories, train_counts
from models.behaviour.fused import FusedRecommender, Part
from models.behaviour.graph import graph_recommender
from models.behaviour.items import IdItems, MlpAdapter, TextItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import Whitening, fit_whitening
from models.judge.evaluation import Encode

Quantise = Callable[[Tensor, int, int], Mapping[str, tuple[Tensor, Tensor | None]]]
"""(emb_ND, books, entries) -> by name: what codes of as many bits tell of the vectors, and the codes where they are bytes."""
FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How systems are made; what they have in common is set once."""

    backbone: Backbone = field(default_factory=lambda: Backbone(width=128, layers=2, dropout=0.5))
    training: Training = field(default_factory=lambda: Training(loss="full", epochs=150, patience=15))
    cosine: float = 0.07
    """Temperature of the text systems' softmax."""
    whitened_width: int = 1536
    """Directions kept by whitening, at most."""
    hidden: int = 256
    """Hidden width of the adapters."""
    alpha: float = 0.01
    """Weight of RAT's alignment loss."""
    temperature: float = 0.1
    """Temperature of the alignment's InfoNCE."""
    prior: float = 5.0
    """Train events from which an item's teacher vector weighs a half in the alignment."""
    distil: float = 0.01
    """Weight of LLM-ESR's distillation."""
    like_users: int = 10
    """How many users of the most similar histories a user learns from in self-distillation."""
    fusion: Fusion = field(default_factory=Fusion)
    """The champion's parts."""
    codes: Codes = field(default_factory=Codes)


@dataclass(frozen=True, kw_only=True)
class System:
    """What a system serves: item vectors, and what makes user vectors of histories of them."""

    table_VD: Tensor
    encode: Encode
    max_len: int
    seconds: float
    """Making it, with all that it needs."""
    bytes_per_item: float
    """Of what a store holds of an item."""
    told: Mapping[str, Any] = field(default_factory=dict)


class Kit:
    """One split, one seed, and what systems share."""

    def __init__(
        self, events: Histories, llm: Mapping[str, Tensor], item_ids: Sequence[str], settings: Settings, *,
        seed: int, unseen: bool, quantise: Quantise | None = None, text_V: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.events, self.llm, self.item_ids, self.settings = events, dict(llm), list(item_ids), settings
        self.seed, self.unseen, self.quantise, self.text_V = seed, unseen, quantise, text_V
        self.counts_V = train_counts(events)
        self.device = events.items_N.device
        self.made: dict[str, tuple[Any, float]] = {}

    def once(self, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
        """What `make` gives, and the seconds that it took when it was made."""
        if name not in self.made:
            torch.manual_seed(self.seed)
            began = time.perf_counter()
            value = make()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.made[name] = value, time.perf_counter() - began
        return self.made[name]

    def white(self, name: str) -> tuple[Whitening, Tensor]:
        """The whitening of an encoder's embeddings, and white_NK."""
        llm_NE = self.llm[name]
        width = min(self.settings.whitened_width, max(1, len(llm_NE) // 8))
        whitening: Whitening = self.once(f"whitening {name}", lambda: fit_whitening(llm_NE, width))[0]
        return whitening, whitening(llm_NE)

    def trained(self, recommender: Recommender, training: Training, **more: Any) -> Recommender:
        """A recommender after training on the split, validated as serving ranks."""
        train(recommender, self.events, training, max_len=self.settings.backbone.max_len, seed=self.seed, log=lambda *_: None,
              candidates_M=self.counts_V.nonzero().flatten(), unseen=self.unseen, **more)  # fmt: skip
        return recommender.eval().requires_grad_(False)

    def teacher(self) -> tuple[Recommender, float]:
        """The ID-only SRS."""
        backbone = self.settings.backbone
        return self.once("teacher", lambda: self.trained(
            Recommender(IdItems(self.events.catalogue + 1, backbone.width), build_sequence(backbone)), self.settings.training
        ))  # fmt: skip

    def aligner(self, teacher: Recommender) -> Aligner:
        """RAT's alignment to a teacher's table."""
        known = self.settings
        weight_V = self.counts_V / (self.counts_V + known.prior)
        return Aligner(teacher_VD=teacher.item_table().detach().float(), weight_V=weight_V, alpha=known.alpha,
                       temperature=known.temperature, text_V=self.text_V)  # fmt: skip

    def rat(self, encoder: str, view: str = "teacher") -> tuple[Recommender, float]:
        """LLMEmb's RAT over an encoder, aligned to the ID-only teacher or to the graph; its seconds with the teacher's."""
        teacher, before = self.teacher() if view == "teacher" else self.graph()
        white_NK = self.white(encoder)[1]

        def make() -> Recommender:
            known = self.settings
            items = TextItems(white_NK, MlpAdapter(white_NK.shape[1], known.hidden, known.backbone.width), unit=True)
            made = Recommender(items, build_sequence(known.backbone))
            return self.trained(made, dataclasses.replace(known.training, cosine=known.cosine), aligner=self.aligner(teacher))

        made, seconds = self.once(f"rat {encoder} {view}", make)
        return made, before + seconds

    def graph(self) -> tuple[Recommender, float]:
        """ELMRec's view by itself."""
        return self.once("graph", lambda: graph_recommender(self.events, self.settings.backbone, self.seed))

    def material(self, encoder: str) -> tuple[Material, float]:
        """What the parts of a fused recommender over an encoder are made of."""
        rat, seconds = self.rat(encoder)
        teacher = self.teacher()[0]
        whitening, white_NK = self.white(encoder)
        backbone = self.settings.backbone
        alone = Part(name="id", items=teacher.items, sequence=teacher.sequence, backbone=backbone, config={"kind": "id"})
        config = {"kind": "mlp", "hidden": self.settings.hidden, "unit": True}
        llmemb = Part(name="llmemb", items=rat.items, sequence=rat.sequence, backbone=backbone, config=config)
        return Material(
            events=self.events, counts_V=self.counts_V, white_NK=white_NK, whitening=whitening, item_ids=self.item_ids,
            llmemb=llmemb, teacher=alone.loaded(self.item_ids, whitening, self.device),
            teacher_VD=teacher.item_table().detach().float(), unseen=self.unseen,
        ), seconds  # fmt: skip

    def fused(self, name: str, encoder: str, fusion: Fusion) -> System:
        """Parts fused late, through the artifact that would serve."""
        given, before = self.material(encoder)

        def make() -> tuple[Assembled, FusedRecommender]:
            assembled = assemble(fusion, given)
            with TemporaryDirectory() as home:
                save_fused(Path(home), assembled.parts, assembled.found.weights, item_ids=given.item_ids, counts_V=given.counts_V,
                           whitening=given.whitening, meta={"encoder_id": encoder},
                           centres=centres(assembled.found.weights.centre, assembled.mean_users, {}))  # fmt: skip
                loaded = load_recommender(Path(home), self.device)
            assert isinstance(loaded, FusedRecommender)
            return assembled, loaded

        (assembled, loaded), seconds = self.once(f"fused {name}", make)
        table_VD = F.pad(loaded.project(self.llm[encoder], self.item_ids), (0, 0, 1, 0))
        told = {"weights": {part: round(weight, 3) for part, weight in assembled.found.relative.items()}}
        return System(table_VD=table_VD, encode=loaded.encode, max_len=loaded.backbone.max_len, seconds=before + seconds,
                      bytes_per_item=FLOAT * loaded.width, told=told)  # fmt: skip

    def served(self, made: tuple[Recommender, float], *, bytes_per_item: float = 0.0) -> System:
        """A trained recommender of one part as a system."""
        recommender, seconds = made
        unit = bool(getattr(recommender.items, "unit", False))
        table_VD = recommender.item_table().detach().float()

        def encode(emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
            with torch.no_grad():
                user_BD: Tensor = recommender.sequence(emb_BLD, valid_BL)[:, -1]
            return F.normalize(user_BD, dim=1) if unit else user_BD

        return System(table_VD=table_VD, encode=encode, max_len=self.settings.backbone.max_len, seconds=seconds,
                      bytes_per_item=bytes_per_item or FLOAT * table_VD.shape[1])  # fmt: skip
