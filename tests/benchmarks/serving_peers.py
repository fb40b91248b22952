"""The peers of `bench_serving.py`: the query of /similar asked of other vector stores, on the same vectors, one client each.

Whatever is here takes part: vector sets of the Redis that runs (8.0 or later), LanceDB (an HNSW graph over bytes, scored again in
full) and sqlite-vec (exact). The last two run inside this process, without HTTP: an advantage to them.

    pip install --target /tmp/peers --no-deps sqlite-vec lancedb overrides deprecation lance-namespace \\
        lance-namespace-urllib3-client
    PYTHONPATH=/tmp/peers python tests/benchmarks/bench_serving.py --only peers
"""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Query = Callable[[int], list[str]]
"""The ten nearest items of a row by dot product, the item itself perhaps among them."""
K = 11


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
    """sqlite-vec, in memory; None where it isn't installed. It has no dot product: vectors get one more column, see above."""
    with contextlib.suppress(ImportError):
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


def peers(client: redis.Redis, home: Path, ids: Sequence[str], emb_ND: Matrix) -> Iterator[tuple[str, Query, float]]:
    """(name, query, seconds to build) of each peer that is here, one after the other."""
    for name, make in (
        ("redis vector sets", lambda: redis_sets(client, ids, emb_ND)),
        ("lancedb", lambda: lance(home, ids, emb_ND)),
        ("sqlite-vec", lambda: sqlite(ids, emb_ND)),
    ):
        started = time.perf_counter()
        if (query := make()) is not None:
            yield name, query, time.perf_counter() - started


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
