"""Measures what SCFT and RAT are worth on a catalogue and its logs: three seeds, full ranking, paired intervals.

Four commands, the first two on a GPU, each of which prints one JSON line:

python tests/benchmarks/bench_quality.py encode --data ../shared/data/amazon_beauty --out encoded
    fine-tunes an encoder for each seed, and one on shuffled texts as a control; keeps every item's embedding
python tests/benchmarks/bench_quality.py rank --data ../shared/data/amazon_beauty --encoded encoded --out ranks --seed 42
    trains every recommender, on all items and with a tenth of them held out as cold; keeps each user's rank. A second run
    adds the models that the first did not come to; `--fuse zero` adds to each model the scores of text as it is
python tests/benchmarks/bench_quality.py compare ranks/*.safetensors
    means over the seeds by slice, and differences with 95 % intervals from a bootstrap over users
python tests/benchmarks/bench_quality.py neighbours --data ../shared/data/amazon_beauty --encoded encoded
    ranks without any training, by the cosine of an item to what the user had: what the embeddings are worth as they are, and
    whitened; each encoder less the zero-shot one

Needs torch, transformers, peft, numpy and pyarrow only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.behaviour.data import Histories, followers, held_out, inputs_before, neighbours, train_counts, without_items
from models.behaviour.item_sources import build_items
from models.behaviour.items import IdItems
from models.behaviour.llm_esr import Distiller, like_users
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import fit_whitening
from models.judge.bootstrap import bootstrap, estimate
from models.judge.evaluation import SLICES, Cases, floor_ranks, make_cases, vector_ranks
from models.judge.metrics import by_rank
from models.text.base_model import base_sha256, load_base, tokenizer_sha256
from models.text.embedding import embed_items
from models.text.encoder import Encoder, Spec
from models.text.lora import Lora, add_lora
from models.text.objectives import Signals
from models.text.prompts import Attributes, FieldPolicy
from models.text.scft import Scft, fine_tune
from models.text.scft_batches import Pairs, shuffle_texts
from models.text.view_retrieval import hold_out_views, validate_views
from tests.benchmarks.bench_rat import load

FIELDS = ("title", "brand", "categories", "price", "year", "genres", "tags")
"""What the LLM may read, where a catalogue has it."""
COLD_SHARE, COLD_SEED = 0.1, 42
"""Items held out of training in the setting `cold`; the same ones for every seed, so that users can be paired."""
PRIOR, ALPHA, TEMPERATURE, HIDDEN, WHITENED, LIKE_USERS, DISTIL, DROP = 5.0, 0.01, 0.1, 256, 1536, 10, 0.1, 0.3
PAIR_SHARE = 0.5
FUSED, TEXT_WEIGHTS = "+text", (0.1, 0.2, 0.3, 0.5, 0.8)
RECENT, FADING = 20, 0.7
"""What the ranking without training remembers of a user: so many events, each weighing less than the one after it."""
ADJUSTED, WIDE_ADJUSTED, WIDE = 0.7, 0.5, 1024
"""Logit adjustment of the models that lean to the tail. A wide adapter (of that hidden width) leans there by itself."""


@dataclass(frozen=True)
class Model:
    """A recommender of the table: its items, what reads them, and how far its training leans to the tail."""

    items: str
    llm: str = ""
    backbone: str = "sasrec"
    adjustment: float = 0.0
    hidden: int = HIDDEN
    """Hidden width of the adapter."""
    settings: tuple[str, ...] = ("all", "cold")


MODELS = {
    "id_only": Model("id"),
    "scft": Model("mlp", "scft"),
    "zero_shot": Model("mlp", "zero", settings=("cold",)),
    "shuffled": Model("mlp", "shuffled", settings=("cold",)),
    "id_only_adjusted": Model("id", adjustment=ADJUSTED),
    "scft_adjusted": Model("mlp", "scft", adjustment=ADJUSTED),
    "zero_shot_adjusted": Model("mlp", "zero", adjustment=ADJUSTED, settings=("cold",)),
    "shuffled_adjusted": Model("mlp", "shuffled", adjustment=ADJUSTED, settings=("cold",)),
    "wide": Model("mlp", "scft", hidden=WIDE),
    "wide_adjusted": Model("mlp", "scft", adjustment=WIDE_ADJUSTED, hidden=WIDE),
    "text_50": Model("mlp", "zero", adjustment=0.5, hidden=WIDE),
    "text_60": Model("mlp", "zero", adjustment=0.6, hidden=WIDE),
    "text_70": Model("mlp", "zero", adjustment=0.7, hidden=WIDE),
    "residual": Model("residual", "scft"),
    "residual_adjusted": Model("residual", "scft", adjustment=ADJUSTED),
    "null_space": Model("null_space", "scft"),
    "llm_esr": Model("llm_esr", "zero", settings=("all",)),
    "gru4rec_id": Model("id", backbone="gru4rec", settings=("all",)),
    "gru4rec_scft": Model("mlp", "scft", "gru4rec", settings=("all",)),
    "bert4rec_id": Model("id", backbone="bert4rec", settings=("all",)),
    "bert4rec_scft": Model("mlp", "scft", "bert4rec", settings=("all",)),
}
PAIRS = (
    ("scft", "zero_shot"), ("scft_adjusted", "zero_shot_adjusted"), ("shuffled", "scft"), ("shuffled_adjusted", "scft_adjusted"),
    ("scft", "id_only"), ("scft_adjusted", "id_only"), ("scft_adjusted", "id_only_adjusted"), ("residual", "id_only"),
    ("residual_adjusted", "id_only"), ("residual", "scft"), ("null_space", "id_only"), ("null_space", "scft"),
    ("wide", "id_only"), ("wide", "scft"), ("wide_adjusted", "id_only"),
    ("wide_adjusted", "id_only_adjusted"), ("wide_adjusted", "scft_adjusted"),
    ("text_50", "id_only"), ("text_60", "id_only"), ("text_70", "id_only"),
    ("zero_shot", "id_only"), ("zero_shot_adjusted", "id_only"), ("id_only_adjusted", "id_only"), ("llm_esr", "id_only"),
    ("scft", "llm_esr"), ("scft_adjusted", "llm_esr"), ("gru4rec_scft", "gru4rec_id"), ("bert4rec_scft", "bert4rec_id"),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- encode


def read_items(data: Path) -> list[Attributes]:
    """What the LLM may read of every item, in the file's order; its sales rank tells of test days and stays out."""
    fields = [name for name in FIELDS if name in pq.read_schema(data / "items.parquet").names]
    rows = pq.read_table(data / "items.parquet", columns=fields).to_pylist()
    text = [{name: ", ".join(value) if isinstance(value, list) else value or "" for name, value in row.items()} for row in rows]
    return [[(name, row[name]) for name in fields if row[name]] for row in text]


def fresh(
    base: str, policy: FieldPolicy, pooling: Any, layers: int, seed: int, device: torch.device, *, r: int = Lora.r, **shape: Any
) -> Encoder:
    """The base model with LoRA weights that change nothing yet, or with suffix tokens as they start; `shape` are keys of Spec."""
    model, tokenizer, folder = load_base(base, device=device, layers=layers)
    torch.manual_seed(seed)
    lora = None if shape.get("suffix_tokens") else Lora(r=r)
    spec = Spec(base=base, base_sha256=base_sha256(folder), tokenizer_sha256=tokenizer_sha256(tokenizer), policy=policy,
                lora=lora, pooling=pooling, layers=layers, max_tokens=512, width=model.config.hidden_size, **shape)  # fmt: skip
    return Encoder(add_lora(model, lora) if lora else model, tokenizer, spec)


def encode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keeps zero.safetensors, scft-SEED.safetensors for each seed and shuffled.safetensors, all float16.

    `--encoders` also takes pairs-SEED, which learns from what users took one after the other, items held out as cold left out.
    """
    device = torch.device(arguments.device)
    items, policy = read_items(arguments.data), FieldPolicy(domain=arguments.domain)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = Scft(steps=arguments.steps, batch=arguments.batch, ratio=arguments.ratio, temperature=arguments.temperature,
                  learning_rate=arguments.learning_rate, validate_every=max(1, arguments.steps // 4),
                  fp8=arguments.fp8)  # fmt: skip
    events = next(parts.events for _, parts in settings(arguments)).to("cpu")
    pairs = Pairs(pair_P2=neighbours(events).numpy() - 1, user_P=events.user_N[followers(events)].numpy())
    figures: dict[str, Any] = {}
    for name in arguments.encoders or ("zero", *(f"scft-{seed}" for seed in arguments.seeds), "shuffled"):
        seed = int(name.partition("-")[2] or arguments.seeds[0])
        began = time.perf_counter()
        encoder = fresh(arguments.base, policy, arguments.pooling, arguments.layers, seed, device)
        texts = encoder.tokenize(shuffle_texts(items, seed) if name == "shuffled" else items)
        if name == "zero":
            figures[name] = validate_views(encoder.eval(), hold_out_views(texts, config, encoder.limit, seed)[0])[0]
        else:
            own = dataclasses.replace(config, pair_share=PAIR_SHARE if name.startswith("pairs") else 0.0)
            tuned = fine_tune(encoder, texts, own, seed=seed, log=quietly, signals=Signals(pairs=pairs))
            best = next(entry for entry in tuned.history if entry["step"] == tuned.best_step)
            figures[name] = {"base": tuned.history[0], "tuned": best, "tokens_per_s": round(tuned.tokens_per_second)}
        # the control reads true texts with weights that learned from false ones
        llm_NE = torch.from_numpy(embed_items(encoder.eval(), items))
        save_file({"llm_NE": llm_NE.half()}, arguments.out / f"{name}.safetensors")
        figures[name]["seconds"] = round(time.perf_counter() - began, 1)
        print(f"{name}: {json.dumps(figures[name])}", file=sys.stderr, flush=True)
        del encoder
        torch.cuda.empty_cache()
    return figures


def quietly(metrics: dict[str, float], step: int) -> None:
    """Tells of validations only."""
    if "loss" not in metrics:
        print(step, {name: round(value, 4) for name, value in metrics.items()}, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------------- rank


@dataclass(frozen=True)
class Setting:
    """Histories to train on, test cases among all items and among those the user has not had, and validation cases."""

    events: Histories
    counts_V: Tensor
    among_all: Cases
    among_unseen: Cases
    valid: Cases


def settings(arguments: argparse.Namespace) -> Iterator[tuple[str, Setting]]:
    """The logs as they are, and with a tenth of the items never met in training."""
    whole = load(arguments.data, "cpu")
    item_ids = pq.read_table(arguments.data / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
    for name in arguments.settings:
        share = COLD_SHARE if name == "cold" else 0.0
        events = without_items(whole, held_out(item_ids, share, COLD_SEED)).to(arguments.device)
        options: dict[str, Any] = {"negatives": 100, "paper_tail": 4, "chunk": 4096, "seed": COLD_SEED}
        among_all, among_unseen = (make_cases(events, "test", unseen=unseen, **options) for unseen in (False, True))
        yield name, Setting(events, train_counts(events), among_all, among_unseen, make_cases(events, "valid", **options))


def rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains every model with one seed; keeps OUT/SETTING-SEED.safetensors with ranks, rewritten after each model."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    began, told = time.perf_counter(), dict[str, Any]()
    for setting, parts in settings(arguments):
        file = arguments.out / f"{setting}-{arguments.seed}.safetensors"
        kept: dict[str, Tensor] = load_file(file) if file.exists() else floors(parts)
        for name in arguments.models:
            if setting not in MODELS[name].settings or f"{name}/full" in kept:
                continue
            if time.perf_counter() - began > arguments.limit:
                print(f"{setting}/{name}: left out, {arguments.limit:.0f} s are over", file=sys.stderr, flush=True)
                continue
            try:
                found, told[f"{setting}/{name}"] = trained(arguments, name, parts, kept)
            except Exception as error:  # hours of the other models' training are not lost
                found, told[f"{setting}/{name}"] = {}, {"error": f"{type(error).__name__}: {error}"[:500]}
            kept |= {key: value.detach().float().cpu() for key, value in found.items()}
            save_file(kept, file)
            print(f"{setting}/{name}: {told[f'{setting}/{name}']}", file=sys.stderr, flush=True)
    return {"seed": arguments.seed, "seconds": round(time.perf_counter() - began, 1), **told}


def floors(parts: Setting) -> dict[str, Tensor]:
    """The slices, and the ranks of the floors that only count."""
    kept = {
        "slices": parts.among_all.slices_SC.to(torch.uint8).cpu(),
        "slices_valid": parts.valid.slices_SC.to(torch.uint8).cpu(),
    }
    for name, (full_C, sampled_C) in floor_ranks(parts.among_all).items():
        kept |= {f"{name}/full": full_C.float().cpu(), f"{name}/sampled": sampled_C.float().cpu()}
    return kept


def trained(
    arguments: argparse.Namespace, name: str, parts: Setting, kept: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Ranks of one model's cases, and how it trained. A plain ID-only model's table stays as the teacher of those after it."""
    model, device, events = MODELS[name], arguments.device, parts.events
    backbone = Backbone(name=model.backbone, width=arguments.width, layers=arguments.layers, dropout=arguments.dropout)  # type: ignore[arg-type]
    training = Training(
        epochs=arguments.epochs, patience=arguments.patience, loss=arguments.loss, logit_adjustment=model.adjustment
    )  # fmt: skip
    torch.manual_seed(arguments.seed)
    more: dict[str, Any] = {}
    if model.llm:
        llm_NE = embeddings(arguments, model.llm).to(device)
        white_NK = fit_whitening(llm_NE, WHITENED)(llm_NE)
        items = item_source(model, white_NK, backbone.width)
        if model.items == "llm_esr":
            like_US = like_users(events, items.white_VK, LIKE_USERS)
            more["distiller"] = Distiller(events, like_US, backbone.width, DISTIL)
        else:
            weight_V = parts.counts_V / (parts.counts_V + PRIOR)
            teacher_VD = kept[f"teacher_{model.backbone}"].to(device)
            more["aligner"] = Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=ALPHA, temperature=TEMPERATURE)
    else:
        items = IdItems(events.catalogue + 1, backbone.width)
    recommender = Recommender(items, build_sequence(backbone, model.items))
    began = time.perf_counter()
    done = train(recommender, events, training, max_len=backbone.max_len, seed=arguments.seed, log=lambda *_: None,
                 candidates_M=parts.counts_V.nonzero().flatten(), **more)  # fmt: skip
    recommender.eval()

    def user(emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        user_BD: Tensor = recommender.sequence(emb_BLD, valid_BL)[:, -1]
        return user_BD

    with torch.no_grad():
        table_VD = recommender.item_table().float()
        full_C, sampled_C = vector_ranks(parts.among_all, table_VD, user, backbone.max_len)
        unseen_C, _ = vector_ranks(parts.among_unseen, table_VD, user, backbone.max_len)
        valid_C, _ = vector_ranks(parts.valid, table_VD, user, backbone.max_len)
    found = {f"{name}/full": full_C, f"{name}/sampled": sampled_C, f"{name}/unseen": unseen_C, f"{name}/valid": valid_C}
    if arguments.fuse:
        found |= fused(arguments, parts, name, recommender, backbone.max_len)
    if not model.llm and not model.adjustment:
        found[f"teacher_{model.backbone}"] = table_VD
    told = {"epochs": done.epochs, "best": done.best_epoch, "seconds": round(time.perf_counter() - began, 1),
            "seconds_per_epoch": round(done.seconds_per_epoch, 3), "valid": round(done.ndcg, 4),
            "test": round(float(by_rank(full_C)["ndcg"].mean()), 4)}  # fmt: skip
    return found, told


@torch.no_grad()
def fused(arguments: argparse.Namespace, parts: Setting, name: str, recommender: Recommender, max_len: int) -> dict[str, Tensor]:
    """Ranks of a recommender's scores plus those of whitened text, untrained, both in standard deviations.

    Text weighs what is best on validation cases.
    """
    llm_NE = embeddings(arguments, arguments.fuse).to(arguments.device)
    text_VE = F.pad(F.normalize(fit_whitening(llm_NE, WHITENED)(llm_NE), dim=1), (0, 0, 1, 0))
    table_VD = recommender.item_table().float()
    width = table_VD.shape[1]
    some = slice(0, len(parts.valid.users_C), max(1, len(parts.valid.users_C) // 512))
    item_BL = inputs_before(parts.events, parts.valid.users_C[some], parts.valid.position_C[some], max_len)
    both_VD = torch.cat([table_VD, text_VE], dim=1)

    def users(emb_BLD: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
        learned_BD = recommender.sequence(emb_BLD[..., :width], valid_BL)[:, -1].float()
        return learned_BD, remembered(emb_BLD[:, -RECENT:, width:], valid_BL[:, -RECENT:])

    learned_BD, text_BE = users(F.embedding(item_BL, both_VD), item_BL != 0)
    spread, text_spread = (learned_BD @ table_VD[1:].T).std(), (text_BE @ text_VE[1:].T).std()

    def ranks(cases: Cases, weight: float) -> tuple[Tensor, Tensor]:
        def user(emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
            one_BD, other_BE = users(emb_BLD, valid_BL)
            return torch.cat([one_BD / spread, weight / text_spread * other_BE], dim=1)

        return vector_ranks(cases, both_VD, user, max_len)

    on_valid = {weight: ranks(parts.valid, weight)[0] for weight in TEXT_WEIGHTS}
    weight = max(on_valid, key=lambda weight: float(by_rank(on_valid[weight])["ndcg"].mean()))
    (full_C, sampled_C), (unseen_C, _) = ranks(parts.among_all, weight), ranks(parts.among_unseen, weight)
    fused = f"{name}{FUSED}"
    return {f"{fused}/full": full_C, f"{fused}/sampled": sampled_C, f"{fused}/unseen": unseen_C,
            f"{fused}/valid": on_valid[weight], f"{fused}_weight": torch.tensor([weight])}  # fmt: skip


def embeddings(arguments: argparse.Namespace, name: str) -> Tensor:
    """llm_NE of one encoder; `scft` is that of the seed."""
    file = arguments.encoded / f"{f'scft-{arguments.seed}' if name == 'scft' else name}.safetensors"
    return load_file(file)["llm_NE"].float()


def item_source(model: Model, white_NK: Tensor, width: int) -> Any:
    """Item vectors from whitened text."""
    config = {"kind": model.items, "hidden": model.hidden, "text_width": width // 2, "added": True}
    return build_items(config, width, len(white_NK), white_NK, DROP)


# ------------------------------------------------------------------------------------------------------------- neighbours


def neighbours_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every encoder of the folder, means over the seeds of its name (`scft-42` and `scft-43` are one)."""
    parts = next(parts for _, parts in settings(arguments))
    files = sorted(arguments.encoded.glob("*.safetensors"))
    by_name: dict[str, list[Tensor]] = {}
    for file in files:
        llm_NE = load_file(file)["llm_NE"].float()
        spaces = {"cosine": llm_NE - llm_NE.mean(0), "whitened": fit_whitening(llm_NE, WHITENED)(llm_NE)}
        for space, emb_NE in spaces.items():
            table_VE = F.pad(F.normalize(emb_NE, dim=1), (0, 0, 1, 0))
            rank_C, _ = vector_ranks(parts.among_unseen, table_VE.to(arguments.device), remembered, RECENT)
            by_name.setdefault(f"{file.stem.partition('-')[0]} {space}", []).append(by_rank(rank_C.cpu())["ndcg"])
    names = list(by_name)
    values_CK = torch.stack([torch.stack(by_name[name]).mean(0) for name in names], dim=1)
    slices_SC = parts.among_unseen.slices_SC.cpu()
    found = bootstrap(values_CK, slices_SC, seed=COLD_SEED)

    def told(column: int, minus: int | None) -> dict[str, list[float]]:
        some = {slice_: estimate(found, number, column, minus=minus) for number, slice_ in enumerate(SLICES)}
        return {slice_: [round(x, 4) for x in (e.value, e.low, e.high)] for slice_, e in some.items() if e.n}

    return {
        "encoders": len(files),
        "ndcg_unseen": {name: told(column, None) for column, name in enumerate(names)},
        "less_zero": {
            name: told(column, names.index(zero))
            for column, name in enumerate(names)
            if (zero := f"zero {name.partition(' ')[2]}") in names and name != zero
        },
    }


def remembered(emb_BLE: Tensor, valid_BL: Tensor) -> Tensor:
    """user_BE: the mean of what a user had, each event weighing FADING of the next one."""
    weight_BL = valid_BL * FADING ** torch.arange(valid_BL.shape[1] - 1, -1, -1, device=valid_BL.device)
    return F.normalize((emb_BLE * weight_BL[:, :, None]).sum(1), dim=1)


# ---------------------------------------------------------------------------------------------------------------- compare


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each user's metrics averaged over the seeds, then resampled over the users; models that every seed has."""
    result: dict[str, Any] = {}
    for setting in sorted({file.name.partition("-")[0] for file in arguments.ranks}):
        files = [safe_open(file, framework="pt") for file in arguments.ranks if file.name.startswith(f"{setting}-")]
        shared = set.intersection(*(set(file.keys()) for file in files))
        every = ("popularity", "repeat_markov_popularity", *MODELS, *(f"{name}{FUSED}" for name in MODELS))
        models = [name for name in every if f"{name}/full" in shared]
        slices_SC = files[0].get_tensor("slices").bool()
        columns, values = [], []
        for name in models:
            for kind in ("full", "unseen", "sampled"):
                if f"{name}/{kind}" in shared:
                    by_seed = [by_rank(file.get_tensor(f"{name}/{kind}")) for file in files]
                    for metric in ("hr", "ndcg"):
                        columns.append((name, kind, metric))
                        values.append(torch.stack([found[metric] for found in by_seed]).mean(0))
        found = bootstrap(torch.stack(values, dim=1), slices_SC, seed=COLD_SEED)
        place = {column: number for number, column in enumerate(columns)}
        result[setting] = {
            "seeds": len(files),
            "users": dict(zip(SLICES, found.n_S.tolist(), strict=True)),
            "table": {name: row(found.mean_SK, place, name) for name in models},
            "validation": {name: validated(files, name) for name in models if f"{name}/valid" in shared},
            **{
                title: {
                    f"{one} - {other}": {
                        slice_: interval(found, place, number, one, other, kind) for number, slice_ in enumerate(SLICES)
                    }
                    for one, other in (*PAIRS, *((f"{name}{FUSED}", name) for name in MODELS))
                    if (one, kind, "ndcg") in place and (other, kind, "ndcg") in place
                }
                for title, kind in (("differences", "full"), ("differences_unseen", "unseen"))
            },
        }
    return result


def row(mean_SK: Tensor, place: dict[tuple[str, str, str], int], name: str) -> dict[str, Any]:
    """A model's figures: NDCG@10 by slice over all items and among unseen ones, and overall among 100 sampled ones."""
    found = {slice_: float(mean_SK[number, place[name, "full", "ndcg"]]) for number, slice_ in enumerate(SLICES)}
    ndcg = {slice_: round(value, 4) for slice_, value in found.items() if not math.isnan(value)}
    more: dict[str, Any] = {
        f"{kind}_{metric}": round(float(mean_SK[0, place[name, kind, metric]]), 4)
        for kind in ("full", "unseen", "sampled")
        for metric in ("hr", "ndcg")
        if (name, kind, metric) in place
    }
    if (name, "unseen", "ndcg") in place:
        unseen = {slice_: float(mean_SK[number, place[name, "unseen", "ndcg"]]) for number, slice_ in enumerate(SLICES)}
        more["unseen"] = {slice_: round(value, 4) for slice_, value in unseen.items() if not math.isnan(value)}
    return {**ndcg, **more}


def validated(files: list[Any], name: str) -> dict[str, float]:
    """NDCG@10 on validation cases by slice, mean over the seeds: what settings are chosen by."""
    slices_SC = files[0].get_tensor("slices_valid").bool()
    ndcg_C = torch.stack([by_rank(file.get_tensor(f"{name}/valid"))["ndcg"] for file in files]).mean(0)
    return {slice_: round(float(ndcg_C[own_C].mean()), 4) for slice_, own_C in zip(SLICES, slices_SC, strict=True) if own_C.any()}


def interval(found: Any, place: dict[tuple[str, str, str], int], slice_: int, one: str, other: str, kind: str) -> list[float]:
    """NDCG@10 of one model less another's: value, lower and upper end of its 95 % interval."""
    less = estimate(found, slice_, place[one, kind, "ndcg"], minus=place[other, kind, "ndcg"])
    return [round(value, 4) for value in (less.value, less.low, less.high)]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second, third, fourth = (commands.add_parser(name) for name in ("encode", "rank", "compare", "neighbours"))
    for command in (first, second, fourth):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for command in (first, second):
        command.add_argument("--out", type=Path, required=True)
    fourth.add_argument("--encoded", type=Path, required=True)
    fourth.add_argument("--settings", type=lambda text: text.split(","), default=["cold"], help="all or cold")
    first.add_argument("--base", default="embedded")
    first.add_argument("--domain", default="The beauty product has the following attributes:")
    first.add_argument("--encoders", type=lambda text: text.split(","), help="some alone, such as zero,scft-42,shuffled")
    first.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[42, 43, 44])
    first.add_argument("--steps", type=int, default=300)
    first.add_argument("--batch", type=int, default=512)
    first.add_argument("--ratio", type=float, default=0.4)
    first.add_argument("--temperature", type=float, default=0.05)
    first.add_argument("--learning-rate", type=float, default=2e-4)
    first.add_argument("--pooling", default="mean")
    first.add_argument("--layers", type=int, default=0, help="layers of the base in use, from the bottom; 0 is all")
    first.add_argument("--fp8", action="store_true")
    first.set_defaults(settings=["cold"])
    second.add_argument("--encoded", type=Path, required=True)
    second.add_argument("--seed", type=int, default=42)
    second.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    second.add_argument("--settings", type=lambda text: text.split(","), default=["all", "cold"])
    second.add_argument("--epochs", type=int, default=150)
    second.add_argument("--patience", type=int, default=15)
    second.add_argument("--width", type=int, default=128)
    second.add_argument("--layers", type=int, default=2)
    second.add_argument("--dropout", type=float, default=0.5)
    second.add_argument("--loss", choices=("full", "sampled"), default="full", help="sampled takes a fifth of the time on a CPU")
    second.add_argument(
        "--fuse", default="", help="an encoder, such as zero: also ranks by each model's scores and this text's together"
    )
    second.add_argument("--limit", type=float, default=1e9, help="seconds after which no further model is begun")
    third.add_argument("ranks", type=Path, nargs="+")
    return parser.parse_args()


def main() -> None:
    """Prints one JSON line."""
    arguments = parse()
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
    found = {"encode": encode, "rank": rank, "compare": compare, "neighbours": neighbours_of}[arguments.command](arguments)
    print(json.dumps(found if arguments.command == "compare" else device | found))


if __name__ == "__main__":
    main()
