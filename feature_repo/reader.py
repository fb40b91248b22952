"""How a serving team reads item vectors: one space a request, and missing, deleted and stale ids told apart.

    from feature_repo.reader import Reader
    answer = Reader.open().vectors(["movie-1", "movie-2"])
    answer.item_ids, answer.vector_ND, answer.missing, answer.deleted, answer.pointer.recommender_id

Works in-process through Feast's SDK, or with `Reader.over_http(URL)` through Feast's feature server. Needs nothing of the
training side. Shapes: N items found, D width.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_repo.transport import Http, Sdk, Transport
from feature_repo.transport import NothingServed as NothingServed  # who reads catches it

CODECS: Mapping[str, tuple[str, str]] = {"float32": ("vector", "<f4"), "float16": ("vector_f16", "<f2")}
"""Codec -> (field of `item_embedding`, type of its numbers)."""
BATCH = 500
"""Ids a read: bounds one answer of the store."""
TIMEOUTS = "socket_timeout=30,socket_connect_timeout=5"
"""Time limits of the batch writer and of checks, where Redis may have much to do."""
ONLINE_S = 0.1
ONLINE_TIMEOUTS = f"socket_timeout={ONLINE_S},socket_connect_timeout={ONLINE_S}"
"""Time limits of a reader that answers users."""


# --------------------------------------------------------------------------------------------------------------- settings


def settings(lake: Path | None = None, timeouts: str = TIMEOUTS) -> Any:
    """Feast's `RepoConfig`: LLMEMB_ONLINE_STORE (JSON, Feast's own keys) and LLMEMB_REGISTRY (SQLAlchemy URL) where they are
    set, else SQLite files under `lake/feast`. Connections with their passwords stay out of recipes and manifests so.

    Raises ValueError where neither a variable nor a lake says where the stores are, and for what Feast refuses: its own error
    would quote a part of the settings, and so of a password.
    """
    from feast import RepoConfig
    from pydantic import ValidationError

    from feature_repo.feature_definitions import PROJECT

    online, registry = os.environ.get("LLMEMB_ONLINE_STORE"), os.environ.get("LLMEMB_REGISTRY")
    if lake is None and not (online and registry):
        raise ValueError(
            "set LLMEMB_ONLINE_STORE and LLMEMB_REGISTRY (see feature_repo/feature_store.yaml), or give a lake folder"
        )
    home = (lake or Path()).absolute() / "feast"
    if not (online and registry):
        home.mkdir(parents=True, exist_ok=True)
    stores = {
        "registry": {"registry_type": "sql", "path": registry or f"sqlite:///{home}/registry.db"},
        "online_store": online_settings(online, timeouts) if online else {"type": "sqlite", "path": str(home / "online.db")},
        "offline_store": {"type": "file"},
        "auth": json.loads(os.environ.get("LLMEMB_FEAST_AUTH") or '{"type": "no_auth"}'),
    }
    try:
        return RepoConfig(
            project=PROJECT, provider="local", entity_key_serialization_version=3, repo_path=Path(__file__).parent, **stores
        )
    except ValidationError as error:
        found = [(".".join(map(str, one["loc"])), one["msg"]) for one in error.errors(include_input=False, include_context=False)]
    told = "; ".join(f"{where}: {what}" if where else what for where, what in found)
    raise ValueError(f"Feast refuses LLMEMB_ONLINE_STORE, LLMEMB_REGISTRY or LLMEMB_FEAST_AUTH: {told}")


def online_settings(text: str, timeouts: str = TIMEOUTS) -> dict[str, Any]:
    """LLMEMB_ONLINE_STORE, with time limits for Redis: without them a store that hangs would hang its readers.

    Raises ValueError for text that is no JSON object with a `type`.
    """
    try:
        online = json.loads(text)
        kind = online["type"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError('LLMEMB_ONLINE_STORE is not a JSON object with a "type": see feature_repo/feature_store.yaml') from None
    if kind == "redis" and "socket_timeout" not in (where := online.get("connection_string", "localhost:6379")):
        online["connection_string"] = f"{where},{timeouts}"
    return dict(online)


def offline_folder(lake: Path | None = None) -> str:
    """Where Feast's offline tables lie: LLMEMB_OFFLINE, or `feast/offline` of the lake; an address for one on an object store."""
    home = (lake or Path()).absolute()
    mark = home / ".store"  # the folder of such a lake names its address there
    there = f"{mark.read_text()}/feast/offline" if mark.is_file() else str(home / "feast" / "offline")
    return os.environ.get("LLMEMB_OFFLINE") or there


def open_store(lake: Path | None = None) -> Any:
    """Feast's `FeatureStore` over `settings(lake)`: for `push`, `get_online_features`, `get_historical_features`."""
    from feast import FeatureStore

    return FeatureStore(config=settings(lake))


# ---------------------------------------------------------------------------------------------------------------- pointer


@dataclass(frozen=True, kw_only=True)
class Space:
    """A published space, as the pointer describes it."""

    space_id: str
    recommender_id: str
    """The recommender whose user vectors fit; empty where the publisher did not know it."""
    ds: str
    """Date of the snapshot that is online, YYYY-MM-DD."""
    width: int
    codec: str
    items: int
    index: str = ""
    """Digest of the space's index; empty where a publisher before 0.2 wrote the pointer."""


@dataclass(frozen=True, kw_only=True)
class Pointer(Space):
    """What serves now."""

    sequence: int
    """How many times the pointer was written: by publish, rollback, and forget."""
    previous: Space | None
    withheld: tuple[str, ...] = ()
    """Ids that were forgotten and still stand in the index: it is being built without them."""
    written: dt.datetime
    """The pointer's event timestamp: later than that of any pointer before."""

    @property
    def space(self) -> Space:
        """The serving space alone."""
        return Space(**{name: getattr(self, name) for name in Space.__dataclass_fields__})

    @property
    def age(self) -> dt.timedelta:
        """Time since the end of the snapshot that serves."""
        return max(dt.datetime.now(dt.UTC) - end_of(self.ds), dt.timedelta(0))


@functools.lru_cache(64)
def end_of(ds: str) -> dt.datetime:
    """The first moment after a snapshot's date, UTC."""
    return dt.datetime.combine(dt.date.fromisoformat(ds), dt.time(), dt.UTC) + dt.timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Vectors of one space. Every id asked for is in exactly one of `item_ids`, `missing` and `deleted`."""

    pointer: Pointer
    item_ids: list[str]
    """Ids found, in the order of the request."""
    vector_ND: npt.NDArray[np.float32]
    """Their vectors; row n belongs to item_ids[n]."""
    as_of: list[dt.datetime]
    """End of the snapshot in which each vector last changed."""
    missing: list[str]
    """Ids that the space does not have."""
    deleted: list[str]
    """Ids that were forgotten on purpose: drop them from caches."""

    def stale(self, max_age: dt.timedelta) -> list[str]:
        """Ids whose vector is older than `max_age`; `pointer.age` tells the age of the space as a whole."""
        oldest = dt.datetime.now(dt.UTC) - max_age
        return [item_id for item_id, moment in zip(self.item_ids, self.as_of, strict=True) if moment < oldest]


# ----------------------------------------------------------------------------------------------------------------- reader


class Reader:
    """Reads vectors of the space that the pointer names; resolves the pointer once a request."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    @classmethod
    def open(cls, lake: Path | None = None, online: bool = False) -> Reader:
        """In-process, over `settings(lake)`; `online` is for who answers users: it gives up after 100 ms, not 30 s.

        Raises ValueError where nothing says where the stores are.
        """
        return cls(Sdk(settings(lake, ONLINE_TIMEOUTS), tries=0, limit_s=ONLINE_S) if online else Sdk(settings(lake)))

    @classmethod
    def over_http(cls, url: str) -> Reader:
        """Through Feast's feature server, for example `Reader.over_http("http://localhost:6566")`."""
        return cls(Http(url))

    def pointer(self) -> Pointer:
        """What serves now. Raises NothingServed before the first publish."""
        from feature_repo.feature_definitions import CATALOGUE

        fields = ["space_id", "recommender_id", "ds", "width", "codec", "items", "sequence", "previous", "index", "withheld"]
        moment, values = self.transport.read("serving_pointer", {"catalogue": [CATALOGUE]}, fields)[0]
        if "space_id" not in values or moment is None:
            raise NothingServed("nothing was published into this store yet: run `python -m jobs publish`")
        previous, withheld = json.loads(values.pop("previous") or "null"), json.loads(values.pop("withheld", "") or "[]")
        return Pointer(**values, previous=Space(**previous) if previous else None, written=moment, withheld=tuple(withheld))

    def vectors(self, item_ids: Sequence[str]) -> Answer:
        """Vectors of some items, all of the space that serves.

        Raises NothingServed before the first publish; errors of the store pass through.
        """
        pointer = self.pointer()
        rows = self.rows(pointer, item_ids)
        if any(raw is None for _, raw in rows) and (now := self.pointer()) != pointer:
            # the pointer moved between the two reads, and what it named may be gone: answer from what serves now
            pointer, rows = now, self.rows(now, item_ids)
        found = [(item_id, moment, raw) for item_id, (moment, raw) in zip(item_ids, rows, strict=True) if raw is not None]
        absent = [item_id for item_id, (_, raw) in zip(item_ids, rows, strict=True) if raw is None]
        deleted = self.forgotten(absent) if absent else set()
        return Answer(
            pointer=pointer,
            item_ids=[item_id for item_id, _, _ in found],
            vector_ND=decode([raw for _, _, raw in found], pointer),
            as_of=[moment for _, moment, _ in found if moment is not None],
            missing=[item_id for item_id in absent if item_id not in deleted],
            deleted=[item_id for item_id in absent if item_id in deleted],
        )

    def rows(self, space: Space, item_ids: Sequence[str]) -> list[tuple[dt.datetime | None, bytes | None]]:
        """Timestamp and raw vector of some items in a space, None where absent; whether it serves or not."""
        field = CODECS[space.codec][0]
        found: list[tuple[dt.datetime | None, bytes | None]] = []
        for start in range(0, len(item_ids), BATCH):
            part = item_ids[start : start + BATCH]
            keys = {"item_id": part, "space_id": [space.space_id] * len(part)}
            found += [(moment, values.get(field)) for moment, values in self.transport.read("item_embedding", keys, [field])]
        return found

    def forgotten(self, item_ids: Sequence[str]) -> set[str]:
        """Which of some items have a tombstone."""
        found: set[str] = set()
        for start in range(0, len(item_ids), BATCH):
            part = item_ids[start : start + BATCH]
            rows = self.transport.read("item_tombstone", {"item_id": part}, ["forgotten_at"])
            found |= {item_id for item_id, (_, values) in zip(part, rows, strict=True) if "forgotten_at" in values}
        return found


def encode(vector_ND: npt.NDArray[np.float32], codec: str) -> list[bytes]:
    """The raw bytes of each row, as the store keeps them."""
    packed = np.ascontiguousarray(vector_ND.astype(CODECS[codec][1]))
    return [row.tobytes() for row in packed]


def decode(raws: Sequence[bytes], space: Space) -> npt.NDArray[np.float32]:
    """vector_ND of raw rows. Raises ValueError where a row has another width than the space."""
    kind = np.dtype(CODECS[space.codec][1])
    wrong = [len(raw) // kind.itemsize for raw in raws if len(raw) != space.width * kind.itemsize]
    if wrong:
        raise ValueError(f"space {space.space_id} is {space.width} wide, but a vector of {wrong[0]} was read: publish it again")
    vector_ND: npt.NDArray[np.float32] = np.frombuffer(b"".join(raws), kind).reshape(-1, space.width).astype(np.float32)
    return vector_ND
