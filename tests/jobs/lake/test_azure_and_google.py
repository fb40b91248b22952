"""A lake on Azure's blobs (Azurite, where it is installed) and on Google's XML interface (a stand-in before moto's server)."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import obstore
import pytest
from obstore.exceptions import NotSupportedError
from obstore.store import MemoryStore
from werkzeug.serving import make_server

from feature_repo.serving import artifacts as served
from feature_repo.serving.settings import Settings
from jobs.lake import partitions
from jobs.lake import store as stores
from jobs.lake.locks import alone
from jobs.lake.tables import ITEMS
from jobs.run import InputError, Run
from tests.feature_repo.sentinels import free_port
from tests.jobs.lake.item_rows import rows
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store

DS = "ds=2026-01-01"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's own, which its manual prints."""


def test_the_end_of_an_object_is_read_without_a_range_that_azure_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    get = obstore.get

    def refusing(client: Any, key: str, *, options: Any = None) -> Any:
        if options and "suffix" in options.get("range", {}):
            raise NotSupportedError("Azure does not support suffix range requests")
        return get(client, key, options=options)

    monkeypatch.setattr(obstore, "get", refusing)
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    store = stores.Store("az://lakes/one")
    store.client = MemoryStore()
    for size, most in ((10, 4), (3, 8), (0, 8)):
        store.put("a", bytes(range(size)))
        assert store.tail("a", most) == (bytes(range(size))[-most:], size)
    with pytest.raises(FileNotFoundError):
        store.tail("b", 4)


def test_an_address_whose_settings_lack_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "AZURITE_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(InputError, match=r"az://lakes/one can't be opened .*[Aa]ccount.*environment"):
        stores.Store("az://lakes/one")


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Azurite's address."""
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("azurite-blob is not installed (npm install -g azurite)")
    port = free_port()
    command = [program, "--silent", "--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence"]
    with subprocess.Popen(
        [*command, "--blobPort", str(port)], stdout=subprocess.DEVNULL, cwd=tmp_path_factory.mktemp("azurite")
    ) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


class Generations:
    """Before the tests' S3 server: what Google's XML interface does otherwise. An object's generation stands for its etag."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.tags: dict[int, str] = {}

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        """One request; a condition on a generation is one on the etag."""
        signed = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=b"
        environ["HTTP_AUTHORIZATION"] = signed  # moto looks whether there is one
        # moto reads the address as it was written, and Google's clients write all but letters and numbers by their codes
        environ["RAW_URI"] = environ["REQUEST_URI"] = f"{quote(environ['PATH_INFO'])}?{environ.get('QUERY_STRING', '')}"
        asked = environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        if asked is not None:
            name, tag = ("HTTP_IF_NONE_MATCH", "*") if asked == "0" else ("HTTP_IF_MATCH", self.tags.get(int(asked), '"none"'))
            environ[name] = tag

        def answer(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            for tag in [value for name, value in headers if name.lower() == "etag"]:
                generation = int(hashlib.sha256(tag.encode()).hexdigest()[:12], 16)
                self.tags[generation] = tag
                headers = [*headers, ("x-goog-generation", str(generation))]
            return start(status, headers, *rest)

        return self.app(environ, answer)


@pytest.fixture(params=["az", "gs"])
def lake(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, object_store: ObjectStore
) -> Iterator[Path]:
    """An empty lake in a container or bucket of its own."""
    monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / "scratch"))
    if request.param == "az":
        url = request.getfixturevalue("azurite")
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", url)
        make(url, container := f"lakes-{uuid.uuid4().hex[:8]}")
        yield Run(ds="2026-01-01", lake=Path(f"az://{container}/lake")).lake
        return
    _, front = request.getfixturevalue("object_server")
    server = make_server("127.0.0.1", 0, Generations(front), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))  # $AWS_ENDPOINT_URL lets plain HTTP in
    yield Run(ds="2026-01-01", lake=Path(f"gs://{object_store.bucket}/lake")).lake
    server.shutdown()


def make(url: str, container: str) -> None:
    """A container, by a signed request; waits until the server answers."""
    for _ in range(200):
        date = dt.datetime.now(dt.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        said = "PUT" + "\n" * 12 + f"{lines}/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        signed = base64.b64encode(hmac.new(base64.b64decode(KEY), said.encode(), hashlib.sha256).digest()).decode()
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signed}", "Content-Length": "0"}
        asked = urllib.request.Request(f"{url}/{ACCOUNT}/{container}?restype=container", method="PUT", headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=5):
                return
        except urllib.error.HTTPError:
            raise
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.1)
    raise TimeoutError(f"{url} does not answer")


def test_one_put_commits_and_one_of_two_writers_wins(lake: Path) -> None:
    store = stores.of(lake)
    assert store is not None
    first = store.put_if("a/x.json", b"1", None)
    second = store.put_if("a/x.json", b"2", first)
    for tag in (first, None):
        with pytest.raises(stores.Conflict):
            store.put_if("a/x.json", b"3", tag)
    assert (found := store.get("a/x.json")) is not None and (found.data, found.tag) == (b"2", second)
    store.delete(["a/x.json", "a/none"])
    assert store.get("a/x.json") is None and store.listed("a") == []


def test_partitions_locks_and_the_serving_process(lake: Path, tmp_path: Path) -> None:
    assert partitions.write(lake, ITEMS, DS, [rows("a", "b"), rows("c")]).rows == 3
    partitions.write(lake, ITEMS, "ds=2026-01-03", [rows("x")])
    assert partitions.read(lake, ITEMS, DS)["item_id"].to_pylist() == ["a", "b", "c"]
    assert partitions.latest(lake, "items", "2026-01-02") == DS
    with alone(lake, "extract"):
        pass
    store = stores.of(lake)
    assert store is not None
    store.put("indexes/space=a/ds=1/_index.json", b'{"digest": "0123"}')
    store.put("indexes/space=a/ds=1/0123/vectors.npy", b"12")
    settings = Settings(artifacts=store.address, cache=str(tmp_path / "cache"))
    assert served.named_by(settings, "indexes/space=a/ds=1") == "0123"
    assert (served.local(settings, "indexes/space=a/ds=1/0123") / "vectors.npy").read_bytes() == b"12"
    with pytest.raises(served.Absent, match=r"(az|gs)://"):
        served.local(settings, "indexes/space=b/ds=1/0123")


def test_a_container_that_is_not_there_is_said(lake: Path, tmp_path: Path) -> None:
    kind = stores.called(lake).partition(":")[0]
    other = Run(ds="2026-01-01", lake=Path(f"{kind}://no-such/lake")).lake
    with pytest.raises(InputError, match="is there such a bucket"):
        partitions.write(other, ITEMS, DS, [rows("a")])
