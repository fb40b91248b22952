"""Kills `publish`, `rollback`, `collect` and `forget` at random instants, with readers running, and compares with a calm run.

    python tests/benchmarks/bench_faults.py --store sqlite --kills 200
    python tests/benchmarks/bench_faults.py --store redis --kills 200

Every operation runs in a calm lake once, and in another where it is killed (-9) and run again; both must end with equal bytes.
Half of the kills fall at a random time, half just before or after a random step of the writer, so that the one write of the
pointer is hit too. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_publish import redis_server  # beside this file

from feature_repo import stores
from feature_repo.reader import NothingServed, Reader
from jobs import collect, forget, publish, rollback
from jobs.engines import online
from jobs.lake import items, partitions
from jobs.lake.items import content_hash
from jobs.lake.partitions import digest_file
from jobs.lake.tables import ITEMS, item_embeddings
from jobs.run import Run

WIDTH, STABLE = 8, 200
FAILURES = ("mixed", "lost", "reader_errors", "unequal", "reruns_failed")
FORK = multiprocessing.get_context("fork")


@cache
def vector(space: str, item: str, version: int) -> bytes:
    """An item's vector in a space; another for each version of its text."""
    seed = [*space.encode(), 0, *item.encode(), 0, version]
    return np.random.default_rng(seed).normal(size=WIDTH).astype(np.float32).tobytes()


@dataclass
class World:
    """What the catalogue is, and what should be true online."""

    day: int = 0
    spaces: int = 0
    serving: str = ""
    previous: str = ""
    versions: dict[str, int] = field(default_factory=lambda: {f"m{number}": 0 for number in range(STABLE)})
    passing: list[str] = field(default_factory=list)

    @property
    def ds(self) -> str:
        """Today."""
        return str(np.datetime64("2026-01-01") + self.day)


def snapshot(lake: Path, world: World, space: str) -> None:
    """Writes today's catalogue and its vectors in a space."""
    ids = sorted(world.versions)
    texts = [[{"name": "title", "value": f"{item} {world.versions[item]}"}] for item in ids]
    hashes = [content_hash([("title", text[0]["value"])]) for text in texts]
    rows = {"item_id": ids, "attributes": texts, "content_hash": hashes, "first_seen_ds": [world.ds] * len(ids)}
    partitions.write(lake, ITEMS, f"ds={world.ds}", [pa.table(rows, ITEMS.schema)])
    table = item_embeddings(WIDTH)
    emb = np.frombuffer(b"".join(vector(space, item, world.versions[item]) for item in ids), np.float32)
    columns = {
        "item_id": pa.array(ids),
        "space_id": pa.repeat(space, len(ids)),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(emb), WIDTH),
        "content_hash": pa.array(hashes),
        "group": pa.repeat("head", len(ids)),
    }
    partitions.write(lake, table, f"space={space}/ds={world.ds}", [pa.table(columns)])


def operations(world: World, chance: random.Random, lakes: list[Path]) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """An endless night shift: new spaces, deltas, rollbacks, collections, and items to forget."""

    def put(space: str) -> Callable[[Path], object]:
        ds = world.ds
        for lake in lakes:
            snapshot(lake, world, space)
        more: dict[str, Any] = {"chunk_rows": 64, "approximate": chance.random() < 0.2, "lease_wait_s": 10}
        return lambda lake: publish.run(publish.Config(run=Run(ds=ds, lake=lake), space=space, **more))

    while True:
        kind = "publish" if world.spaces < 3 else chance.choice(("publish", "delta", "delta", "rollback", "collect", "forget"))
        if kind == "publish":
            world.day, world.spaces = world.day + 1, world.spaces + 1
            world.previous, world.serving = world.serving, f"{world.spaces:016x}"
            work = put(world.serving)
        elif kind == "delta":
            world.day += 1
            for item in chance.sample([f"m{number}" for number in range(STABLE)], 20):
                world.versions[item] += 1
            if world.passing and chance.random() < 0.5:
                world.versions.pop(world.passing.pop(0))
            world.passing.append(f"new{world.day}")
            world.versions[world.passing[-1]] = 0
            work = put(world.serving)
        elif kind == "rollback":
            world.serving, world.previous = world.previous, world.serving
            work = rolled(world)
        elif kind == "collect":
            work = collected(world)
        elif world.passing:
            item = world.passing.pop()
            world.versions.pop(item)
            work = forgotten(world, item)
        else:
            continue
        yield kind, work


def rolled(world: World) -> Callable[[Path], object]:
    """Back to the space before, by name."""
    run, space = world.ds, world.serving
    return lambda lake: rollback.run(rollback.Config(run=Run(ds=run, lake=lake), space=space, lease_wait_s=10))


def collected(world: World) -> Callable[[Path], object]:
    """Everything that is not live, at once."""
    ds = world.ds
    return lambda lake: collect.run(collect.Config(run=Run(ds=ds, lake=lake), grace_days=0, lease_wait_s=10))


def forgotten(world: World, item: str) -> Callable[[Path], object]:
    """One item, everywhere."""
    ds = world.ds
    return lambda lake: forget.run(forget.Config(run=Run(ds=ds, lake=lake), item=item, approximate=False, lease_wait_s=10))


# -------------------------------------------------------------------------------------------------------------- processes


def start(work: Callable[[Path], object], lake: Path, online: str, step: tuple[int, bool] | None = None) -> int:
    """Forks a process that does the work; with a step, it kills itself before or after the writer's n-th one."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with Path(os.devnull).open("w") as quiet:
            os.dup2(quiet.fileno(), 1)
            os.dup2(quiet.fileno(), 2) if "FAULTS_LOUD" not in os.environ else None
        os.environ["LLMEMB_ONLINE_STORE"] = online
        if step is not None:
            fail_at(*step)
        work(lake)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def fail_at(number: int, after: bool) -> None:
    """Kills this process at the writer's n-th step."""
    steps = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments, **more)
            if steps >= number and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for store in (stores.SqliteStore, stores.RedisStore):
        for name in ("acquire", "write", "delete", "note", "release"):
            setattr(store, name, counted(getattr(store, name)))
    for module in (partitions, items, online):
        module.write_json = counted(module.write_json)  # type: ignore[attr-defined]


def ended(child: int) -> int:
    """Exit status of a process, 0 when its work was done; negative when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(work: Callable[[Path], object], lake: Path, online: str, chance: random.Random, usual: float) -> bool:
    """Starts the work and kills it; False when it was done before."""
    if chance.random() < 0.5:
        return ended(start(work, lake, online, (chance.randint(1, 16), chance.random() < 0.5))) == -signal.SIGKILL
    child = start(work, lake, online)
    time.sleep(chance.uniform(0, usual))
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def read_on(lake: Path, online: str, stop: Any, counts: Any, most: int) -> None:
    """A client: reads without pause and judges every answer."""
    os.environ["LLMEMB_ONLINE_STORE"] = online
    reader, chance = Reader.open(lake), random.Random(os.getpid())
    stable = [f"m{number}" for number in range(STABLE)]
    while not stop.is_set():
        time.sleep(0.005)  # leaves the cores to those who are to be killed
        asked = chance.sample(stable, 50)
        try:
            answer = reader.vectors(asked)
        except NothingServed:
            continue
        except Exception as error:
            print(f"reader: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            with counts.get_lock():
                counts[3] += 1
            continue
        space, rows = answer.pointer.space_id, [row.tobytes() for row in answer.vector_ND]
        wrong = sum(
            all(raw != vector(space, item, version) for version in range(most))
            for item, raw in zip(answer.item_ids, rows, strict=True)
        )
        with counts.get_lock():
            counts[0] += 1
            counts[1] += wrong > 0
            counts[2] += bool(answer.missing or answer.deleted)


# ------------------------------------------------------------------------------------------------------------- comparison


def dump(lake: Path, online: str) -> dict[str, Any]:
    """Every byte that a reader of the store or the lake could see."""
    seen: dict[str, Any] = {}
    for path in sorted(lake.rglob("*")):
        name = path.relative_to(lake).as_posix()
        if path.is_file() and "/." not in f"/{name}" and not name.startswith(("feast/online", "feast/registry")):
            seen[name] = digest_file(path)
    where = json.loads(online)
    if where["type"] == "sqlite":
        with sqlite3.connect(where["path"]) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'llmemb%' AND type = 'table'").fetchall()
            for (table,) in tables:
                seen[table] = sorted(connection.execute(f'SELECT entity_key, feature_name, value, event_ts FROM "{table}"'))
    else:
        port, db = (int(part) for part in re.findall(r":(\d+),.*db=(\d)", where["connection_string"])[0])
        client = redis.Redis(port=port, db=db)
        for key in client.scan_iter(count=10_000):
            if key not in (b"llmemb:lease", b"llmemb:token", b"llmemb:notes"):
                seen[key.hex()] = sorted(client.hgetall(key).items())  # type: ignore[union-attr]
    return seen


@contextmanager
def servers(store: str, home: Path) -> Iterator[list[str]]:
    """Settings of two online stores, calm and killed; with Redis, two databases of one server."""
    if store == "sqlite":
        yield [json.dumps({"type": "sqlite", "path": str(home / name / "feast" / "online.db")}) for name in ("calm", "killed")]
        return
    with redis_server(home) as port:
        yield [json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{port},socket_timeout=30,db={db}"}) for db in (0, 1)]


def main() -> int:
    """Runs the night shift until enough processes were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "redis"), default="sqlite")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-") as name, servers(arguments.store, Path(name)) as online:
        result = shift(arguments, Path(name), online)
    print(json.dumps(result, sort_keys=True))
    return int(any(result[name] for name in FAILURES))


def shift(arguments: argparse.Namespace, home: Path, online: list[str]) -> dict[str, Any]:
    """The figures of one run."""
    os.environ["LLMEMB_LEASE_MS"] = "1500"
    chance, world = random.Random(arguments.seed), World()
    lakes = [home / "calm", home / "killed"]
    stop, counts = FORK.Event(), FORK.Array("q", 4)
    readers: list[Any] = []
    kills: dict[str, int] = {}
    usual: dict[str, float] = {}
    unequal = failed = rounds = 0
    for kind, work in operations(world, chance, lakes):
        if sum(kills.values()) >= arguments.kills:
            break
        rounds += 1
        started = time.monotonic()
        failed += ended(start(work, lakes[0], online[0])) != 0
        usual[kind] = time.monotonic() - started
        while killed(work, lakes[1], online[1], chance, usual[kind]):
            kills[kind] = kills.get(kind, 0) + 1
            if chance.random() < 0.7:
                break
        failed += ended(start(work, lakes[1], online[1])) != 0
        if (calm := dump(lakes[0], online[0])) != (other := dump(lakes[1], online[1])):
            unequal += 1
            different = [name for name in calm.keys() | other.keys() if calm.get(name) != other.get(name)]
            print(f"{kind} ended differently: {different[:5]}", file=sys.stderr, flush=True)
        if not readers:
            readers = [
                FORK.Process(target=read_on, args=(lakes[1], online[1], stop, counts, 60), daemon=True)
                for _ in range(arguments.readers)
            ]
            for reader in readers:
                reader.start()
        if rounds % 20 == 0:
            print(f"{sum(kills.values())} kills in {rounds} operations", file=sys.stderr, flush=True)
    stop.set()
    for reader in readers:
        reader.join()
    return {
        "store": arguments.store,
        "seed": arguments.seed,
        "kills": sum(kills.values()),
        "by_operation": kills,
        "operations": rounds,
        "reads": counts[0],
        "mixed": counts[1],
        "lost": counts[2],
        "reader_errors": counts[3],
        "unequal": unequal,
        "reruns_failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main())
