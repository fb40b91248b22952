"""`sequences`, `llm_embeddings`, the teacher -> a recommender: recommendation adaptation training (LLMEmb, section on RAT)."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from jobs.lake import artifacts, manifests
from jobs.lake.tensors import (
    Catalogue,
    checkpoint_path,
    embeddings_digest,
    pick_device,
    progress_log,
    read_catalogue,
    read_embeddings,
    read_histories,
)
from jobs.rat import fuse, refit, rotation
from jobs.rat.rotation import Goal, Rotation
from jobs.run import InputError, Run, as_json
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion, Material
from models.behaviour.data import Histories, held_out, train_counts, without_items
from models.behaviour.fused import Part
from models.behaviour.items import Items, MlpAdapter, NullSpaceItems, ResidualItems, TextItems
from models.behaviour.llm_esr import Distiller, DualItems, like_users
from models.behaviour.recommender import Backbone, LoadedRecommender, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import Whitening, fit_whitening
from models.processes import join, same_everywhere
from models.text.encoder import read_spec

log = logging.getLogger(__name__)

MODEL = "llmemb-recommender"
LEAST_WHITE = 32
"""Directions that whitening may keep of a catalogue however small."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How LLM embeddings are bent to the logs."""

    run: Run
    encoder: str = "latest"
    """An encoder's id, or `latest`: that of the newest `scft` run."""
    teacher: str = "latest"
    """A teacher's id, `latest`: that of the newest `pretrain` run, or `none`: no alignment."""
    backbone: Backbone = field(default_factory=Backbone)
    """Must be the teacher's: vectors of another kind of SRS are no target."""
    training: Training = field(default_factory=lambda: Training(cosine=0.07))
    fusion: Fusion = field(default_factory=Fusion)
    """The parts of the recommender, and what validation may choose about them."""
    whitened_width: int = 1536
    """Directions kept by whitening, at most; the items' own rank bounds it too, and so does an eighth of their number: whitened
    to as many directions as there are items, all texts lie equally far apart."""
    adapter: Literal["mlp", "residual", "null_space", "llm_esr"] = "mlp"
    """`mlp`: vectors from text alone; `residual`: the same plus a learned ID part; `null_space`: frozen text beside a learned ID
    part (AlphaFuse); `llm_esr`: that baseline, for `evaluate.baselines`, without alignment."""
    hidden: int = 256
    """Hidden width of the `mlp` and `residual` adapters, and of LLM-ESR's."""
    drop_ids: float = 0.3
    """Probability that training drops an ID part of `residual`, so that text carries on its own."""
    distil: float = 0.1
    """Weight of LLM-ESR's self-distillation."""
    like_users: int = 10
    """Like users that a user learns from in it."""
    text_width: int = 32
    """Of the vector's width, what `null_space` gives to text."""
    alpha: float = 0.01
    """Weight of the alignment loss."""
    temperature: float = 0.1
    """Of the alignment's InfoNCE."""
    popularity_prior: float = 5.0
    """An item with n train events aligns with weight n / (n + prior): a tail item's ID vector is mostly noise."""
    cold_share: float = 0.0
    """Share of the items whose train events are left out, so that `evaluate` can rank them as cold; 0 in production. Must be
    the teacher's, which else has seen them."""
    rotate_to: str = "champion"
    """Turns all vectors, users' too, so that items lie near their vectors in another space; no score and no ranking changes.
    `champion`: that of an earlier date; a recommender's id; or `none`. Without a space of the same width there is no turn."""

    stage: Literal["gated", "refit"] = "gated"
    """`gated` trains on the train rows, to be judged by the gates; `refit` trains the champion of this date again on all events,
    as it was trained, and that serves from then on. The nights' own schedule sets it."""
    refit: bool = True
    """Whether a champion is trained again on all events. Off, what serves never saw the newest events, those it was judged by."""
    refit_loss: float = 0.1
    """How far, as a share, the loss of that training may lie above the judged training's at the same epoch."""

    def __post_init__(self) -> None:
        if self.refit_loss < 0:
            raise InputError(
                f"rat.refit_loss {self.refit_loss} must be at least 0: it is the share by which a loss may be higher"
            )
        if not 0 <= self.cold_share < 1:
            raise InputError(f"rat.cold_share {self.cold_share} is not in [0, 1): it is a share of the items")
        if not 0 <= self.drop_ids < 1:
            raise InputError(f"rat.drop_ids {self.drop_ids} is not in [0, 1): it is a probability")
        if self.temperature <= 0 or self.alpha < 0 or self.popularity_prior < 0:
            raise InputError("rat.temperature must be above 0, rat.alpha and rat.popularity_prior at least 0")

    @property
    def manifest(self) -> str:
        """A training on all events stands beside the one that was judged: `latest` means that."""
        return "rat" if self.stage == "gated" else "rat-refit"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The recommender and how good it became."""

    recommender_id: str
    encoder_id: str
    teacher_id: str
    explained_variance: float
    """Share of the embeddings' variance that whitening kept."""
    whitened_width: int
    epochs: int
    best_epoch: int
    validation_ndcg: float
    """NDCG@10 of the best epoch, full ranking, over the last validation event of each user."""
    validation_recall: float
    seconds_per_epoch: float
    device: str
    model_version: str | None
    """In the registry, where there is one."""
    history: tuple[dict[str, float], ...]
    """Of each epoch: loss, and ndcg and recall where it was validated."""
    rotation: Rotation
    """How near a turn brought the vectors to those of the space that served."""
    fused: fuse.Fused
    """The parts, their weights, and what text and its controls were worth."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result | refit.Result:
    """Trains a recommender to be judged, or the champion on all events."""
    return gated(config) if config.stage == "gated" else refit.run(config)


def gated(config: Config) -> Result:
    """Trains a recommender, keeps it in the lake and registers it.

    Raises InputError or ValueError for items without an embedding, a teacher of another kind, or nothing to train on.
    """
    device = pick_device(config.run)
    rank, _ = join()
    encoder_id, teacher_id = chosen(config)
    if config.cold_share and read_spec(artifacts.find(config.run.lake, "encoder", encoder_id)).from_users:
        raise InputError(f"encoder {encoder_id} learned from users' histories, also of items that rat.cold_share "
                         f"{config.cold_share} holds out: train one with training.pair_share and cluster_weight 0")  # fmt: skip
    catalogue = read_catalogue(config.run)
    goal = rotation.find(config.run, config.rotate_to, catalogue, config.backbone.width)
    events, digest = read_histories(config.run, catalogue.item_ids)
    events = without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed)).to(device)
    counts_V = train_counts(events)
    llm_NE = read_embeddings(config.run, encoder_id, catalogue.content_hashes).to(device)
    whitening = fit_whitening(llm_NE, min(config.whitened_width, max(LEAST_WHITE, len(llm_NE) // 8)))
    torch.manual_seed(config.run.seed)
    recommender = Recommender(make_items(config, whitening, llm_NE), build_sequence(config.backbone, config.adapter))
    inputs = {
        "items": catalogue.digest,
        "sequences": digest,
        "encoder": encoder_id,
        "llm_embeddings": embeddings_digest(config.run, encoder_id),
        "teacher": teacher_id,
    }
    if isinstance(goal, Goal):
        inputs |= {"rotate_to": goal.to, "item_embeddings": goal.digest}
    checkpoint = checkpoint_path("rat", config, inputs, config.run.lake)
    trained = train(
        recommender, events, config.training, max_len=config.backbone.max_len, seed=config.run.seed,
        log=progress_log("rat"), candidates_M=counts_V.nonzero().flatten(), unseen=config.run.exclude_seen,
        aligner=make_aligner(config, teacher_id, catalogue, counts_V),
        distiller=make_distiller(config, recommender.items, events), checkpoint=checkpoint,
    )  # fmt: skip
    meta = {"encoder_id": encoder_id, "teacher_id": teacher_id, "cold_share": config.cold_share, "seed": config.run.seed,
            "ds": config.run.ds}  # fmt: skip
    recommender_id, turned, fused = "0" * 16, Rotation(note="another process tells"), fuse.Fused()
    if rank == 0:
        given = material(config, recommender, whitening, llm_NE, catalogue, events, teacher_id)
        staged = artifacts.stage(config.run.lake, "recommender")
        turned, fused = fuse.keep(staged, fusion_of(config), given, goal, meta)
        recommender_id = artifacts.keep(config.run.lake, "recommender", staged)
        log.info("%s", "\n".join([rotation.in_words(turned), *fuse.in_words(fused)]))
    recommender_id = same_everywhere(recommender_id, device)
    result = Result(
        recommender_id=recommender_id,
        encoder_id=encoder_id,
        teacher_id=teacher_id,
        explained_variance=whitening.explained,
        whitened_width=whitening.map_EK.shape[1],
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        validation_ndcg=trained.ndcg,
        validation_recall=trained.recall,
        seconds_per_epoch=trained.seconds_per_epoch,
        device=str(device),
        model_version=None,
        history=trained.history,
        rotation=turned,
        fused=fused,
        inputs=inputs,
        outputs={"recommender": recommender_id},
        rows={"users": len(events.train_end_U), "items": events.catalogue, "train_events": int(counts_V.sum())},
    )
    if rank == 0:
        result = dataclasses.replace(result, model_version=register(config, result))
        checkpoint.unlink(missing_ok=True)
    return result


def register(config: Config, result: Result) -> str | None:
    """Logs the run and registers the recommender; the new version, or None without a registry."""
    if not config.run.tracking_uri:
        return None
    # MLflow takes seconds to load, and GPU workers may lack it
    from jobs.engines import registry

    known = as_json(result)
    params = {"recommender_id": result.recommender_id, "encoder_id": result.encoder_id, "config": as_json(config)}
    metrics = {name: value for name, value in known.items() if isinstance(value, float)}
    artifact = artifacts.find(config.run.lake, "recommender", result.recommender_id)
    return registry.log_run(config.run, "rat", params, metrics, artifact, MODEL, registry.RECOMMENDER_CODE, inputs=result.inputs)


def chosen(config: Config) -> tuple[str, str]:
    """Ids of the encoder and the teacher (or "none")."""
    encoder_id, teacher_id = config.encoder, config.teacher
    if encoder_id == "latest":
        encoder_id = manifests.latest(config.run, "scft")["encoder_id"]
    if teacher_id == "latest":
        teacher_id = manifests.latest(config.run, "pretrain")["teacher_id"]
    return encoder_id, teacher_id


def make_items(config: Config, whitening: Whitening, llm_NE: Tensor) -> Items:
    """The item source of the configured adapter over the catalogue's whitened embeddings."""
    with torch.no_grad():
        white_NK = whitening(llm_NE)
    if config.adapter == "null_space":
        return NullSpaceItems(white_NK, config.backbone.width, config.text_width)
    if config.adapter == "llm_esr":
        return DualItems(white_NK, config.hidden, config.backbone.width)
    adapter = MlpAdapter(white_NK.shape[1], config.hidden, config.backbone.width)
    if config.adapter == "residual":
        return ResidualItems(white_NK, adapter, config.backbone.width, config.drop_ids)
    return TextItems(white_NK, adapter, unit=config.training.cosine > 0)


def make_distiller(config: Config, items: Items, events: Histories) -> Distiller | None:
    """LLM-ESR's self-distillation over users alike in what they read; None for other adapters."""
    if not isinstance(items, DualItems) or config.distil == 0:
        return None
    like_US = like_users(events, items.white_VK.to(events.items_N.device), config.like_users)
    return Distiller(events, like_US, config.backbone.width, config.distil)


def read_teacher(config: Config, teacher_id: str, catalogue: Catalogue, device: torch.device) -> tuple[LoadedRecommender, Tensor]:
    """The teacher and its table_VD in this catalogue's order; an item that it lacks has zeros.

    Raises InputError for a teacher of another backbone or trained on items held out here.
    """
    teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id), device)
    assert isinstance(teacher, LoadedRecommender)
    if (teacher.backbone.name, teacher.width) != (config.backbone.name, config.backbone.width):
        raise InputError(f"teacher {teacher_id} is a {teacher.backbone.name} of width {teacher.width}, rat.backbone is a "
                         f"{config.backbone.name} of width {config.backbone.width}: pretrain with the same backbone")  # fmt: skip
    if (teacher.meta["cold_share"], teacher.meta["seed"]) != (config.cold_share, config.run.seed) and config.cold_share:
        raise InputError(f"teacher {teacher_id} has seen items that rat.cold_share {config.cold_share} holds out: "
                         "pretrain with the same cold_share and seed")  # fmt: skip
    row_V = torch.tensor([0, *(teacher.row.get(item_id, 0) for item_id in catalogue.item_ids)], device=device)
    return teacher, teacher.table()[row_V]


def make_aligner(config: Config, teacher_id: str, catalogue: Catalogue, counts_V: Tensor) -> Aligner | None:
    """The alignment to the teacher's table; items that the teacher lacks weigh nothing."""
    if teacher_id == "none" or config.alpha == 0 or config.adapter == "llm_esr":
        return None
    teacher, teacher_VD = read_teacher(config, teacher_id, catalogue, counts_V.device)
    known_V = torch.tensor([False, *(item_id in teacher.row for item_id in catalogue.item_ids)], device=counts_V.device)
    weight_V = counts_V / (counts_V + config.popularity_prior).clamp_min(1e-9) * known_V
    text_V = texts_of(catalogue).to(counts_V.device)
    return Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=config.alpha, temperature=config.temperature, text_V=text_V)


def texts_of(catalogue: Catalogue) -> Tensor:
    """text_V: a number for each different text of the catalogue, -1 for padding."""
    texts = catalogue.content_hashes.dictionary_encode().indices.to_numpy()
    return torch.cat([torch.tensor([-1]), torch.from_numpy(texts.astype("int64"))])


def fusion_of(config: Config) -> Fusion:
    """The configured fusion. LLM-ESR is a baseline that stands alone."""
    return Fusion(parts=("llmemb",)) if config.adapter == "llm_esr" else config.fusion


def material(
    config: Config,
    recommender: Recommender,
    whitening: Whitening,
    llm_NE: Tensor,
    catalogue: Catalogue,
    events: Histories,
    teacher_id: str,
) -> Material:
    """What the parts are made of."""
    items = {"kind": config.adapter} | (
        {"text_width": config.text_width} if config.adapter == "null_space" else {"hidden": config.hidden}
    )
    if config.adapter == "mlp" and config.training.cosine:
        items["unit"] = True
    teacher, teacher_VD = None, None
    if teacher_id != "none" and "collaborative" in config.fusion.parts and config.adapter != "llm_esr":
        teacher, teacher_VD = read_teacher(config, teacher_id, catalogue, events.items_N.device)
    llmemb = Part(
        name="llmemb", items=recommender.eval().items, sequence=recommender.sequence, backbone=config.backbone, config=items
    )  # fmt: skip
    with torch.no_grad():
        white_NK = whitening(llm_NE)
    return Material(
        events=events, counts_V=train_counts(events), white_NK=white_NK, whitening=whitening, item_ids=catalogue.item_ids,
        llmemb=llmemb, teacher=teacher, teacher_VD=teacher_VD, unseen=config.run.exclude_seen,
    )  # fmt: skip
