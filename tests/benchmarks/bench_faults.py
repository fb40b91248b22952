"""Kills `publish`, `rollback`, `collect` and `forget` at random instants, with readers running, and compares with a calm run.

    python tests/benchmarks/bench_faults.py --store sqlite --kills 200
    python tests/benchmarks/bench_faults.py --store redis --kills 200
    python tests/benchmarks/bench_faults.py --store postgres --kills 200
    python tests/benchmarks/bench_faults.py --store sentinel --kills 100
    python tests/benchmarks/bench_faults.py --store standby --kills 100

Every operation runs in a calm lake once, and in another where it is killed (-9) and run again; both must end with equal bytes.
Half of the kills fall at a random time, half just before or after a random step of the writer, so that the one write of the
pointer is hit too. With `sentinel` (Redis) and `standby` (PostgreSQL) not the writer is killed but the store's master, whose data
is lost; a replica takes over, and a third of the writers sleep meanwhile and wake when another one has done their work.

Readers judge what they see over time: the pointer's sequence never falls below what was acknowledged before the read began, nor,
while one master leads, below what was seen; nor does the version of an item in a space. Writers keep a journal: none succeeds at
anything that it began after another one had taken the lease. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import redis
from psycopg import sql

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from bench_publish import redis_server  # beside this file

from feature_repo import stores
from feature_repo.postgres_reads import connect
from feature_repo.reader import Answer, NothingServed, Reader, settings
from feature_repo.stores import open_writer
from jobs import collect, forget, publish, rollback
from jobs.engines import online
from jobs.lake import items, partitions
from jobs.lake.items import content_hash
from jobs.lake.partitions import digest_file
from jobs.lake.tables import ITEMS, item_embeddings
from jobs.run import Run
from tests.feature_repo.postgresql import postgresql
from tests.feature_repo.sentinels import Failover, failover, until
from tests.feature_repo.standbys import SCHEMA, Standbys, standbys

WIDTH, STABLE = 8, 200
FAILURES = ("mixed", "lost", "went_back", "acknowledged_lost", "reader_errors", "double_writers", "unequal", "reruns_failed")
FORK = multiprocessing.get_context("fork")
Masters = Failover | Standbys
AWAY = (redis.ConnectionError, redis.TimeoutError, psycopg.OperationalError)
"""What a client is told while no master answers."""


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


def start(
    work: Callable[[Path], object],
    lake: Path,
    online: str,
    step: tuple[int, bool] | None = None,
    victim: Callable[[], int] = os.getpid,
) -> int:
    """Forks a process that does the work; with a step, it kills itself, or another, before or after the writer's n-th one."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with (lake.parent / "said.log").open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.environ["LLMEMB_ONLINE_STORE"] = online
        if f'"{SCHEMA}"' in online:
            os.environ["LLMEMB_REPLICAS"] = "1"
        keep_journal(lake.parent / f"{lake.name}.jsonl")
        if step is not None:
            fail_at(*step, victim=victim)
        work(lake)
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


STEPS = ("acquire", "write", "delete", "note", "settle", "release")
"""What a writer does to a store."""


def fail_at(number: int, after: bool, victim: Callable[[], int] = os.getpid) -> None:
    """Kills this process, or another one, at the writer's n-th step."""
    steps, struck = 0, False

    def strike() -> None:
        nonlocal struck
        if not struck:
            struck = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim(), signal.SIGKILL)

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == number and not after:
                strike()
            result = method(*arguments, **more)
            if steps >= number and after:
                strike()
            return result

        return call

    for store in (stores.SqliteStore, stores.RedisStore, stores.PostgresStore):
        for name in STEPS:
            setattr(store, name, counted(getattr(store, name)))
    for module in (partitions, items, online):
        module.write_json = counted(module.write_json)  # type: ignore[attr-defined]


def keep_journal(path: Path) -> None:
    """Notes when each act on a store of Redis or PostgreSQL began and ended well, and under which lease."""

    def held(store: Any) -> str:
        return store.nonce if isinstance(store, stores.PostgresStore) else str(store.fenced.lease.decode())

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: Any, *given: Any, **more: Any) -> Any:
            began = time.monotonic_ns()
            result = method(store, *given, **more)
            if mine := held(store):
                line = {"act": name, "lease": mine, "began": began, "ended": time.monotonic_ns()}
                with path.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")
            return result

        return call

    for kind in (stores.RedisStore, stores.PostgresStore):
        for name in ("acquire", "write", "delete", "note", "renew"):
            setattr(kind, name, noted(name, getattr(kind, name)))


def double_writers(path: Path) -> int:
    """Acts that ended well and were begun after another writer had taken the lease."""
    acts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    taken = {act["lease"]: act["ended"] for act in acts if act["act"] == "acquire"}
    order = sorted(taken, key=taken.__getitem__)
    ends = {lease: taken[later] for lease, later in itertools.pairwise(order)}
    return sum(act["began"] > ends[act["lease"]] for act in acts if act["lease"] in ends)


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


class Watcher:
    """What one reader has seen so far."""

    def __init__(self, most: int) -> None:
        self.most, self.sequence, self.epoch = most, 0, 0
        self.versions: dict[tuple[str, str], int] = {}

    def judge(self, answer: Answer, acknowledged: int, before: int, after: int) -> dict[str, int]:
        """What is wrong with an answer, of itself or after those before it; how often the master had changed before and after."""
        pointer, found = answer.pointer, Counter[str]()
        back = pointer.sequence < self.sequence
        for item, row in zip(answer.item_ids, answer.vector_ND, strict=True):
            raw, key = row.tobytes(), (pointer.space_id, item)
            version = next((one for one in range(self.most) if raw == vector(pointer.space_id, item, one)), None)
            if version is None:
                found["mixed"] = 1
            else:
                back |= version < self.versions.get(key, 0)
                self.versions[key] = version
        found["lost"] = bool(answer.missing or answer.deleted)
        found["acknowledged_lost"] = pointer.sequence < acknowledged
        # a master that died may have shown what it had not passed on: nobody was told that it is done
        found["undone" if after != self.epoch else "went_back"] = back
        self.sequence, self.epoch = pointer.sequence, before
        return found


COUNTS = ("reads", "mixed", "lost", "went_back", "acknowledged_lost", "undone", "unavailable", "reader_errors")


def read_on(lake: Path, online: str, stop: Any, counts: Any, most: int, told: Any, changes: Callable[[], int]) -> None:
    """A client: reads without pause and judges every answer. `told`: the sequence that was acknowledged."""
    os.environ["LLMEMB_ONLINE_STORE"] = online
    fails_over = "sentinel" in online or f'"{SCHEMA}"' in online
    reader, chance, watcher = Reader.open(lake), random.Random(os.getpid()), Watcher(most)
    stable = [f"m{number}" for number in range(STABLE)]
    while not stop.is_set():
        time.sleep(0.005)  # leaves the cores to those who are to be killed
        acknowledged, found = told[0], Counter[str]()
        try:
            before = changes()
            answer = reader.vectors(chance.sample(stable, 50))
            found = Counter(watcher.judge(answer, acknowledged, before, changes())) + Counter(reads=1)
        except NothingServed:
            continue
        except AWAY as error:
            found["unavailable" if fails_over else "reader_errors"] = 1  # nobody answers until a replica leads
            if not fails_over:
                print(f"reader: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        except Exception as error:
            print(f"reader: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            found["reader_errors"] = 1
        with counts.get_lock():
            for number, name in enumerate(COUNTS):
                counts[number] += found[name]


# ------------------------------------------------------------------------------------------------------------- comparison


def dump(lake: Path, online: str) -> dict[str, Any]:
    """Every byte that a reader of the store or the lake could see."""
    seen: dict[str, Any] = {}
    for path in sorted(lake.rglob("*")):
        name = path.relative_to(lake).as_posix()
        if path.is_file() and "/." not in f"/{name}" and not name.startswith(("feast/online", "feast/registry")):
            seen[name] = digest_file(path)
    where = json.loads(online)
    os.environ["LLMEMB_ONLINE_STORE"] = online
    if where["type"] == "sqlite":
        # closed by hand: left to the garbage collector it may go through the next fork, and whoever reads there then reads what
        # is old (SQLite takes the parent's locks for its own)
        with contextlib.closing(sqlite3.connect(where["path"])) as connection:
            tables = connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'llmemb%' AND type = 'table'").fetchall()
            for (table,) in tables:
                seen[table] = sorted(connection.execute(f'SELECT entity_key, feature_name, value, event_ts FROM "{table}"'))
    elif where["type"] == "postgres":
        with connect(settings(lake).online_store, 30) as connection:
            tables = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = %s AND NOT tablename ~ '_(lease|notes)$'",
                [where["db_schema"]],
            ).fetchall()
            for (table,) in tables:
                query = sql.SQL("SELECT entity_key, feature_name, value, event_ts FROM {}").format(sql.Identifier(table))
                seen[table] = sorted(connection.execute(query).fetchall())
    else:
        client = open_writer(settings(lake)).plain  # type: ignore[attr-defined]
        for key in client.scan_iter(count=10_000):
            if key not in (b"llmemb:lease", b"llmemb:token", b"llmemb:notes", b"llmemb:settled", b"llmemb:spaces:whole"):
                kind = client.type(key)
                seen[key.hex()] = sorted(client.hgetall(key).items() if kind == b"hash" else client.smembers(key))
    return seen


@contextmanager
def servers(store: str, home: Path, masters: list[Masters] | None = None) -> Iterator[list[str]]:
    """Settings of two online stores, calm and killed; with Redis, two databases of one server, with PostgreSQL two schemas; where
    a replica takes over, a server of its own and those that `masters` then has."""
    if store == "sentinel":
        with redis_server(home) as port, failover(home) as sentinel:
            assert masters is not None
            masters.append(sentinel)
            yield [json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{port},socket_timeout=30"}), sentinel.settings]
        return
    if store == "standby":
        with postgresql() as server, standbys() as moving:
            assert masters is not None
            masters.append(moving)
            yield [server.online("calm"), moving.settings]
        return
    if store == "sqlite":
        yield [json.dumps({"type": "sqlite", "path": str(home / name / "feast" / "online.db")}) for name in ("calm", "killed")]
        return
    if store == "postgres":
        with postgresql() as server:
            yield [server.online(name) for name in ("calm", "killed")]
        return
    with redis_server(home) as port:
        yield [json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{port},socket_timeout=30,db={db}"}) for db in (0, 1)]


def main() -> int:
    """Runs the night shift until enough processes were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "redis", "sentinel", "postgres", "standby"), default="sqlite")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=0.0, help="ends after so long, with fewer kills; 0 does not")
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    masters: list[Masters] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name, servers(arguments.store, Path(name), masters) as online:
        result = shift(arguments, Path(name), online, masters)
    print(json.dumps(result, sort_keys=True))
    return int(any(result[name] for name in FAILURES))


@dataclass
class Tally:
    """What was done and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    slept: int = 0
    repeated: int = 0
    unequal: int = 0
    failed: int = 0
    rounds: int = 0


def shift(arguments: argparse.Namespace, home: Path, online: list[str], masters: Sequence[Masters] = ()) -> dict[str, Any]:
    """The figures of one run."""
    os.environ["LLMEMB_LEASE_MS"] = "1500"
    chance, world, tally = random.Random(arguments.seed), World(), Tally()
    lakes = [home / "calm", home / "killed"]
    # loads Feast before the forks: it takes longer than most of their work, and kills would fall into it
    settings(lakes[0])
    importlib.import_module("feast.infra.passthrough_provider")
    stop, counts, told = FORK.Event(), FORK.Array("q", len(COUNTS)), FORK.Array("q", 1)
    changes: Callable[[], int] = masters[0].changes if masters else int
    readers: list[Any] = []
    began = time.monotonic()
    for kind, work in operations(world, chance, lakes):
        if tally.kills.total() >= arguments.kills or 0 < arguments.minutes * 60 < time.monotonic() - began:
            break
        tally.rounds += 1
        started = time.monotonic()
        tally.failed += ended(start(work, lakes[0], online[0])) != 0
        usual = time.monotonic() - started
        if masters:
            lead_away(kind, work, lakes[1], masters[0], chance, usual, tally)
        else:
            while killed(work, lakes[1], online[1], chance, usual):
                tally.kills[kind] += 1
                if chance.random() < 0.7:
                    break
        tally.failed += not repeated(work, lakes[1], online[1], tally, masters)
        os.environ["LLMEMB_ONLINE_STORE"] = online[1]
        witness = FORK.Process(target=acknowledge, args=(lakes[1], online[1], told))
        witness.start()
        witness.join()
        compare(kind, lakes, online, tally)
        if not readers:
            readers = [
                FORK.Process(target=read_on, args=(lakes[1], online[1], stop, counts, 60, told, changes), daemon=True)
                for _ in range(arguments.readers)
            ]
            for reader in readers:
                reader.start()
        if tally.rounds % 20 == 0:
            print(f"{tally.kills.total()} kills in {tally.rounds} operations", file=sys.stderr, flush=True)
    stop.set()
    for reader in readers:
        reader.join()
    return {
        "store": arguments.store,
        "seed": arguments.seed,
        "kills": tally.kills.total(),
        "by_operation": dict(tally.kills),
        "writers_that_slept": tally.slept,
        "repeated_once_more": tally.repeated,
        "masters": changes(),
        "operations": tally.rounds,
        **dict(zip(COUNTS, counts, strict=True)),
        "double_writers": double_writers(home / "killed.jsonl"),
        "unequal": tally.unequal,
        "reruns_failed": tally.failed,
    }


def repeated(work: Callable[[Path], object], lake: Path, online: str, tally: Tally, masters: Sequence[Masters]) -> bool:
    """Whether the work ends well. On a busy machine a master may be taken for lost, or replicas be late: it is tried again."""
    for number in range(10 if masters else 1):
        for servers in masters:
            servers.mend()
        if ended(start(work, lake, online)) == 0:
            tally.repeated += number
            return True
        print("a rerun failed:", *(lake.parent / "said.log").read_text().splitlines()[-1:], file=sys.stderr, flush=True)
    return False


def acknowledge(lake: Path, online: str, told: Any) -> None:
    """Notes what serves by now, in a process of its own: an SQLite connection must not go through a fork."""
    os.environ["LLMEMB_ONLINE_STORE"] = online
    told[0] = patient(lambda: Reader.open(lake).pointer().sequence)


def patient(read: Callable[[], Any]) -> Any:
    """What a read finds, once a master answers."""
    for _ in range(20):
        with contextlib.suppress(redis.RedisError, psycopg.Error):
            return read()
        time.sleep(0.5)
    return read()


def compare(kind: str, lakes: list[Path], online: list[str], tally: Tally) -> None:
    """Counts an operation after which the two lakes and stores differ in a byte."""
    calm, other = dump(lakes[0], online[0]), patient(lambda: dump(lakes[1], online[1]))
    if calm != other:
        tally.unequal += 1
        different = [name for name in calm.keys() | other.keys() if calm.get(name) != other.get(name)]
        print(f"{kind} ended differently: {len(different)} of {len(calm)}, {different[:3]}", file=sys.stderr, flush=True)
        print(f"first: {calm.get(different[0])} and {other.get(different[0])}", file=sys.stderr, flush=True)


def lead_away(
    kind: str,
    work: Callable[[Path], object],
    lake: Path,
    masters: Masters,
    chance: random.Random,
    usual: float,
    tally: Tally,
) -> None:
    """Runs the work while the store's master is killed; a third of the writers sleep until another one has done the work."""
    masters.mend()
    master, sleeps = masters.running[masters.master], chance.random() < 1 / 3
    step = (chance.randint(1, 16), chance.random() < 0.5) if not sleeps and chance.random() < 0.5 else None
    child = start(work, lake, masters.settings, step, victim=lambda: master.pid)
    if step is None:
        time.sleep(chance.uniform(0, usual))
        if sleeps:
            os.kill(child, signal.SIGSTOP)
        master.kill()
    elif master.poll() is None:  # the writer kills it, if it comes to that step
        ended(child)
        if master.poll() is None:
            return  # where it ended as busy, it is repeated by the caller, which counts it if it never ends well
        child = 0
    master.wait()
    tally.kills[kind] += 1
    until(lambda: masters.running[masters.master] is not master and masters.leads(masters.master), "another master")
    masters.mend()
    if sleeps:
        tally.slept += ended(start(work, lake, masters.settings)) == 0  # else the sleeper holds a lock of the lake
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)
    if child:
        ended(child)


if __name__ == "__main__":
    sys.exit(main())
