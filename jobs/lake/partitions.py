"""Partitions of the lake: how the rows of a table are committed, found and read.

A partition holds Parquet files and one `_commit.json` that names them with their digests. Only files named there exist for a
reader, and the commit is replaced by one rename: a writer killed at any instant leaves the old partition or the new one, never a
mixture. Files and folders are on the disk before the commit that names them, and the commit before what it replaced is deleted: a
power cut at any instant leaves the same. On an object store (remote.py) one put on a condition takes the place of the rename.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake import ranged, remote, tables
from jobs.lake import store as stores
from jobs.lake.locks import alone
from jobs.lake.remote import COMMIT as COMMIT
from jobs.lake.tables import Table
from jobs.run import InputError, Unavailable


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A partition as its readers see it."""

    table: str
    partition: str
    files: tuple[str, ...]
    counts: tuple[int, ...]
    """Rows of each file."""
    rows: int
    digest: str
    """SHA-256 over the digests of the files, in order."""


def folder(lake: Path, name: str, partition: str) -> Path:
    """Where a partition lies, for example `folder(lake, "items", "ds=2026-01-31")`."""
    return lake / name / partition


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest_part(lake: Path, key: str) -> str:
    """SHA-256 of the bytes of a file of the lake, in hexadecimal, wherever the lake is. Raises FileNotFoundError."""
    store = stores.of(lake)
    return store.digest(key) if store else digest_file(lake / key)


def digest_folder(path: Path) -> str:
    """SHA-256 over the names and bytes of all files below a folder: the identity of an artifact."""
    lines = [f"{digest_file(file)}  {file.relative_to(path).as_posix()}" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # file systems that keep no folders in memory say that there is nothing to sync
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)


def sync_tree(home: Path) -> None:
    """Waits until all files and folders below a folder are on the disk, and itself."""
    for path in sorted(home.rglob("*"), reverse=True):
        sync(path)
    sync(home)


def make_folder(path: Path) -> None:
    """A folder with those above it, as far as they are missing, their names on the disk."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in made:
        with contextlib.suppress(PermissionError):  # a folder above the lake may be closed to us
            sync(place.parent)


def written(value: object) -> str:
    """A value as JSON, as small files of the lake hold it."""
    return json.dumps(value, indent=1, sort_keys=True, default=str)


def write_json(path: Path, value: object) -> None:
    """Replaces a small file by a value as JSON, as `write_text` does."""
    write_text(path, written(value))


def write_text(path: Path, text: str) -> None:
    """Replaces a small file at once: readers see the old text or the new one, also after a power cut."""
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with aside.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    sync(path.parent)


def publish_json(lake: Path, path: Path, value: object) -> None:
    """`write_json` of a file of the lake, wherever the lake is."""
    if store := stores.of(lake):
        # before the copy of this machine, which another process may remove as long as the store does not have it
        store.put(path.relative_to(lake).as_posix(), written(value).encode())
    write_json(path, value)


def read_json(lake: Path, path: Path) -> Any:
    """What a small file of the lake says, wherever the lake is; None where it is not there."""
    if store := stores.of(lake):
        found = store.get(path.relative_to(lake).as_posix())
        return json.loads(found.data) if found else None
    return json.loads(path.read_bytes()) if path.exists() else None


def commit_files(
    lake: Path,
    name: str,
    partition: str,
    staged: Sequence[Path],
    rows: int | None = None,
    over: Commit | None = None,
    kept: int = 0,
) -> Commit:
    """Makes finished Parquet files of the lake's file system a partition's whole content, at once.

    A file is moved in under a name made of its place and its digest, so equal rows leave an equal folder. What the
    partition held before is deleted after the commit. `rows` is how many their writer counted.
    Who goes on from what the partition holds says so by `over`, of which `kept` files stay in front of the new ones. What goes
    then is deleted by the next commit alone: readers may be at it.

    Raises InputError where the files hold another number of rows, or there is no file; Unavailable where another writer was
    faster (in a folder, of a commit `over` another). The old partition then stays.
    """
    store = stores.of(lake)
    if store:
        counted(lake, name, partition, staged, rows)
        remote.commit_files(store, name, partition, staged, over.digest if over else None, kept)
    elif over:
        with alone(lake, f"commit {name}"):
            text = commit_text(lake, name, partition)
            remote.refuse_other(name, partition, text, over.digest)
            files = counted(lake, name, partition, staged, rows)
            commit_here(lake, name, partition, files, remote.entries_of(text), kept)
    else:
        commit_here(lake, name, partition, counted(lake, name, partition, staged, rows))
    return read_commit(lake, name, partition)


def counted(lake: Path, name: str, partition: str, staged: Sequence[Path], rows: int | None) -> list[tuple[Path, int]]:
    """Files with their rows. Raises InputError where there is none, or they do not hold as many as their writer counted."""
    files = [(file, pq.read_metadata(file).num_rows) for file in staged]
    found = sum(count for _, count in files)
    if not staged or rows not in (None, found):
        place, wrote = stores.called(lake), "" if rows is None else f", {rows:,} rows were written"
        raise InputError(
            f"{name}/{partition}: {len(staged)} files with {found:,} rows lie in the lake {place}{wrote}: does every machine "
            "that writes see this folder under the same path (one mount)?"
        )
    return files


def commit_here(
    lake: Path, name: str, partition: str, staged: Sequence[tuple[Path, int]], before: Sequence[remote.Entry] = (), kept: int = 0
) -> None:
    """Moves files of known row counts into a lake that is a folder, behind `kept` of those `before`, and commits them."""
    here, entries = folder(lake, name, partition), list(before[:kept])
    make_folder(here)
    for number, (file, count) in enumerate(staged, kept):
        sha256 = digest_file(file)
        target = here / remote.part_name(number, sha256)
        sync(file)
        file.replace(target)
        entries.append({"name": target.name, "rows": count, "sha256": sha256})
    for place in here, *here.parents:  # all the way: who made a folder may have been killed before it was synced
        sync(place)
        if place == lake:
            break
    write_json(here / COMMIT, remote.record(name, partition, entries))
    stays = {COMMIT, *(entry["name"] for entry in (*before, *entries))}
    for leftover in here.iterdir():
        if leftover.name not in stays and leftover.is_file():
            leftover.unlink()


def write(lake: Path, table: Table, partition: str, parts: Iterable[pa.Table]) -> Commit:
    """Replaces a partition by the rows of `parts`, one Parquet file a part, each checked; memory holds one part.

    Raises InputError when a part breaks the table's contract; the old partition then stays.
    """
    here = folder(lake, table.name, partition)
    make_folder(here)
    files: list[Path] = []
    for number, part in enumerate(parts):
        rows = tables.check(table, part, f"{table.name}/{partition} part {number}")
        tables.check_key(table, rows, f"{table.name}/{partition} part {number}")
        files.append(here / f".{number:05d}-{uuid.uuid4().hex[:8]}.parquet")
        pq.write_table(rows, files[-1], compression="zstd")
    if not files:
        return write(lake, table, partition, [table.schema.empty_table()])
    return commit_files(lake, table.name, partition, files)


def read_commit(lake: Path, name: str, partition: str) -> Commit:
    """What a partition holds. Raises InputError where nothing was ever committed."""
    text = commit_text(lake, name, partition)
    if text is None:
        called = stores.called(lake)
        raise InputError(f"{name}/{partition} is not in the lake {called}: run the job that writes {name} for it first")
    value = json.loads(text)
    return Commit(
        table=name,
        partition=partition,
        files=tuple(entry["name"] for entry in value["files"]),
        counts=tuple(entry["rows"] for entry in value["files"]),
        rows=sum(entry["rows"] for entry in value["files"]),
        digest=value["digest"],
    )


def commit_text(lake: Path, name: str, partition: str) -> bytes | None:
    """What a partition's commit says; None where there is none."""
    if store := stores.of(lake):
        found = remote.committed_now(store, name, partition)
        return found.data if found else None
    path = folder(lake, name, partition) / COMMIT
    return path.read_bytes() if path.exists() else None


def is_committed(lake: Path, name: str, partition: str) -> bool:
    """Whether a partition holds anything."""
    return commit_text(lake, name, partition) is not None


def committed(lake: Path, name: str, under: str = "") -> list[str]:
    """Committed partitions of a table below `under`, in order: `partitions(lake, "llm_embeddings", "encoder=ab12")`.

    On an object store that reads the names of all that lie there: `newest` is what a night asks for.
    """
    if store := stores.of(lake):
        return remote.committed(store, name, under)
    root = lake / name
    return sorted(path.parent.relative_to(root).as_posix() for path in (root / under).rglob(COMMIT))


def drop(lake: Path, name: str, partition: str) -> None:
    """Removes a partition: first the commit, so that no reader finds half of it."""
    if store := stores.of(lake):
        store.delete([f"{name}/{partition}/{COMMIT}"])
        store.delete([str(one["path"]) for one in store.listed(f"{name}/{partition}")])
    here = folder(lake, name, partition)
    (here / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(here, ignore_errors=True)


def latest(lake: Path, name: str, ds: str) -> str:
    """The newest partition `ds=DATE` of a table at or before `ds`. Raises InputError where there is none."""
    if (found := newest(lake, name, ds)) is None:
        called = stores.called(lake)
        raise InputError(f"{name} has no partition at or before {ds} in the lake {called}: run the job that writes it first")
    return found


def newest(lake: Path, name: str, ds: str) -> str | None:
    """The newest partition `ds=DATE` of a table at or before `ds`; None where there is none."""
    if store := stores.of(lake):
        return remote.newest(store, name, f"ds={ds}")
    return max((partition for partition in committed(lake, name) if partition <= f"ds={ds}"), default=None)


def before(lake: Path, name: str, ds: str) -> str | None:
    """The newest partition `ds=DATE` of a table before `ds`; None where there is none."""
    return newest(lake, name, f"{dt.date.fromisoformat(ds) - dt.timedelta(days=1)}")


def scan(
    lake: Path, table: Table, partition: str, columns: Sequence[str] | None = None, batch_rows: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """Rows of a partition in bounded batches, in the order of its files. `check` them where a law matters."""
    for file in read_files(lake, table.name, partition, columns):
        yield from file.iter_batches(batch_size=batch_rows, columns=list(columns) if columns else None)


def read_files(lake: Path, name: str, partition: str, columns: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
    """The files of a partition, one after the other, each open until the next is asked for; `columns` will be read of them."""
    for file in read_commit(lake, name, partition).files:
        with opened(lake, f"{name}/{partition}/{file}", columns) as part:
            yield part


@contextlib.contextmanager
def opened(lake: Path, key: str, columns: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the lake. Raises Unavailable where it is gone: a reader of hours may outlive what two nights replace."""
    store = stores.of(lake)
    try:
        with ranged.opened(store, key, columns) if store else pq.ParquetFile(lake / key) as file:
            yield file
    except FileNotFoundError as error:
        raise Unavailable(f"{stores.called(lake)}/{key} was replaced while it was read: run again") from error


def read_schema(lake: Path, name: str, partition: str) -> pa.Schema:
    """The schema of a partition's files, of which a footer tells. Raises InputError where nothing was ever committed."""
    with opened(lake, f"{name}/{partition}/{read_commit(lake, name, partition).files[0]}") as file:
        return file.schema_arrow


def read(lake: Path, table: Table, partition: str) -> pa.Table:
    """A whole partition, schema, laws and key checked. Raises InputError."""
    batches = list(scan(lake, table, partition))
    rows = pa.Table.from_batches(batches) if batches else table.schema.empty_table()
    rows = tables.check(table, rows, f"{table.name}/{partition}")
    tables.check_key(table, rows, f"{table.name}/{partition}")
    return rows
