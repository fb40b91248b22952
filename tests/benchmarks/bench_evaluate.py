"""Measures ranking on held-out events: full and sampled ranks of a recommender and the floors, metrics, bootstrap.

    python tests/benchmarks/bench_evaluate.py --users 22363 --items 12101
    python tests/benchmarks/bench_evaluate.py --users 1000000 --items 1000000

Histories are random, items by a power law. Prints one JSON line; the second run of each part counts. Needs torch only.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.behaviour.data import Histories, histories, leave_one_out
from models.behaviour.items import IdItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.judge.bootstrap import bootstrap
from models.judge.evaluation import floor_ranks, make_cases, vector_ranks
from models.judge.metrics import by_rank

T = TypeVar("T")


def logs(users: int, items: int, events: int, device: str) -> Histories:
    """`events` events a user on average, five at least."""
    torch.manual_seed(0)
    length_U = 5 + torch.poisson(torch.full((users,), events - 5.0)).long()
    drawn_N = (items * torch.rand(int(length_U.sum())).square()).long().clamp_max(items - 1) + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), length_U.cumsum(0)])
    return leave_one_out(
        histories(offsets=offsets, items=drawn_N, timestamps=drawn_N, train_end=length_U, valid_end=length_U, catalogue=items)
    ).to(device)


def timed(seconds: dict[str, float], name: str, work: Callable[[], T], device: str, repeat: int) -> T:
    """The work's value; its last run's time."""
    for _ in range(repeat):
        started = time.perf_counter()
        value = work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[name] = round(time.perf_counter() - started, 4)
    return value


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("users", 22_363), ("items", 12_101), ("events", 9), ("width", 64), ("max-len", 50), ("repeat", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    events = logs(arguments.users, arguments.items, arguments.events, device)
    backbone = Backbone(width=arguments.width, max_len=arguments.max_len)
    model = Recommender(IdItems(arguments.items + 1, backbone.width), build_sequence(backbone)).to(device).eval()
    table_VD = model.item_table().detach()

    def encode(emb_BLD: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
        user_BD: torch.Tensor = model.sequence(emb_BLD, valid_BL)[:, -1]
        return user_BD

    seconds: dict[str, float] = {}

    def take(name: str, work: Callable[[], T]) -> T:
        return timed(seconds, name, work, device, arguments.repeat)

    cases = take("cases", lambda: make_cases(events, "test", negatives=100, paper_tail=4, chunk=4096, seed=0))
    ranks = {"model": take("model", lambda: vector_ranks(cases, table_VD, encode, backbone.max_len))}
    ranks |= take("floors", lambda: floor_ranks(cases))
    values_CK = torch.stack([value for pair in ranks.values() for rank in pair for value in by_rank(rank).values()], dim=1)
    take("bootstrap", lambda: bootstrap(values_CK, cases.slices_SC))
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(json.dumps({**vars(arguments), "seconds": seconds, "peak_gib": round(memory / 2**30, 2), "device": name}))


if __name__ == "__main__":
    main()
