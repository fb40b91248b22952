"""A reader's lookup of 200 items against a bare `get_online_features` for the same ids, on the same store in one run.

    python tests/benchmarks/bench_lookup.py --store sqlite
    python tests/benchmarks/bench_lookup.py --store redis
    python tests/benchmarks/bench_lookup.py --store postgres --beside redis --asked 50 --codec float16

Both warm, taking turns, so that a busy machine slows both. The reader also resolves the pointer. With `--beside` the other one is
a reader of another store, with the same items. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench_publish import online_store  # beside this file

from feature_repo import feature_definitions, spaces
from feature_repo.reader import Reader, Space, open_store, settings
from feature_repo.stores import lease, open_writer

BLOCK = 4_096


def fill(lake: Path, space: Space) -> list[str]:
    """Publishes a catalogue of random vectors; its ids."""
    ids = [f"B{number:09d}" for number in range(space.items)]
    emb_ND = np.random.default_rng(0).standard_normal((space.items, space.width), dtype=np.float32)
    parts = [(ids[start : start + BLOCK], emb_ND[start : start + BLOCK]) for start in range(0, space.items, BLOCK)]
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    with lease(store, "bench"):
        spaces.stage(store, reader, space, parts, only_changes=False)
        spaces.flip(store, reader, space)
    return ids


def main() -> None:
    """Measures both, taking turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "redis", "postgres"), default="sqlite")
    parser.add_argument("--beside", choices=("sqlite", "redis", "postgres"), default=None)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--asked", type=int, default=200)
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--codec", choices=("float32", "float16"), default="float32")
    arguments = parser.parse_args()
    if arguments.beside:
        print(json.dumps(compare(arguments), sort_keys=True))
        return
    with tempfile.TemporaryDirectory(prefix="lookup-") as name, online_store(arguments.store, Path(name)):
        lake = Path(name)
        open_store(lake).apply(list(feature_definitions.define(str(lake / "offline"))))
        print(json.dumps(measure(arguments, lake), sort_keys=True))


def space_of(arguments: argparse.Namespace) -> Space:
    """The space that is looked into."""
    return Space(
        space_id="a" * 16,
        recommender_id="",
        ds="2026-01-01",
        width=arguments.width,
        codec=arguments.codec,
        items=arguments.items,
    )


def figures_of(seconds: list[float]) -> dict[str, float]:
    """Middle and tail, in milliseconds."""
    return {f"p{share}_ms": round(float(np.percentile(seconds, share)) * 1000, 3) for share in (50, 99)}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Readers of two stores, taking turns."""
    kinds, readers, ids = (arguments.store, arguments.beside), {}, []
    with tempfile.TemporaryDirectory(prefix="lookup-") as name, contextlib.ExitStack() as stack:
        for kind in kinds:
            lake = Path(name) / kind
            lake.mkdir()
            stack.enter_context(online_store(kind, lake))
            open_store(lake).apply(list(feature_definitions.define(str(lake / "offline"))))
            ids = fill(lake, space_of(arguments))
            readers[kind] = Reader.open(lake)
        generator, seconds = np.random.default_rng(1), {kind: list[float]() for kind in kinds}
        for turn in range(arguments.turns + 20):
            asked = [ids[row] for row in generator.choice(len(ids), arguments.asked, replace=False)]
            for kind in kinds:
                started = time.perf_counter()
                answer = readers[kind].vectors(asked)
                if turn >= 20:  # warm
                    seconds[kind].append(time.perf_counter() - started)
                assert answer.item_ids == asked
    figures = {kind: figures_of(seconds[kind]) for kind in kinds}
    ratios = {f"ratio_{key[:-3]}": round(figures[kinds[0]][key] / figures[kinds[1]][key], 3) for key in ("p50_ms", "p99_ms")}
    known = {"store": kinds[0], "beside": kinds[1], "items": arguments.items, "width": arguments.width, "asked": arguments.asked}
    return {**known, "codec": arguments.codec, "turns": arguments.turns, **figures, **ratios}


def measure(arguments: argparse.Namespace, lake: Path) -> dict[str, Any]:
    """The figures of one run."""
    space = space_of(arguments)
    ids = fill(lake, space)
    reader, store, generator = Reader.open(lake), open_store(lake), np.random.default_rng(1)
    feature = "item_embedding:vector" if arguments.codec == "float32" else "item_embedding:vector_f16"
    ours, bare, ended = [], [], []
    for turn in range(arguments.turns + 20):
        asked = [ids[row] for row in generator.choice(len(ids), arguments.asked, replace=False)]
        started = time.perf_counter()
        answer = reader.vectors(asked)
        between = time.perf_counter()
        rows = store.get_online_features(
            features=[feature], entity_rows=[{"item_id": i, "space_id": space.space_id} for i in asked]
        )
        after = time.perf_counter()
        rows.to_dict()
        if turn >= 20:  # warm
            ours.append(between - started)
            bare.append(after - between)
            ended.append(time.perf_counter() - between)
        assert answer.item_ids == asked
    figures = {name: figures_of(seconds) for name, seconds in (("reader", ours), ("bare", bare), ("bare_to_dict", ended))}
    ratios = {f"ratio_{key[:-3]}": round(figures["reader"][key] / figures["bare"][key], 3) for key in ("p50_ms", "p99_ms")}
    known = {"store": arguments.store, "items": arguments.items, "width": arguments.width, "asked": arguments.asked}
    return {**known, "codec": arguments.codec, "turns": arguments.turns, **figures, **ratios}


if __name__ == "__main__":
    main()
