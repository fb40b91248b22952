"""Where a lake is: a folder, or an address of an object store.

    lake = place(Path("s3://bucket/prefix"))    a folder of this machine, which names the address in its file `.store`
    store = of(lake)                            the store; None for a lake that is a plain folder

Every job works in a folder. Of a lake on an object store that folder is scratch: it holds what is being written, and copies of
what never changes. It may be deleted whenever no job runs. Keys of the store are the paths below a lake's folder.

A store must put an object whole or not at all, show it to the next reader, and put on a condition (S3, GCS and Azure do): then
one put is a commit.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jobs.lake.place import MARK
from jobs.lake.place import place as place
from jobs.run import InputError, Unavailable

SERVING = ("publish", "lookup", "recommend", "rollback", "collect", "forget", "explain")
"""Jobs that read or write the online store. `codes` does too, where it publishes."""
VERSION = " version "
AT_ONCE = 8
"""Files that are put or fetched at once."""
CLIENT = {"timeout": "60s", "connect_timeout": "5s"}
RETRY = {"max_retries": 8, "retry_timeout": dt.timedelta(seconds=100)}
"""A store that throttles (503), is slow or hangs up is asked again, with growing pauses; then the job ends as busy."""


@cache
def of(lake: Path) -> Store | None:
    """The object store that a lake is on; None for a plain folder."""
    mark = lake / MARK
    return Store(mark.read_text()) if mark.is_file() else None


def refuse_without_services(lake: Path, job: str) -> None:
    """Raises InputError where a lake is on an object store and what a job writes online would be files of this machine."""
    absent = [name for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY") if not os.environ.get(name)]
    if absent and (store := of(lake)):
        raise InputError(
            f"{job} with run.lake {store.address}: set {' and '.join(absent)} (feature_repo/feature_store.yaml): without "
            "them the online store would be files of this machine"
        )


def called(lake: Path) -> str:
    """A lake as the recipe calls it."""
    return store.address if (store := of(lake)) else str(lake)


@dataclass(frozen=True)
class Found:
    """An object as it was read."""

    data: bytes
    tag: str
    """Of these very bytes: a put on the condition of it replaces nothing else."""
    age_s: float
    """Seconds since it was put, by the store's clock and ours."""


class Conflict(Unavailable):
    """Another writer was faster."""


class Store:
    """A lake on an object store. Methods raise Unavailable where the store fails, InputError where it does not let us in."""

    def __init__(self, address: str) -> None:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.address = address
        client: dict[str, Any] = dict(CLIENT)
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
            client["allow_http"] = True
        try:
            self.client: Any = from_url(address, client_options=client, retry_config=RETRY)  # type: ignore[call-overload]
        except BaseError as error:
            raise InputError(
                f"{address} can't be opened ({first_line(error)}): set the store's account and credentials in the environment"
            ) from error

    def get(self, key: str) -> Found | None:
        """An object; None where there is none."""
        import obstore

        with self.failures(key), contextlib.suppress(FileNotFoundError):
            found = obstore.get(self.client, key)
            age = dt.datetime.now(dt.UTC) - found.meta["last_modified"]
            return Found(bytes(found.bytes()), tag_of(found.meta), age.total_seconds())
        return None

    def put(self, key: str, source: bytes | Path) -> None:
        """Replaces an object."""
        import obstore

        try:
            with self.failures(key):
                obstore.put(self.client, key, source)
        except FileNotFoundError as error:
            raise InputError(f"{self.address}/{key} can't be put ({first_line(error)}): is there such a bucket?") from error

    def put_if(self, key: str, data: bytes, tag: str | None) -> str:
        """Replaces the object that has a tag, or puts the first one (None); gives the new tag. Raises Conflict.

        A put whose answer was lost is asked for again, and then meets itself: the same bytes are no conflict.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create" if tag is None else mode_of(tag)
        with self.failures(key):
            try:
                return tag_of(obstore.put(self.client, key, data, mode=mode, use_multipart=False))
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                now = self.get(key)
        if now is None and tag is None:
            raise InputError(f"{self.address}/{key} can't be put: is there such a bucket?")
        if now is None or now.data != data:
            raise Conflict(f"another writer replaced {self.address}/{key} at the same time")
        return now.tag

    def delete(self, keys: Sequence[str]) -> None:
        """Removes objects, as far as they are there."""
        import obstore

        if keys:
            with self.failures(keys[0]), contextlib.suppress(FileNotFoundError):
                obstore.delete(self.client, list(keys))

    def listed(self, prefix: str) -> list[dict[str, Any]]:
        """`path`, `size` and `last_modified` of all objects below a prefix, in the order of their paths."""
        import obstore

        with self.failures(prefix):
            found = obstore.list(self.client, prefix, chunk_size=1000).collect()
        return sorted((dict(one) for one in found), key=lambda one: str(one["path"]))

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below a prefix, in order: one request for each thousand, however much lies in them."""
        import obstore

        with self.failures(prefix):
            found = obstore.list_with_delimiter(self.client, prefix)["common_prefixes"]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found)

    def tail(self, key: str, most: int) -> tuple[bytes, int]:
        """The last bytes of an object, and its size. Raises FileNotFoundError."""
        import obstore

        with self.failures(key):
            if self.address.startswith("az://"):  # Azure counts ranges from an object's start alone
                size = int(obstore.head(self.client, key)["size"])
                start = max(0, size - most)
                return bytes(obstore.get_range(self.client, key, start=start, end=size)) if size else b"", size
            found = obstore.get(self.client, key, options={"range": {"suffix": most}})
            return bytes(found.bytes()), int(found.meta["size"])

    def ranges(self, key: str, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes [start, end) of an object, several at once."""
        import obstore

        with self.failures(key):
            found = obstore.get_ranges(
                self.client, key, starts=[one for one, _ in pairs], ends=[end for _, end in pairs], coalesce=0
            )
        return [bytes(part) for part in found]

    def put_files(self, files: Sequence[tuple[str, Path]]) -> None:
        """Puts files (key, path), several at once."""
        with ThreadPoolExecutor(AT_ONCE) as aside:
            list(aside.map(lambda pair: self.put(*pair), files))

    def fetch(self, files: Sequence[tuple[str, Path]]) -> None:
        """Brings objects (key, path) to this machine, several at once; a file appears whole."""
        with ThreadPoolExecutor(AT_ONCE) as aside:
            list(aside.map(lambda pair: self.fetch_one(*pair), files))

    def fetch_one(self, key: str, path: Path) -> None:
        """Brings one object to this machine. Raises FileNotFoundError where there is none."""
        import obstore

        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        with self.failures(key):
            found = obstore.get(self.client, key)
            with aside.open("wb") as stream:
                for part in found.stream():
                    stream.write(part)
        os.utime(aside, (time.time(), found.meta["last_modified"].timestamp()))
        aside.replace(path)

    def digest(self, key: str) -> str:
        """SHA-256 of an object's bytes, in hexadecimal. Raises FileNotFoundError."""
        import obstore

        found = hashlib.sha256()
        with self.failures(key):
            for part in obstore.get(self.client, key).stream():
                found.update(part)
        return found.hexdigest()

    @contextlib.contextmanager
    def failures(self, key: str) -> Iterator[None]:
        """What the store refuses or fails at, in the jobs' words."""
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        try:
            yield
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise InputError(
                f"{self.address} does not let us at {key} ({first_line(error)}): check the credentials in the environment"
            ) from error
        except BaseError as error:
            raise Unavailable(
                f"{self.address} failed at {key} ({first_line(error)}): is it down, slow, or does it throttle? Run again"
            ) from error


def tag_of(meta: Mapping[str, Any]) -> str:
    """What an object's bytes are known by: its etag, and its version where the store counts them (GCS asks for that one)."""
    return f"{meta['e_tag']}{VERSION}{meta['version']}" if meta.get("version") else str(meta["e_tag"])


def mode_of(tag: str) -> dict[str, str]:
    """The condition that an object still has a tag."""
    etag, _, version = tag.partition(VERSION)
    return {"e_tag": etag, "version": version} if version else {"e_tag": etag}


def first_line(error: Exception) -> str:
    """An error of the store in brief; an address in it may bear a signature behind its question mark."""
    return re.sub(r"\?\S+", "", str(error).strip().split("\n")[0])[:300]
