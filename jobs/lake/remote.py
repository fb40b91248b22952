"""Partitions and folders of a lake on an object store: parts first, then one put on a condition that names them.

The keys are the paths that the same lake has as a folder. A part bears its digest in its name, and no commit deletes one:
who reads the partition of before reads on, and `collect` removes what no commit has named for a day.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.lake import leases
from jobs.lake.store import Conflict, Found, Store
from jobs.run import Unavailable

COMMIT = "_commit.json"
MINE_S = 600.0
Entry = dict[str, Any]
"""A part of a commit: its name, rows, and sha256."""


def part_name(number: int, sha256: str) -> str:
    """The name of a part in its partition."""
    return f"part-{number:05d}-{sha256[:12]}.parquet"


def record(name: str, partition: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """What a commit says."""
    digest = hashlib.sha256("\n".join(entry["sha256"] for entry in entries).encode()).hexdigest()
    return {"table": name, "partition": partition, "files": list(entries), "digest": digest}


def commit_files(store: Store, name: str, partition: str, staged: Sequence[Path], over: str | None, kept: int) -> None:
    """Puts finished files of this machine as parts and commits them, behind `kept` parts of the commit with the digest `over`."""
    before = committed_now(store, name, partition)
    text = before.data if before else None
    if over is not None:
        refuse_other(name, partition, text, over)
    entries = entries_of(text)[:kept]
    puts = []
    for number, file in enumerate(staged, start=len(entries)):
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        entries.append({"name": part_name(number, sha256), "rows": pq.read_metadata(file).num_rows, "sha256": sha256})
        puts.append((f"{name}/{partition}/{entries[-1]['name']}", file))
    store.put_files(puts)
    commit(store, name, partition, entries, before)
    for file in staged:
        file.unlink(missing_ok=True)


def commit(store: Store, name: str, partition: str, entries: Sequence[Entry], before: Found | None) -> None:
    """Makes parts that are in the store a partition's whole content, at once; `before` is what was found before they were put.

    Raises Unavailable where another writer has committed since, or this process has lost a lock that it worked under.
    """
    leases.check(store)
    text = json.dumps(record(name, partition, entries), indent=1, sort_keys=True).encode()
    try:
        store.put_if(f"{name}/{partition}/{COMMIT}", text, before.tag if before else None)
    except Conflict as error:
        raise overtaken(name, partition) from error


def overtaken(name: str, partition: str) -> Unavailable:
    """What is said where another writer was faster."""
    return Unavailable(f"{name}/{partition}: another writer committed it at the same time, and its rows stay; run again")


def refuse_other(name: str, partition: str, text: bytes | None, digest: str) -> None:
    """Raises Unavailable where a commit, as it is now, is not the one with this digest."""
    if text is None or json.loads(text)["digest"] != digest:
        raise overtaken(name, partition)


def committed_now(store: Store, name: str, partition: str) -> Found | None:
    """The commit of a partition, as it lies in the store."""
    return store.get(f"{name}/{partition}/{COMMIT}")


def entries_of(text: bytes | None) -> list[Entry]:
    """The parts that a commit names."""
    return list(json.loads(text)["files"]) if text else []


def committed(store: Store, name: str, under: str) -> list[str]:
    """Committed partitions of a table below `under`, in order."""
    root = f"{name}/"
    paths = (str(one["path"]) for one in store.listed(f"{name}/{under}".rstrip("/")))
    return [path.removeprefix(root).removesuffix(f"/{COMMIT}") for path in paths if path.endswith(f"/{COMMIT}")]


def newest(store: Store, name: str, upto: str) -> str | None:
    """The newest partition `ds=DATE` of a table at or before `upto`: a request for each thousand of them."""
    for folder in reversed(store.folders(name)):
        if folder <= upto and committed_now(store, name, folder) is not None:
            return folder
    return None


def age_s(listed: Mapping[str, Any]) -> float:
    """Seconds since a listed object was put."""
    return float((dt.datetime.now(dt.UTC) - listed["last_modified"]).total_seconds())


# ----------------------------------------------------------------------------------------------------------------- folders


def put_folder(store: Store, lake: Path, folder: Path) -> None:
    """Puts all files below a folder of the lake under the keys that their paths say."""
    leases.check(store)
    store.put_files([(file.relative_to(lake).as_posix(), file) for file in sorted(folder.rglob("*")) if file.is_file()])


def fetch_folder(store: Store, lake: Path, folder: Path, right: Callable[[Path], bool]) -> bool:
    """Brings a folder that is named after its bytes to this machine; whether it is there, and `right(folder)` says it is whole.

    The store's list only says where to look: a folder of which a part is missing is not `right`.
    """
    if folder.is_dir():
        return True
    prefix = folder.relative_to(lake).as_posix()
    staged = folder.with_name(f".staged-{uuid.uuid4().hex[:8]}")
    try:
        files = [str(one["path"]) for one in store.listed(prefix)]
        store.fetch([(path, staged / Path(path).relative_to(prefix)) for path in files])
        if not files or not right(staged):
            return False
        staged.rename(folder)
    except (FileNotFoundError, OSError) as error:
        if not folder.is_dir():
            raise Unavailable(f"{store.address}/{prefix} could not be brought here ({error}): run again") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return True


def mirror(store: Store, lake: Path, prefix: str, suffix: str = "") -> None:
    """Makes the small files right below a folder those of the store: new ones fetched, changed ones again, others removed.

    What is younger than MINE_S stays: another process of this machine may have put it since the store was asked.
    """
    here = lake / prefix
    depth = prefix.count("/") + 2
    there = {
        str(one["path"]): one
        for one in store.listed(prefix)
        if str(one["path"]).endswith(suffix) and len(Path(one["path"]).parts) == depth
    }
    wanted = [(key, lake / key) for key, one in there.items() if is_older(lake / key, one)]
    store.fetch(wanted)
    for path in here.glob(f"*{suffix}") if here.is_dir() else ():
        if path.relative_to(lake).as_posix() not in there:
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > MINE_S:
                    path.unlink()


def is_older(path: Path, listed: Mapping[str, Any]) -> bool:
    """Whether a file of this machine is not there, or not what is listed."""
    if not path.exists():
        return True
    known = path.stat()
    return bool(known.st_size != listed["size"] or known.st_mtime < listed["last_modified"].timestamp() - 1)
