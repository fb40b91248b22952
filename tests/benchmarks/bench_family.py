"""The family's bake-off on folders of Parquet: every system and floor on one split, with what each costs; and codes alone.

python tests/benchmarks/bench_family.py bakeoff --data ../shared/data/amazon_beauty --embeddings zero.safetensors \\
    --seeds 42,43,44 --processes 3 --keep bakeoff
    one JSON line: NDCG@10 by slice, the champion's lead over each with 95 % intervals (users and seeds resampled), seconds,
    bytes, and the routing of weak users; `--encoders NAME=FILE` adds other encoders, `--systems` leaves systems out
python tests/benchmarks/bench_family.py codes --data ../shared/data/amazon_beauty --embeddings zero.safetensors
    books at 4 bytes an item beside product quantisation and residual k-means: error, neighbours' recall at 10, seconds
python tests/benchmarks/bench_family.py million
    seconds of coding a million vectors

`--embeddings` holds llm_NE of every item, in the order of items.parquet (`bench_quality.py encode --encoders zero` makes it);
without it the texts are TF-IDF. Needs torch, numpy, pyarrow and safetensors; TF-IDF needs scikit-learn and the controls faiss,
which are left out, and said to be, where they are not installed.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.engines.quantisers import quantised
from models.behaviour.assembly import Fusion
from models.behaviour.code_figures import collisions, error, neighbours_kept, usage
from models.behaviour.codes import Codes, fit_books
from models.behaviour.data import Histories, held_out, without_items
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.judge import bakeoff
from models.judge.evaluation import SLICES, Cases, make_cases
from models.judge.family import CHAMPION, FAMILY
from models.judge.systems import Kit, Settings
from models.judge.text_floor import tfidf_table
from tests.benchmarks.bench_fusion import COLD_SEED, item_ids, tfidf
from tests.benchmarks.bench_rat import load

ROUTES = ("text", "graph", "repeat_markov_popularity")
MILLION, WIDTH = 1_000_000, 448


def embedded(arguments: argparse.Namespace) -> dict[str, Tensor]:
    """llm_NE by the encoder's name, the main one first."""
    # strongest directions first
    main = (
        tfidf(arguments.data)[:, : arguments.tfidf_width].contiguous()
        if arguments.embeddings is None
        else load_file(arguments.embeddings)["llm_NE"]
    )
    found = {"main": main} | {name: load_file(Path(file))["llm_NE"] for name, file in arguments.encoders.items()}
    return {name: llm_NE.float().to(arguments.device) for name, llm_NE in found.items()}


def floor(data: Path) -> Tensor | None:
    """TF-IDF text, untrained; None without scikit-learn."""
    if find_spec("sklearn") is None:
        return None
    import pyarrow.parquet as pq

    rows = pq.read_table(data / "items.parquet").to_pylist()
    fields = [name for name in ("title", "brand", "categories", "price", "year", "genres", "tags") if name in rows[0]]
    said = [
        " ".join(" ".join(map(str, row[f])) if isinstance(row[f], list) else str(row[f] or "") for f in fields) for row in rows
    ]
    return tfidf_table(said)


def splits(arguments: argparse.Namespace) -> tuple[list[str], Histories, Cases, Cases]:
    """Ids, events without the cold items, test and validation cases."""
    ids = item_ids(arguments.data)
    held_V = held_out(ids, arguments.cold_share, COLD_SEED)
    events = without_items(load(arguments.data, "cpu"), held_V).to(arguments.device)
    test, valid = (make_cases(events, part, negatives=1, paper_tail=4, chunk=4096, seed=COLD_SEED, unseen=True)
                   for part in ("test", "valid"))  # fmt: skip
    return ids, events, test, valid


def one_seed(arguments: argparse.Namespace, group: Sequence[str], seed: int) -> None:
    """Some systems with one seed, each kept as soon as it is measured; those kept before are left."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    ids, events, test, valid = splits(arguments)
    training = Training(loss="full", epochs=arguments.epochs, patience=min(arguments.patience, arguments.epochs))
    settings = Settings(
        backbone=Backbone(width=arguments.width, layers=2, dropout=arguments.dropout), training=training, fusion=Fusion(),
        codes=Codes(entries=arguments.entries),
    )  # fmt: skip
    quantise = quantised if find_spec("faiss") is not None else None
    kit = Kit(events, embedded(arguments), ids, settings, seed=seed, unseen=True, quantise=quantise)
    for name in group:
        file = arguments.keep / f"{name}-{seed}.safetensors"
        if not file.exists():
            save(file, bakeoff.held(lambda _: kit, [name], [seed], test, valid, None))


def save(file: Path, found: Mapping[str, bakeoff.Outcome]) -> None:
    """Outcomes of one seed, floors left out."""
    rows = {name: one for name, one in found.items() if one.bytes_per_item}
    parts = {"ndcg": "ndcg_SC", "hr": "hr_SC", "valid": "valid_SC"}
    tensors = {f"{name}/{part}": getattr(one, field)[0] for name, one in rows.items() for part, field in parts.items()}
    told = {name: json.dumps([one.seconds[0], one.bytes_per_item, one.told[0]]) for name, one in rows.items()}
    save_file(tensors, file.with_suffix(".part"), metadata=told)
    file.with_suffix(".part").rename(file)


def kept(arguments: argparse.Namespace) -> dict[str, bakeoff.Outcome]:
    """The outcomes of every seed; a system that lacks a seed is left out, and said to be."""
    found: dict[str, bakeoff.Outcome] = {}
    for name in FAMILY:
        files = [arguments.keep / f"{name}-{seed}.safetensors" for seed in arguments.seeds]
        if not all(file.exists() for file in files):
            print(f"{name}: not made with every seed", file=sys.stderr)
            continue
        for file in files:
            with safe_open(file, "pt") as read:
                for row, told in (read.metadata() or {}).items():
                    one = found.setdefault(row, bakeoff.Outcome())
                    one.ndcg_SC.append(read.get_tensor(f"{row}/ndcg"))
                    one.hr_SC.append(read.get_tensor(f"{row}/hr"))
                    one.valid_SC.append(read.get_tensor(f"{row}/valid"))
                    seconds, one.bytes_per_item, more = json.loads(told)
                    one.seconds.append(seconds)
                    one.told.append(more)
    return found


def run_bakeoff(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole table; groups and seeds go side by side, so seconds are those of a card that they share."""
    began = time.perf_counter()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(one_seed, arguments, group, seed) for seed in arguments.seeds for group in arguments.systems]
        for task in tasks:
            task.result()
    ids, _, test, valid = splits(arguments)
    floor_VD = floor(arguments.data)
    floors = bakeoff.held(lambda _: None, [], arguments.seeds, test, valid,  # type: ignore[arg-type,return-value]
                          None if floor_VD is None else floor_VD.to(arguments.device))  # fmt: skip
    found = floors | kept(arguments)
    values, differences = bakeoff.compare_systems(found, test.slices_SC, arguments.champion)
    models = bakeoff.rows(found, values)
    print("\n".join(bakeoff.table(models, values, differences, arguments.champion)), file=sys.stderr, flush=True)
    return {
        "data": arguments.data.name, "seeds": arguments.seeds, "items": len(ids), "cold_share": arguments.cold_share,
        "embeddings": arguments.embeddings.name if arguments.embeddings else "tfidf", "faiss": find_spec("faiss") is not None,
        "users": dict(zip(SLICES, test.slices_SC.sum(1).tolist(), strict=True)), "models": models, "values": values,
        "differences": differences, "routing": bakeoff.routing(found, test, valid, ROUTES, arguments.champion),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def run_codes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Books and controls on the embeddings as they are."""
    (llm_NE, *_) = embedded(arguments).values()
    told: dict[str, Any] = {"data": arguments.data.name, "items": len(llm_NE), "width": llm_NE.shape[1]}
    known = {"jointly": Codes(entries=arguments.entries), "apart": Codes(entries=arguments.entries, apart=True)}
    for name, config in known.items():
        began = time.perf_counter()
        books = fit_books(llm_NE, config, seed=arguments.seeds[0])
        code_NK = books.encode(llm_NE)
        told[name] = row(llm_NE, books.decode(code_NK), began) | {"collisions": collisions(code_NK)}
        told[name]["dead"] = sum(book["dead"] for book in usage(code_NK, config.entries))
    if find_spec("faiss") is None:
        return told | {"controls": "faiss is not installed here"}
    began = time.perf_counter()
    for name, (read_ND, _) in quantised(llm_NE, 4, arguments.entries).items():
        told[name] = row(llm_NE, read_ND, began)
    return told


def row(emb_ND: Tensor, read_ND: Tensor, began: float) -> dict[str, Any]:
    """What codes tell of vectors."""
    return {"error": round(error(emb_ND, read_ND), 4), "recall_at_10": round(neighbours_kept(emb_ND, read_ND), 4),
            "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip


def run_million(arguments: argparse.Namespace) -> dict[str, Any]:
    """Books of a sample, then a million codes."""
    generator = torch.Generator(arguments.device).manual_seed(0)
    place_PD = torch.randn(1000, WIDTH, device=arguments.device, generator=generator)
    kind_N = torch.arange(arguments.items, device=arguments.device) % 1000
    emb_ND = place_PD[kind_N] + 0.5 * torch.randn(arguments.items, WIDTH, device=arguments.device, generator=generator)
    began = time.perf_counter()
    books = fit_books(emb_ND, Codes(epochs=arguments.epochs), seed=0)
    fitted = time.perf_counter()
    code_NK = books.encode(emb_ND)
    code_NK.sum().item()
    coded = time.perf_counter()
    return {"items": arguments.items, "width": WIDTH, "fit_seconds": round(fitted - began, 2),
            "code_seconds": round(coded - fitted, 2), "error": round(error(emb_ND, books.decode(code_NK)), 4)}  # fmt: skip


def groups(text: str) -> tuple[tuple[str, ...], ...]:
    """Lists with commas, parted by slashes."""
    return tuple(tuple(group.split(",")) for group in text.split("/"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("bakeoff", "codes", "million"):
        one = commands.add_parser(name)
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        one.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[42])
        one.add_argument("--processes", type=int, default=1, help="seeds at once, each a process")
        one.add_argument("--entries", type=int, default=256)
        one.add_argument("--epochs", type=int, default=30 if name == "million" else 150)
        if name == "million":
            one.add_argument("--items", type=int, default=MILLION)
            continue
        one.add_argument("--data", type=Path, required=True)
        one.add_argument("--embeddings", type=Path)
        one.add_argument("--tfidf-width", type=int, default=512)
        one.add_argument("--encoders", type=lambda text: dict(pair.split("=") for pair in text.split(",")), default={})
        one.add_argument(
            "--systems", type=groups, default=(tuple(FAMILY),), help="names with commas; / parts groups of processes"
        )
        one.add_argument(
            "--keep", type=Path, default=Path("bakeoff"), help="outcomes, a file a system and seed; goes on from them"
        )
        one.add_argument("--champion", default=CHAMPION, help="the system that all others stand beside")
        one.add_argument("--cold-share", type=float, default=0.1)
        one.add_argument("--patience", type=int, default=15)
        one.add_argument("--width", type=int, default=128)
        one.add_argument("--dropout", type=float, default=0.5)
    return parser.parse_args()


def main() -> None:
    """Prints one JSON line."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    arguments = parse()
    told = {"bakeoff": run_bakeoff, "codes": run_codes, "million": run_million}[arguments.command](arguments)
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
    print(json.dumps({"device": device, "torch": torch.__version__, **told}))


if __name__ == "__main__":
    main()
