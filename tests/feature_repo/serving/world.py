"""A small world to serve: spaces with their recommenders in a lake, published as the jobs do, and a service over it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import uvicorn

from feature_repo import feature_definitions, index, spaces
from feature_repo.reader import Pointer, Reader, Space, open_store, settings
from feature_repo.serving.app import make_app
from feature_repo.serving.http import Patient
from feature_repo.serving.settings import Settings
from feature_repo.stores import lease, open_writer
from models.behaviour.artifact import save_recommender
from models.behaviour.items import IdItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence

WIDTH = 16
MAX_LEN = 8


def item_ids(count: int) -> list[str]:
    return [f"i{number}" for number in range(count)]


def vectors(seed: int, count: int, width: int = WIDTH) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def described(ids: Sequence[str]) -> index.Described:
    pairs = [
        [
            {"name": "title", "value": f"Film {item_id}"},
            {"name": "genre", "value": "ABC"[int(item_id[1:]) % 3]},
            {"name": "tags", "value": ", ".join(["even", "odd"][int(item_id[1:]) % 2 : 2])},
        ]
        for item_id in ids
    ]
    return index.Described(
        item_ids=pa.array(ids),
        attributes=pa.array(pairs, index.PAIRS),
        recent=pa.array([len(ids) - n for n in range(len(ids))]),
        lists={"tags": ", "},
    )


def keep_recommender(lake: Path, seed: int, width: int = WIDTH, max_len: int = MAX_LEN) -> str:
    """A recommender's folder under its digest; gives its id."""
    torch.manual_seed(seed)
    backbone = Backbone(name="sasrec", width=width, max_len=max_len, dropout=0.0)
    staged = lake / "models" / "recommender" / f"staged-{seed}"
    staged.mkdir(parents=True)
    recommender = Recommender(IdItems(2, width), build_sequence(backbone))
    save_recommender(staged, recommender, item_ids=["x"], backbone=backbone, items={"kind": "id"}, meta={})
    identity = index.digest_of(staged)[:16]
    target = staged.with_name(identity)
    if target.exists():
        shutil.rmtree(staged)
    else:
        staged.rename(target)
    return identity


def build_index(
    lake: Path, space: Space, ids: Sequence[str], vector_ND: Any, graph: index.Graph | None = None, rows: int = 64
) -> str:
    """Builds an index where the lake keeps it, from chunks of some rows; gives its digest."""
    home = lake / "indexes" / f"space={space.space_id}" / f"ds={space.ds}"
    staged = home / "staged"
    staged.mkdir(parents=True)
    about = {"space_id": space.space_id, "recommender_id": space.recommender_id, "ds": space.ds}
    chunks = [(list(ids[start : start + rows]), vector_ND[start : start + rows]) for start in range(0, len(ids), rows)]
    index.build(staged, chunks, len(ids), vector_ND.shape[1], graph, described(ids), about)
    digest = index.digest_of(staged)
    if not (home / digest[:16]).exists():
        staged.rename(home / digest[:16])
    else:
        shutil.rmtree(staged)
    (home / "_index.json").write_text(json.dumps({"folder": digest[:16], "digest": digest}))
    return digest


def publish(lake: Path, seed: int, count: int = 200, ds: str = "2026-01-01", ids: Sequence[str] = (), **more: Any) -> Pointer:
    """Lets a space of random vectors serve; space and vectors follow from the seed."""
    ids = list(ids) or item_ids(count)
    vector_ND = vectors(seed, len(ids))
    space = Space(
        space_id=hashlib.sha256(str(seed).encode()).hexdigest()[:16],
        recommender_id=keep_recommender(lake, seed),
        ds=ds,
        width=WIDTH,
        codec="float32",
        items=len(ids),
    )
    space = dataclasses.replace(space, index=build_index(lake, space, ids, vector_ND, **more))
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    with lease(store, "test", 5):
        spaces.stage(store, reader, space, [(ids, vector_ND)], only_changes=False)
        return spaces.flip(store, reader, space)


def push_history(lake: Path, user_id: str, history: Sequence[str]) -> None:
    """As an SRS does, through Feast."""
    push_histories(lake, {user_id: history})


def push_histories(lake: Path, histories: Mapping[str, Sequence[str]]) -> None:
    """The same of many users at once."""
    import pandas as pd

    lists = [list(history) for history in histories.values()]
    rows = {"user_id": list(histories), "item_ids": lists, "timestamps": [list(range(len(history))) for history in lists]}
    frame = pd.DataFrame(rows | {"event_timestamp": [pd.Timestamp.now("UTC")] * len(lists)})
    open_store(lake).push("user_history_push", frame)


def apply(lake: Path) -> None:
    open_store(lake).apply(list(feature_definitions.define(str(lake / "offline"))))


@contextmanager
def serving(lake: Path, ready: bool = True, keep_alive: int = 5, **more: Any) -> Iterator[Client]:
    """A service on a free port; `keep_alive` seconds may pass between two requests of a connection."""
    bordered = make_app(Settings(artifacts=str(lake), **{"poll_s": 0.05, **more}), lake)
    config = uvicorn.Config(
        bordered, host="127.0.0.1", port=0, log_level="critical", http=Patient, access_log=False, timeout_keep_alive=keep_alive
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    client = Client(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", bordered.service)
    client.connections = server.server_state.connections
    try:
        if ready:
            client.until(lambda: client.get("/readyz")[0] == 200)
        yield client
    finally:
        server.should_exit = True
        thread.join()


class Client:
    """Asks a service."""

    def __init__(self, url: str, service: Any) -> None:
        self.url, self.service = url, service
        self.connections: set[Any] = set()
        """Connections that the server holds."""

    def ask(self, path: str, body: Any = None, raw: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """(status, answer, headers)."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                text, status, told = response.read(), response.status, dict(response.headers)
        except urllib.error.HTTPError as error:
            text, status, told = error.read(), error.code, dict(error.headers)
        try:
            return status, json.loads(text), told
        except ValueError:
            return status, text.decode(), told

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        return self.ask(path, body)[:2]

    def get(self, path: str) -> tuple[int, Any]:
        return self.ask(path)[:2]

    def until(self, true: Any, seconds: float = 30) -> None:
        """Waits until something is so. Raises AssertionError where it never is."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.02)
