"""The serving process under an open-loop load: latencies, flips, start and memory, recall; Feast's feature server beside it.

    python tests/benchmarks/bench_serving.py                                   100,000 x 128 in Redis
    python tests/benchmarks/bench_serving.py --width 384 --graph-from 0 --build 80 --links 16     a graph in place of codes
    python tests/benchmarks/bench_serving.py --only start --items 1000000      start to ready, memory, recall by breadth
    python tests/benchmarks/bench_serving.py --only cpu --seconds 5            CPU time of a request, also on a busy machine
    python tests/benchmarks/bench_serving.py --only flips                      100 flips under load
    python tests/benchmarks/bench_serving.py --only faults                     store slow, hanging, flushed, killed under load
    python tests/benchmarks/bench_serving.py --only peers                      /similar beside other stores: see serving_peers.py

Requests are sent at moments fixed beforehand (a Poisson process), whether answers came or not, and a latency counts from that
moment: a service that stalls can't hide it (no coordinated omission). All on 127.0.0.1; the load runs in this process, the
service, Redis and Feast's server in theirs. Prints one JSON line a figure; `load_1m` says how busy the machine was.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "infra"))

import serving_faults  # beside this file
import serving_peers
from bench_publish import online_store
from serve import ask, free_port, serving  # in infra/

from feature_repo import index, spaces
from feature_repo.reader import Reader, Space, settings
from feature_repo.serving.settings import Settings
from feature_repo.stores import lease, open_writer
from tests.feature_repo.serving.world import apply, build_index, keep_recommender

ROOT = Path(__file__).resolve().parents[2]
USERS, STAGED, LENGTH = 500, 5_000, 50
Matrix = np.ndarray[Any, np.dtype[np.float32]]


def vectors(seed: int, items: int, width: int) -> Matrix:
    """Vectors in clusters, of uneven lengths, as those of a catalogue are."""
    draw = np.random.default_rng(seed)
    centre_CD = draw.standard_normal((200, width), np.float32)
    emb_ND = draw.standard_normal((items, width), np.float32) + 0.6 * centre_CD[draw.integers(0, 200, items)]
    return (emb_ND * draw.lognormal(sigma=0.4, size=(items, 1)) / width**0.5).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------------- load


class Line:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """(status, answer)."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        told = await self.reader.readuntil(b"\r\n\r\n")
        length = int(told.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        return int(told[9:12]), await self.reader.readexactly(length)


async def open_loop(
    port: int, path: str, bodies: Sequence[bytes], rate: float, seconds: float, keep: list[Any]
) -> dict[str, Any]:
    """Sends at fixed moments; percentiles from those moments. How late the generator itself was is told beside them."""
    gc.collect()
    gc.freeze()  # a pause of the generator's own garbage collector is no latency of the service
    draw = np.random.default_rng(7)
    due = np.cumsum(draw.exponential(1 / rate, int(rate * seconds)))
    free: list[Line] = []
    latencies: list[float] = []
    late: list[float] = []
    statuses: dict[int, int] = {}
    begun = time.perf_counter() + 0.2

    async def one(at: float, number: int) -> None:
        late.append(time.perf_counter() - begun - at)
        line = free.pop() if free else Line(port)
        status, answer = await line.post(path, bodies[number % len(bodies)])
        latencies.append(time.perf_counter() - begun - at)
        statuses[status] = statuses.get(status, 0) + 1
        free.append(line)
        keep.append(answer)

    tasks = []
    for number, at in enumerate(due):
        while time.perf_counter() < begun + at:
            # never asleep: a sleep ends milliseconds late, which would count as the service's. So the generator takes a core
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(one(float(at), number)))
    await asyncio.gather(*tasks)
    shares = {f"p{p}_ms": round(float(np.percentile(latencies, p)) * 1000, 2) for p in (50, 90, 99)}
    return {
        "path": path,
        "rate": rate,
        "requests": len(due),
        **shares,
        "late_p99_ms": round(float(np.percentile(late, 99)) * 1000, 2),
        "max_ms": round(max(latencies) * 1000, 1),
        "statuses": statuses,
    }


async def closed_loop(port: int, paths: Sequence[tuple[str, Sequence[bytes]]], clients: int, seconds: float) -> float:
    """Rounds a second of some clients, each asking all paths one after the other."""
    end, rounds = time.perf_counter() + seconds, 0

    async def client(number: int) -> None:
        nonlocal rounds
        line = Line(port)
        while time.perf_counter() < end:
            for path, bodies in paths:
                status, _ = await line.post(path, bodies[number % len(bodies)])
                assert status == 200, (path, status)
            rounds += 1
            number += 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return rounds / seconds


# ------------------------------------------------------------------------------------------------------------------ world


def publish(lake: Path, seed: int, arguments: argparse.Namespace, ids: list[str]) -> tuple[Space, Matrix]:
    """A space with its index and recommender; the online store holds the items that histories name."""
    emb_ND = vectors(seed, arguments.items, arguments.width)
    known = {"recommender_id": keep_recommender(lake, seed, arguments.width, LENGTH), "ds": "2026-01-01", "codec": "float32"}
    space = Space(space_id=f"{seed:016d}", width=arguments.width, items=len(ids), **known)
    sizes = {"neighbours": arguments.links, "breadth_build": arguments.build, "from_items": arguments.graph_from}
    graph = index.Graph(threads=2, **sizes)
    started = time.perf_counter()
    space = dataclasses.replace(space, index=build_index(lake, space, ids, emb_ND, graph, rows=65_536))
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    with lease(store, "bench"):
        spaces.stage(store, reader, space, [(ids[:STAGED], emb_ND[:STAGED])], only_changes=False)
        spaces.flip(store, reader, space)
    tell("index", seed=seed, build_s=round(time.perf_counter() - started, 1), bytes_an_item=size(lake, space) // len(ids))
    return space, emb_ND


def size(lake: Path, space: Space) -> int:
    """Bytes of an index on disk."""
    home = lake / "indexes" / f"space={space.space_id}" / f"ds={space.ds}"
    return sum(path.stat().st_size for path in home.rglob("*") if path.is_file())


def push(lake: Path, ids: list[str]) -> list[list[str]]:
    """Histories of 50 of some users, pushed as an SRS does."""
    import pandas as pd

    from feature_repo.reader import open_store

    draw = np.random.default_rng(3)
    histories = [[ids[row] for row in draw.choice(STAGED, LENGTH, replace=False)] for _ in range(USERS)]
    rows = {"user_id": [f"u{n}" for n in range(USERS)], "item_ids": histories, "timestamps": [list(range(LENGTH))] * USERS}
    open_store(lake).push("user_history_push", pd.DataFrame(rows | {"event_timestamp": pd.Timestamp.now("UTC")}))
    return histories


def tell(figure: str, **values: Any) -> None:
    """One figure."""
    print(json.dumps({"figure": figure, **values, "load_1m": round(os.getloadavg()[0], 1)}, sort_keys=False), flush=True)


def encoded(bodies: Sequence[dict[str, Any]]) -> list[bytes]:
    """Bodies of requests."""
    return [json.dumps(body).encode() for body in bodies]


# ---------------------------------------------------------------------------------------------------------------- figures


def loads(url: str, process: subprocess.Popen[bytes], arguments: argparse.Namespace, ids: list[str]) -> None:
    """Latencies at each rate, and the share of a core that the service took."""
    port = int(url.rsplit(":", 1)[1])
    users = encoded([{"user_id": f"u{n}", "k": 10} for n in range(USERS)])
    near = encoded([{"item_ids": [ids[n]], "k": 10} for n in range(USERS)])
    asyncio.run(open_loop(port, "/recommend", users, 50, 3, []))
    for path, bodies in (("/recommend", users), ("/similar", near)):
        for rate in arguments.rates:
            before, started = cpu_s(process), time.perf_counter()
            found = asyncio.run(open_loop(port, path, bodies, rate, arguments.seconds, []))
            cores = (cpu_s(process) - before) / (time.perf_counter() - started)
            tell("open loop", **found, service_cores=round(cores, 2))


def cpu(url: str, process: subprocess.Popen[bytes], arguments: argparse.Namespace, ids: list[str], told: list[list[str]]) -> None:
    """CPU ms of the service a request, of all its threads and of the event loop's: one client, eight, and at the first rate."""
    port, watched, seconds, rate = int(url.rsplit(":", 1)[1]), psutil.Process(process.pid), arguments.seconds, arguments.rates[0]
    asked = {
        "recommend_history": ("/recommend", encoded([{"history": history, "k": 10} for history in told])),
        "recommend_user": ("/recommend", encoded([{"user_id": f"u{n}", "k": 10} for n in range(USERS)])),
        "similar": ("/similar", encoded([{"item_ids": [ids[n]], "k": 10} for n in range(USERS)])),
        "vectors": ("/vectors", encoded([{"item_ids": history} for history in told])),
    }

    def now() -> Matrix:
        loop = next(thread for thread in watched.threads() if thread.id == process.pid)
        return np.array([sum(watched.cpu_times()[:2]), loop.user_time + loop.system_time])

    def spent(work: Callable[[], float]) -> list[float]:
        before, requests = now(), work()
        return [round(float(ms), 2) for ms in 1000 * (now() - before) / requests]

    figures = {}
    for name, (path, bodies) in asked.items():
        ways: dict[str, Callable[[], float]] = {
            "one_client": lambda: seconds * asyncio.run(closed_loop(port, [(path, bodies)], 1, seconds)),  # noqa: B023
            "eight": lambda: seconds * asyncio.run(closed_loop(port, [(path, bodies)], 8, seconds)),  # noqa: B023
            "at_rate": lambda: asyncio.run(open_loop(port, path, bodies, rate, seconds, []))["requests"],  # noqa: B023
        }
        figures[name] = {way: spent(work) for way, work in ways.items()}
    tell("cpu ms a request: [all threads, event loop]", rate=rate, **figures)


def flips(url: str, lake: Path, arguments: argparse.Namespace, tables: dict[str, Matrix], ids: list[str]) -> None:
    """Rollback again and again under load: latencies with and without, errors, and answers whose scores are of no one space."""
    port, row = int(url.rsplit(":", 1)[1]), {item_id: number for number, item_id in enumerate(ids)}
    bodies = encoded([{"item_ids": [ids[n]], "k": 10} for n in range(USERS)])
    quiet = asyncio.run(open_loop(port, "/similar", bodies, 100, arguments.seconds, []))
    store, reader, over, done = open_writer(settings(lake)), Reader.open(lake), threading.Event(), [0]

    def flip_on() -> None:
        with lease(store, "bench", 10):
            while not over.is_set() and done[0] < arguments.flips:
                sequence = spaces.rollback(store, reader).sequence
                while not over.is_set() and served(url) != sequence:
                    time.sleep(0.1)
                done[0] += 1

    flipping = threading.Thread(target=flip_on)
    flipping.start()
    answers: list[bytes] = []
    found, runs = {}, []
    while flipping.is_alive() and len(runs) < 40:
        found = asyncio.run(open_loop(port, "/similar", bodies, 100, arguments.seconds, answers))
        runs.append(found)
    over.set()
    flipping.join()
    mixed, seen = 0, set()
    for text in answers:
        answer = json.loads(text)
        seen.add(answer["sequence"])
        table = tables[answer["space_id"]]
        for item_id, near in answer["neighbours"].items():
            score_K = table[[row[item["item_id"]] for item in near]] @ table[row[item_id]]
            mixed += not np.allclose(score_K, [item["score"] for item in near], atol=1e-3)
    statuses = {status: sum(run["statuses"].get(status, 0) for run in runs) for run in runs for status in run["statuses"]}
    p99 = [run["p99_ms"] for run in runs]
    tell("flips", flips=done[0], sequences_seen=len(seen), answers=len(answers), statuses=statuses, mixed=mixed,
         p99_quiet_ms=quiet["p99_ms"], p99_flipping_ms=float(np.median(p99)), p99_flipping_worst_ms=max(p99))  # fmt: skip


def served(url: str) -> int:
    """The pointer that serves."""
    import urllib.request

    with urllib.request.urlopen(f"{url}/readyz", timeout=10) as response:
        return int(json.load(response)["sequence"])


def beside_feast(url: str, lake: Path, space: Space, histories: list[list[str]]) -> None:
    """Requests a second of both servers for the same work, four clients each, taking turns so that a busy machine slows both."""
    port = free_port()
    program = (
        "import sys, uvicorn; from pathlib import Path; from feast.feature_server import get_app; "
        "from feature_repo.reader import open_store; "
        f"uvicorn.run(get_app(open_store(Path({str(lake)!r}))), host='127.0.0.1', port={port}, log_level='critical')"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as server:
        try:
            wait_port(port)
            users = [{"features": ["user_history:item_ids"], "entities": {"user_id": [f"u{n}"]}} for n in range(USERS)]
            items = [
                {"features": ["item_embedding:vector"], "entities": {"item_id": h, "space_id": [space.space_id] * LENGTH}}
                for h in histories
            ]
            feast = [("/get-online-features", encoded(users)), ("/get-online-features", encoded(items))]
            mine = int(url.rsplit(":", 1)[1])
            recommend = [("/recommend", encoded([{"user_id": f"u{n}"} for n in range(USERS)]))]
            fifty = [("/vectors", encoded([{"item_ids": h} for h in histories]))]
            rounds: dict[str, list[float]] = {"feast_vectors": [], "ours_vectors": [], "feast_user": [], "ours_recommend": []}
            for _ in range(3):
                for name, where, paths in (
                    ("feast_vectors", port, feast[1:]), ("ours_vectors", mine, fifty),
                    ("feast_user", port, feast), ("ours_recommend", mine, recommend),
                ):  # fmt: skip
                    rounds[name].append(round(asyncio.run(closed_loop(where, paths, 4, 2.0)), 1))
            tell("beside feast", **{name: sorted(values)[1] for name, values in rounds.items()},
                 ratio_vectors=round(sorted(rounds["ours_vectors"])[1] / sorted(rounds["feast_vectors"])[1], 1),
                 ratio_user=round(sorted(rounds["ours_recommend"])[1] / sorted(rounds["feast_user"])[1], 1))  # fmt: skip
        finally:
            server.terminate()


def wait_port(port: int) -> None:
    """Until a server listens."""
    import socket

    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("Feast's server did not start")


def faults(lake: Path, arguments: argparse.Namespace, histories: list[list[str]]) -> None:
    """A service of its own, behind a proxy that breaks the way to the store."""
    import redis

    from tests.feature_repo.serving.proxy import between

    online = json.loads(os.environ["LLMEMB_ONLINE_STORE"])
    store = int(online["connection_string"].split(":")[1])
    ids = [f"B{number:09d}" for number in range(arguments.items)]

    def push_again() -> None:
        os.environ["LLMEMB_ONLINE_STORE"] = json.dumps(online)
        push(lake, ids)

    with between(store) as proxy:
        os.environ["LLMEMB_ONLINE_STORE"] = json.dumps({**online, "connection_string": f"127.0.0.1:{proxy.port}"})
        with serving(lake, WORKERS=str(arguments.workers), POLL_S="0.2") as (url, _):
            answers = serving_faults.Answers(lambda path, **body: ask(url, path, **body), histories)
            load = serving_faults.under_load(open_loop, int(url.rsplit(":", 1)[1]), arguments.rates[0], arguments.seconds)
            serving_faults.faults(load, answers, proxy, redis.Redis(port=store), push_again, tell)


def peers(url: str, lake: Path, ids: list[str], emb_ND: Matrix) -> None:
    """One client's latency of /similar, over HTTP, and of each peer that is here."""
    import redis

    rows = np.random.default_rng(11).choice(len(ids), 500, replace=False).tolist()
    line = http.client.HTTPConnection(url.removeprefix("http://"))

    def ours(row: int) -> list[str]:
        body = json.dumps({"item_ids": [ids[row]], "k": serving_peers.K - 1})
        line.request("POST", "/similar", body, {"Content-Type": "application/json"})
        return [item["item_id"] for item in json.load(line.getresponse())["neighbours"][ids[row]]]

    tell("similar", store="ours, over HTTP", **serving_peers.timed(ours, rows, ids, emb_ND))
    port = int(json.loads(os.environ["LLMEMB_ONLINE_STORE"])["connection_string"].split(":")[1])
    for name, query, built_s in serving_peers.peers(redis.Redis(port=port), lake, ids, emb_ND):
        tell("similar", store=name, build_s=round(built_s, 1), **serving_peers.timed(query, rows, ids, emb_ND))


def recalls(lake: Path, space: Space) -> None:
    """Of the graph, vectors near those of items as queries, at the breadth of the serving process and at others."""
    built = index.Index(lake / "indexes" / f"space={space.space_id}" / f"ds={space.ds}" / space.index[:16])
    draw = np.random.default_rng(5)
    rows = draw.choice(len(built), 300, replace=False)
    query_QD = np.asarray(built.vector_ND[rows]) + 0.3 * draw.standard_normal((300, space.width), np.float32) / space.width**0.5
    exact = {count: built.exact(query_QD.astype(np.float32), count)[0] for count in (10, 100)}
    for breadth in (100, 200, Settings().breadth, 300, 400, 800):
        values = {}
        for count, exact_QK in exact.items():
            found_QK, _ = built.approximate(query_QD, count, breadth)
            hits = [np.isin(wanted, found).mean() for wanted, found in zip(exact_QK, found_QK, strict=True)]
            values[f"recall_at_{count}"] = round(float(np.mean(hits)), 4)
        started = time.perf_counter()
        for at in range(300):
            built.approximate(query_QD[at : at + 1], 10, breadth)
        tell("recall", items=len(built), breadth=breadth, **values, search_ms=round((time.perf_counter() - started) / 0.3, 2))


def memory(process: subprocess.Popen[bytes], lake: Path, items: int, seconds: float) -> None:
    """Start to ready, and what stays in memory, of all workers: `uss` is their own; mapped pages, which they share, are in `pss`
    once, in `rss` for each. One worker's resident bytes an item: of the mapped files, and of the codes, which are its own."""
    held = [one.memory_full_info() for one in family(process)]
    totals = {f"{kind}_mb": sum(getattr(one, kind) for one in held) >> 20 for kind in ("uss", "rss", "pss")}
    mapped = max(sum(one.rss for one in each.memory_maps() if "/indexes/" in one.path) for each in family(process))
    codes = next((lake / "indexes").glob("space=*/ds=*/*/graph.faiss")).stat().st_size
    tell("start", ready_s=round(seconds, 2), items=items, **totals, mapped_bytes_an_item=mapped // items,
         codes_bytes_an_item=codes // items)  # fmt: skip


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The service's process and its workers."""
    first = psutil.Process(process.pid)
    return [first, *first.children(recursive=True)]


def cpu_s(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of the service so far."""
    return sum(sum(one.cpu_times()[:2]) for one in family(process))


def main() -> None:
    """All figures, or one kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--graph-from", type=int, default=index.Graph().from_items, help="items from which a graph is built")
    parser.add_argument("--links", type=int, default=32)
    parser.add_argument("--build", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[100, 300])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", choices=("start", "cpu", "load", "flips", "feast", "recall", "faults", "peers"))
    arguments = parser.parse_args()

    def wanted(name: str) -> bool:
        return arguments.only in (None, name)

    work: Callable[[], None]
    with tempfile.TemporaryDirectory(prefix="serving-") as name, online_store("redis", Path(name)):
        lake = Path(name)
        os.environ["LLMEMB_REGISTRY"] = f"sqlite:///{lake}/registry.db"
        apply(lake)
        ids = [f"B{number:09d}" for number in range(arguments.items)]
        published = [publish(lake, seed, arguments, ids) for seed in ((1, 2) if wanted("flips") else (1,))]
        histories = push(lake, ids)
        started = time.perf_counter()
        with serving(lake, WORKERS=str(arguments.workers), POLL_S="0.2") as (url, process):
            ask(url, "/recommend", user_id="u1")
            memory(process, lake, arguments.items, time.perf_counter() - started)
            space, emb_ND = published[-1]
            for kind, work in (
                ("recall", lambda: recalls(lake, space)),
                ("peers", lambda: peers(url, lake, ids, emb_ND)),
                ("cpu", lambda: cpu(url, process, arguments, ids, histories)),
                ("load", lambda: loads(url, process, arguments, ids)),
                ("feast", lambda: beside_feast(url, lake, space, histories)),
                ("flips", lambda: flips(url, lake, arguments, {one.space_id: table for one, table in published}, ids)),
            ):
                if wanted(kind) or (kind == "recall" and arguments.only == "start"):
                    work()
        if wanted("faults"):
            faults(lake, arguments, histories)


if __name__ == "__main__":
    main()
