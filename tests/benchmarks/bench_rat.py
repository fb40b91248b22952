"""Measures pretraining and RAT on interactions in Parquet: quality (leave-one-out, full ranking) and seconds an epoch.

python tests/benchmarks/bench_rat.py --data ../shared/data/amazon_beauty --epochs 200 prints one JSON line. It needs torch,
numpy and pyarrow only. With --llm FILE (npy or safetensors, one row an item in the order of items.parquet) it also trains RAT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.behaviour.data import (
    GROUPS,
    Histories,
    cases,
    histories,
    inputs_before,
    item_groups,
    leave_one_out,
    targets,
    train_counts,
)
from models.behaviour.item_sources import build_items
from models.behaviour.items import IdItems
from models.behaviour.progress import Trained
from models.behaviour.recommender import Backbone, Recommender, build_sequence, score
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import fit_whitening
from models.judge.metrics import full_ranks


def load(data: Path, device: str) -> Histories:
    """Interactions, each user's in time order, split leave-one-out."""
    rows = pq.read_table(data / "interactions.parquet").sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    item_ids = pq.read_table(data / "items.parquet", columns=["item_id"])["item_id"].combine_chunks()
    items = pc.index_in(rows["item_id"], value_set=item_ids).to_numpy() + 1
    known = ~np.isnan(items.astype(float))
    user = rows["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()[known]
    length = np.bincount(user)
    end = length.copy()
    events = histories(
        offsets=np.concatenate([[0], length.cumsum()]), items=items[known], timestamps=rows["timestamp"].to_numpy()[known],
        train_end=end, valid_end=end, catalogue=len(item_ids),
    )  # fmt: skip
    return leave_one_out(events).to(device)


@torch.no_grad()
def test(recommender: Recommender, events: Histories, max_len: int) -> dict[str, float]:
    """Recall@10 and NDCG@10 of the last events, overall and by group of the target.

    `_unseen` ranks without what the user already had, as the anchor's RecTools does (filter_viewed, METHOD §4): on data
    where nobody buys twice this alone lifts every figure.
    """
    users_C, position_C = cases(events, "test")
    group_V = item_groups(train_counts(events))
    table_VD = recommender.item_table()
    longest = int(position_C.max())
    ranks, unseen = [], []
    for users_B, position_B in zip(users_C.split(2048), position_C.split(2048), strict=True):
        user_BD = recommender.encode(inputs_before(events, users_B, position_B, max_len), table_VD)
        scores_BV, target_B = score(user_BD, table_VD), targets(events, users_B, position_B)
        ranks.append(full_ranks(scores_BV, target_B))
        own_B1 = scores_BV.gather(1, target_B[:, None])
        scores_BV.scatter_(1, inputs_before(events, users_B, position_B, longest), -torch.inf)
        scores_BV.scatter_(1, target_B[:, None], own_B1)
        unseen.append(full_ranks(scores_BV, target_B, scores_BV == -torch.inf))
    rank_C, unseen_C = torch.cat(ranks), torch.cat(unseen)
    hit_C = (rank_C <= 10).float()
    gain_C, group_C = hit_C / (rank_C + 1).log2(), group_V[targets(events, users_C, position_C)]
    unseen_hit_C = (unseen_C <= 10).float()
    figures = {
        "recall@10": float(hit_C.mean()),
        "ndcg@10": float(gain_C.mean()),
        "recall@10_unseen": float(unseen_hit_C.mean()),
        "ndcg@10_unseen": float((unseen_hit_C / (unseen_C + 1).log2()).mean()),
    }
    for number, name in enumerate(GROUPS):
        if bool((group_C == number).any()):
            figures |= {f"{name}_ndcg@10": float(gain_C[group_C == number].mean()), f"{name}_n": float((group_C == number).sum())}
    return {name: round(value, 5) for name, value in figures.items()}


def measured(recommender: Recommender, events: Histories, arguments: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Trains and tests one recommender."""
    began = time.perf_counter()

    def log(figures: dict[str, float], epoch: int) -> None:
        if not arguments.quiet:
            print(epoch, {name: round(value, 4) for name, value in figures.items()}, file=sys.stderr, flush=True)

    trained: Trained = train(
        recommender, events, arguments.training, max_len=arguments.max_len, seed=arguments.seed, log=log, **more
    )
    seconds = time.perf_counter() - began
    return {
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "seconds": round(seconds, 2),
        "seconds_per_epoch": round(trained.seconds_per_epoch, 4),
        "valid_ndcg@10": round(trained.ndcg, 5),
        **test(recommender, events, arguments.max_len),
    }


def llm_items(arguments: argparse.Namespace, backbone: Backbone, device: str) -> tuple[torch.nn.Module, float]:
    """Items made of the given LLM embeddings, and the whitening's explained variance."""
    llm_NE = (
        next(iter(load_file(arguments.llm).values()))
        if arguments.llm.suffix == ".safetensors"
        else torch.from_numpy(np.load(arguments.llm))
    ).to(device)
    whitening = fit_whitening(llm_NE, arguments.whiten)
    white_NK = whitening(llm_NE)
    config = {"kind": arguments.adapter, "hidden": arguments.hidden, "text_width": arguments.text_width, "added": True}
    return build_items(config, backbone.width, len(white_NK), white_NK), whitening.explained


def parse() -> argparse.Namespace:
    """The command line; every training value can be set as --set name=value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--llm", type=Path)
    parser.add_argument("--adapter", choices=("mlp", "null_space"), default="mlp")
    parser.add_argument("--alpha", type=float, default=0.01)
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--prior", type=float, default=5.0)
    parser.add_argument("--whiten", type=int, default=1536)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--text-width", type=int, default=32)
    parser.add_argument("--backbone", default="sasrec")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--patience", type=int, default=50)
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a value of models.behaviour.training.Training"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    values: dict[str, Any] = {}
    for pair in arguments.set:
        name, _, text = pair.partition("=")
        kind = type(getattr(Training, name))
        values[name] = text == "true" if kind is bool else kind(text)
    arguments.training = Training(epochs=arguments.epochs, patience=arguments.patience, **values)
    return arguments


def main() -> None:
    """Prints one JSON line."""
    arguments = parse()
    backbone = Backbone(
        name=arguments.backbone, width=arguments.width, layers=arguments.layers, heads=arguments.heads,
        dropout=arguments.dropout, max_len=arguments.max_len,
    )  # fmt: skip
    events = load(arguments.data, arguments.device)
    torch.manual_seed(arguments.seed)
    teacher = Recommender(IdItems(events.catalogue + 1, backbone.width), build_sequence(backbone))
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "id_only": measured(teacher, events, arguments),
    }
    if arguments.llm is not None:
        counts_V = train_counts(events)
        weight_V = counts_V / (counts_V + arguments.prior)
        teacher_VD: Tensor = teacher.item_table().detach().float()
        items, explained = llm_items(arguments, backbone, arguments.device)
        aligner = Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=arguments.alpha, temperature=arguments.temperature)
        student = Recommender(items, build_sequence(backbone))
        candidates_M = counts_V.nonzero().flatten()
        figures["rat"] = {"explained_variance": explained} | measured(
            student, events, arguments, candidates_M=candidates_M, aligner=aligner
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
