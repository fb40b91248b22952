"""What is offline beside the champion, on folders of Parquet: an LLM that re-ranks its lists, and a model that writes codes.

python tests/benchmarks/bench_offline.py generate --data DATA --embeddings zero.safetensors --seeds 42,43,44
    `jobs generate`'s model on codes of the champion's vectors: NDCG@10 beside the champion's, paired over users and seeds
python tests/benchmarks/bench_offline.py rerank --data DATA --embeddings zero.safetensors --users 1000
    `jobs rerank` by the embedded LLM: the champion's order, the plain prompt, soft tokens, shuffled titles, the mix, the oracle

Each makes the champion (`fused`) anew with each seed; its seconds stand apart. Test events are ranked among unseen items, a tenth
of the items held out. Needs torch, numpy, pyarrow and safetensors; `rerank` transformers too. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs import generate, rerank
from jobs.codes.coding import numbered
from jobs.run import Run
from models.behaviour.codes import Codes, fit_books
from models.behaviour.generative import Generative, vocabulary
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.judge.family import CHAMPION
from models.judge.systems import Kit, Settings, System
from models.text.rerank import Distilling
from tests.benchmarks.bench_family import embedded, splits
from tests.benchmarks.bench_fusion import pair

Values = dict[str, Tensor]
"""NDCG@10 of each case, by way."""


def champion(arguments: argparse.Namespace, seed: int) -> tuple[Kit, System]:
    """The split's champion with one seed."""
    ids, events, _, _ = splits(arguments)
    training = Training(loss="full", epochs=arguments.epochs, patience=min(arguments.patience, arguments.epochs))
    settings = Settings(backbone=Backbone(width=arguments.width, layers=2, dropout=arguments.dropout), training=training)
    kit = Kit(events, embedded(arguments), ids, settings, seed=seed, unseen=True)
    return kit, kit.fused(CHAMPION, "main", settings.fusion)


# --------------------------------------------------------------------------------------------------------------- generate


def tokens(kit: Kit, whole: System) -> tuple[Tensor, int]:
    """token_NT of the champion's vectors, and how many words that takes."""
    emb_ND, known = whole.table_VD[1:], Codes()
    code_NK = fit_books(emb_ND, known, seed=kit.seed).encode(emb_ND)
    number_N = numbered(code_NK.int().cpu().numpy(), pa.table({"item_id": pa.array(kit.item_ids, pa.string())}), None)
    return vocabulary(code_NK, torch.from_numpy(number_N).long().to(code_NK.device), known.entries)


def write_items(arguments: argparse.Namespace, seed: int, home: Path) -> tuple[Values, dict[str, Any]]:
    """The writer beside the champion, with one seed."""
    kit, whole = champion(arguments, seed)
    config = generate.Config(
        run=Run(ds="2026-01-01", lake=home, seed=seed),
        training=Generative(steps=arguments.steps or Generative().steps), users=arguments.users,
    )  # fmt: skip
    began = time.perf_counter()
    values, item_CW, writer = generate.beside(config, kit.events, whole.table_VD, whole.encode, whole.max_len, tokens(kit, whole))
    return values, {
        "words": writer.words.num_embeddings - 1, "items_share": round(float((item_CW > 0).double().mean()), 5),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- rerank


def order_again(arguments: argparse.Namespace, seed: int, home: Path) -> tuple[Values, dict[str, Any]]:
    """The LLM's orders of the champion's lists, with one seed."""
    kit, whole = champion(arguments, seed)
    distilling = dataclasses.replace(Distilling(), steps=arguments.steps or Distilling().steps)
    config = rerank.Config(
        run=Run(ds="2026-01-01", lake=home, seed=seed), base=arguments.base, users=arguments.users, distilling=distilling
    )
    began = time.perf_counter()
    titles = pq.read_table(arguments.data / "items.parquet", columns=["item_id", "title"]).to_pydict()
    known_as = {str(item): title or str(item) for item, title in zip(titles["item_id"], titles["title"], strict=True)}
    words = [known_as[item] for item in kit.item_ids]
    values, weight, in_list = rerank.reranked(config, kit.events, whole.table_VD, whole.encode, whole.max_len, words)
    return values, {"mix": weight, "in_list": round(in_list, 4), "seconds": round(time.perf_counter() - began, 1)}


# -------------------------------------------------------------------------------------------------------------------- all


def one_seed(arguments: argparse.Namespace, seed: int) -> tuple[Values, dict[str, Any]]:
    """A process's work."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=f"{seed}: %(message)s")
    torch.set_num_threads(max(1, (torch.get_num_threads() or 1) // arguments.processes))
    work: Callable[..., tuple[Values, dict[str, Any]]] = {"generate": write_items, "rerank": order_again}[arguments.command]
    with tempfile.TemporaryDirectory() as home:
        return work(arguments, seed, Path(home))


def summary(found: list[Values]) -> dict[str, Any]:
    """Means over users and seeds; what each way has more than the champion, with 95 % intervals, both resampled."""
    ndcg = {way: torch.stack([values[way].float() for values in found]) for way in found[0]}
    mine = torch.ones(ndcg["recommender"].shape[1], dtype=torch.bool)
    more = {way: pair(value_SC, ndcg["recommender"], mine) for way, value_SC in ndcg.items() if way != "recommender"}
    return {
        "users": len(mine), "ndcg": {way: round(float(value_SC.mean()), 4) for way, value_SC in ndcg.items()},
        "more than the champion": more,
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("generate", "rerank"):
        one = commands.add_parser(name)
        one.add_argument("--data", type=Path, required=True)
        one.add_argument("--embeddings", type=Path, help="llm_NE of every item; without it the texts are TF-IDF")
        one.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[42])
        one.add_argument("--processes", type=int, default=1, help="seeds at once, each a process")
        one.add_argument("--users", type=int, default=20_000 if name == "generate" else 500, help="users asked, at most")
        one.add_argument("--steps", type=int, default=0, help="training steps; 0 takes the job's own")
        one.add_argument("--base", default="embedded", help="the LLM of `rerank`")
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        one.add_argument("--epochs", type=int, default=150, help="of the champion's trainings, at most")
        one.add_argument("--patience", type=int, default=15)
        one.add_argument("--width", type=int, default=128)
        one.add_argument("--dropout", type=float, default=0.5)
        one.add_argument("--cold-share", type=float, default=0.1)
        one.set_defaults(encoders={}, tfidf_width=512)
    return parser.parse_args()


def main() -> None:
    """Prints one JSON line."""
    arguments, began = parse(), time.perf_counter()
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(one_seed, [arguments] * len(arguments.seeds), arguments.seeds))
    told = {str(seed): more for seed, (_, more) in zip(arguments.seeds, found, strict=True)}
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu"
    known = {"device": device, "torch": torch.__version__, "data": arguments.data.name, "command": arguments.command}
    result = known | summary([values for values, _ in found]) | {"told": told}
    print(json.dumps(result | {"seconds": round(time.perf_counter() - began, 1)}, default=str))


if __name__ == "__main__":
    main()
