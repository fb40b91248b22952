"""An object store for tests: moto's S3 server in this process, with a front that counts requests and can be a bad day.

The front is a WSGI layer: it may throttle, wait, or hang up before or after a request is carried out.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.backends import get_backend
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from jobs.lake import store as stores

Fault = Callable[[str, str], str]
"""(method, path) -> "" to carry the request out, `throttle`, `deny`, `hang up` before it, `break off` amid what it sends,
`lose the answer` after it."""


@dataclass
class ObjectStore:
    """A bucket of the server, and what happens to requests."""

    url: str
    bucket: str
    fault: Fault = lambda method, path: ""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(method and what for, path) of every request that was carried out."""

    @property
    def client(self) -> Any:
        """boto3's client, as somebody else would look at the bucket."""
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")

    def address(self, prefix: str = "lake") -> str:
        """A lake in the bucket."""
        return f"s3://{self.bucket}/{prefix}"

    def copy_of(self, folder: Path, prefix: str = "lake") -> Path:
        """A lake in a folder, copied to the bucket without its databases; where this machine works on the copy."""
        lake = stores.place(Path(self.address(prefix)))
        store = stores.of(lake)
        assert store is not None
        every = [path for path in sorted(folder.rglob("*")) if path.is_file() and ".db" not in path.name]
        files = [path for path in every if "locks" not in path.parts]
        store.put_files([(path.relative_to(folder).as_posix(), path) for path in files])
        return lake

    def objects(self, prefix: str = "lake/") -> dict[str, bytes]:
        """All objects below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        keys = [one["Key"] for page in pages for one in page.get("Contents", ())]
        return {key.removeprefix(prefix): self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}

    def copied(self, prefix: str, to: str) -> str:
        """The address of a copy of a lake, made in the bucket."""
        for key, data in self.objects(f"{prefix}/").items():
            self.client.put_object(Bucket=self.bucket, Key=f"{to}/{key}", Body=data)
        return self.address(to)

    def strew(self, key: str, count: int) -> None:
        """Puts many empty objects, without a request each."""
        backend = get_backend("s3")[DEFAULT_ACCOUNT_ID]["aws"]
        for number in range(count):
            backend.put_object(self.bucket, f"{key}-{number}", b"")

    def counts(self) -> Counter[str]:
        """Requests carried out, by what they were for."""
        return Counter(what for what, _ in self.seen)


class Front:
    """The layer before moto."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.stores: dict[str, ObjectStore] = {}
        self.alone = threading.Lock()
        """Moto looks at a condition, then puts: two at once may both find it met, which no object store allows."""

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        """One request."""
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store = self.stores.get(path.split("/")[1] if "/" in path else "")
        fault = store.fault(method, path) if store else ""
        if fault == "throttle":
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"]
        if fault == "deny":
            start("403 Forbidden", [("Content-Type", "application/xml")])
            return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
        if fault in ("hang up", "break off"):
            if fault == "break off":
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            hang_up(environ)
            return []
        conditional = environ.keys() & {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}
        with self.alone if conditional else contextlib.nullcontext():
            answer = list(self.app(environ, start if fault != "lose the answer" else lambda *_: None))
        if store:
            listing = method == "GET" and "list-type" in environ.get("QUERY_STRING", "")
            store.seen.append(("LIST" if listing else method, path))
        if fault == "lose the answer":
            hang_up(environ)
            return []
        return answer


def hang_up(environ: dict[str, Any]) -> None:
    """Ends the connection without an answer."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


@pytest.fixture(scope="session")
def object_server() -> Iterator[tuple[str, Front]]:
    """The server, for all tests of a process."""
    import logging

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    front = Front()
    server = make_server("127.0.0.1", 0, front, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", front
    server.shutdown()


@pytest.fixture
def object_store(object_server: tuple[str, Front], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An empty bucket; this process and those that it starts get at it, and have an empty scratch folder."""
    url, front = object_server
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / "scratch"))
    store = ObjectStore(url, f"bucket-{uuid.uuid4().hex[:12]}")
    store.client.create_bucket(Bucket=store.bucket)
    front.stores[store.bucket] = store
    yield store
    del front.stores[store.bucket]


def after(count: int, fault: str, method: str = "PUT") -> Fault:
    """So many requests of a method pass; all later ones meet the fault."""
    left = [count]

    def decide(asked: str, path: str) -> str:
        if asked == method:
            left[0] -= 1
        return fault if asked == method and left[0] < 0 else ""

    return decide


def once(fault: str, method: str, part_of_path: str) -> Fault:
    """The first request of a kind meets the fault."""
    met = [False]

    def decide(asked: str, path: str) -> str:
        if met[0] or asked != method or part_of_path not in path:
            return ""
        met[0] = True
        return fault

    return decide


def slow(seconds: float) -> Fault:
    """Every request waits."""

    def decide(asked: str, path: str) -> str:
        time.sleep(seconds)
        return ""

    return decide
