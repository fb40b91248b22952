"""The tables between the jobs: grain, key and laws of each, and how they are read, written and traced.

The lake is a folder. A partition holds Parquet files and one `_commit.json` that names them with their digests. Only files
named there exist for a reader, and the commit is replaced by one rename: a writer killed at any instant leaves the old
partition or the new one, never a mixture. A job's manifest (`manifests/ds=DATE/JOB.json`) names the digests it read and wrote,
so manifests chain from an online vector back to the source snapshot.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

COMMIT = "_commit.json"
ITEM_GROUPS = ("cold", "tail", "head")


class InputError(ValueError):
    """The recipe or its input is at fault: the message names the value and the remedy (exit status 2)."""


class Refused(Exception):
    """A gate refused the result; the message says which and by how much (exit status 3)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all jobs of one night share: the recipe's `[run]` table and the date of the command line."""

    ds: str
    """Date of the snapshot, YYYY-MM-DD: the night works on what was true at its end (UTC)."""
    lake: Path
    """Folder of the lake; tables, models and manifests lie under it."""
    tracking_uri: str = ""
    """MLflow tracking and registry; empty leaves both out (GPU workers without MLflow)."""
    experiment: str = "llmemb"
    device: str = "auto"
    """`auto` takes the GPU where there is one; or `cpu`, `cuda`, `cuda:1`."""
    seed: int = 42

    def __post_init__(self) -> None:
        try:
            dt.date.fromisoformat(self.ds)
        except ValueError as error:
            raise InputError(f"--ds {self.ds!r} is not a date: write it as YYYY-MM-DD") from error


class Result(Protocol):
    """What every job's frozen `Result` dataclass holds beside its own figures."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digest of each thing read, by name."""

    @property
    def outputs(self) -> Mapping[str, str]:
        """Digest of each thing written, by name."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Row counts of the tables written."""


# ---------------------------------------------------------------------------------------------------------------- tables

Law = Callable[[pa.Table], str | None]
"""Returns what is wrong with a table's rows, or None."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of the lake."""

    name: str
    grain: str
    key: tuple[str, ...]
    schema: pa.Schema
    laws: tuple[Law, ...] = field(default=())


ATTRIBUTES = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))


def _filled(*columns: str) -> Law:
    def law(rows: pa.Table) -> str | None:
        for column in columns:
            if rows[column].null_count:
                return f"{rows[column].null_count} null values in {column}"
            if pa.types.is_string(rows.schema.field(column).type) and pc.any(pc.equal(rows[column], "")).as_py():
                return f"empty text in {column}"
        return None

    return law


def _one_of(column: str, values: Sequence[str]) -> Law:
    def law(rows: pa.Table) -> str | None:
        strange = pc.filter(rows[column], pc.invert(pc.is_in(rows[column], pa.array(values))))
        return f"{column} {strange[0].as_py()!r} is none of {', '.join(values)}" if len(strange) else None

    return law


def _finite(column: str) -> Law:
    def law(rows: pa.Table) -> str | None:
        for chunk in rows[column].chunks:
            flat = chunk.flatten()
            if flat.null_count or pc.all(pc.is_finite(flat.cast(pa.float32()))).as_py() is False:
                return f"null, infinite or NaN values in {column}"
        return None

    return law


def _split_inside_history(rows: pa.Table) -> str | None:
    length = pc.list_value_length(rows["item_ids"])
    if pc.all(pc.equal(length, pc.list_value_length(rows["timestamps"]))).as_py() is False:
        return "item_ids and timestamps differ in length"
    ordered = pc.and_(
        pc.and_(pc.less_equal(rows["train_end"], rows["valid_end"]), pc.less_equal(rows["valid_end"], length)),
        pc.greater_equal(rows["train_end"], 0),
    )
    return None if pc.all(ordered).as_py() is not False else "not 0 <= train_end <= valid_end <= length"


ITEMS = Table(
    name="items",
    grain="item of the catalogue at the end of ds",
    key=("item_id",),
    schema=pa.schema(
        [
            ("item_id", pa.string()),
            ("attributes", ATTRIBUTES),
            ("content_hash", pa.string()),
            ("first_seen_ds", pa.string()),
        ]
    ),
    laws=(_filled("item_id", "attributes", "content_hash", "first_seen_ds"),),
)
"""`attributes` stand in the recipe's order, absent ones left out; `content_hash` is `content_hash(attributes)`."""

INTERACTIONS = Table(
    name="interactions",
    grain="event kept, up to the end of ds",
    key=("user_id", "item_id", "timestamp"),
    schema=pa.schema([("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())]),
    laws=(_filled("user_id", "item_id", "timestamp"),),
)
"""`timestamp` is in unix seconds. Every item_id is in `items`."""

SEQUENCES = Table(
    name="sequences",
    grain="user with at least one kept event",
    key=("user_id",),
    schema=pa.schema(
        [
            ("user_id", pa.string()),
            ("item_ids", pa.list_(pa.string())),
            ("timestamps", pa.list_(pa.int64())),
            ("train_end", pa.int32()),
            ("valid_end", pa.int32()),
        ]
    ),
    laws=(_filled("user_id", "item_ids", "timestamps", "train_end", "valid_end"), _split_inside_history),
)
"""Oldest event first. Events [0, train_end) train, [train_end, valid_end) validate, [valid_end, length) test."""

QUARANTINE = Table(
    name="quarantine",
    grain="source record refused",
    key=(),
    schema=pa.schema([("source", pa.string()), ("key", pa.string()), ("reason", pa.string()), ("record", pa.string())]),
    laws=(_filled("source", "reason", "record"),),
)
"""`record` is the raw record as JSON: nothing is lost."""

LEFT = "item left the catalogue"
"""Reason for events of earlier snapshots, which no night read again: they count against no share of records read."""

METRICS = Table(
    name="metrics",
    grain="(model, slice, metric) of one evaluation",
    key=("model", "slice", "metric"),
    schema=pa.schema(
        [
            ("model", pa.string()),
            ("slice", pa.string()),
            ("metric", pa.string()),
            ("value", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
            ("n", pa.int64()),
        ]
    ),
    laws=(_filled("model", "slice", "metric", "n"),),
)
"""`low` and `high` bound the 95 % bootstrap interval over users; `n` is the number of users in the slice."""


@cache
def llm_embeddings(width: int, dtype: str = "float16") -> Table:
    """Rows `llm_embeddings` of one encoder: partition `encoder=ID/...`, width in dimensions, dtype float16 or float32."""
    value = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return Table(
        name="llm_embeddings",
        grain="(encoder, content_hash): a text is embedded once, ever",
        key=("content_hash",),
        schema=pa.schema([("item_id", pa.string()), ("content_hash", pa.string()), ("embedding", pa.list_(value, width))]),
        laws=(_filled("item_id", "content_hash", "embedding"), _finite("embedding")),
    )


@cache
def item_embeddings(width: int) -> Table:
    """Rows `item_embeddings` of one space: partition `space=ID/ds=DATE`, width in dimensions."""
    return Table(
        name="item_embeddings",
        grain="(item, space)",
        key=("item_id",),
        schema=pa.schema(
            [
                ("item_id", pa.string()),
                ("space_id", pa.string()),
                ("embedding", pa.list_(pa.float32(), width)),
                ("content_hash", pa.string()),
                ("group", pa.string()),
            ]
        ),
        laws=(
            _filled("item_id", "space_id", "embedding", "content_hash", "group"),
            _finite("embedding"),
            _one_of("group", ITEM_GROUPS),
        ),
    )


def check(table: Table, rows: pa.Table, where: str) -> pa.Table:
    """Rows in the table's exact schema, its laws kept.

    Raises InputError that names `where`, the column or the law, and what was found.
    """
    missing = [name for name in table.schema.names if name not in rows.schema.names]
    if missing:
        raise InputError(f"{where}: column {missing[0]} is missing; a row of {table.name} is one {table.grain}")
    try:
        rows = rows.select(table.schema.names).cast(table.schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise InputError(f"{where}: {table.name} does not fit its schema: {error}") from error
    for law in table.laws:
        if wrong := law(rows):
            raise InputError(f"{where}: {table.name} breaks its contract: {wrong}")
    return rows


def check_key(table: Table, rows: pa.Table, where: str) -> None:
    """Raises InputError when two rows share the table's key."""
    if table.key and rows.num_rows:
        counts = rows.select(table.key).group_by(list(table.key)).aggregate([([], "count_all")])
        twice = counts.filter(pc.greater(counts["count_all"], 1))
        if twice.num_rows:
            key = {name: twice[name][0].as_py() for name in table.key}
            raise InputError(f"{where}: {table.name} has {twice.num_rows} keys more than once, for example {key}")


# ------------------------------------------------------------------------------------------------------------- partitions


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A partition as its readers see it."""

    table: str
    partition: str
    files: tuple[str, ...]
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


def digest_folder(path: Path) -> str:
    """SHA-256 over the names and bytes of all files below a folder: the identity of an artifact."""
    lines = [f"{digest_file(file)}  {file.relative_to(path).as_posix()}" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_json(path: Path, value: object) -> None:
    """Replaces a small file at once: readers see the old text or the new one, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with aside.open("w") as stream:
        json.dump(value, stream, indent=1, sort_keys=True, default=str)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)


def commit_files(lake: Path, name: str, partition: str, staged: Sequence[Path]) -> Commit:
    """Makes finished Parquet files of the lake's file system a partition's whole content, at once.

    A file is moved in under a name made of its place and its digest, so equal rows leave an equal folder. What the
    partition held before is deleted after the commit.
    """
    here = folder(lake, name, partition)
    here.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for number, file in enumerate(staged):
        sha256 = digest_file(file)
        target = here / f"part-{number:05d}-{sha256[:12]}.parquet"
        file.replace(target)
        entries.append({"name": target.name, "rows": pq.read_metadata(target).num_rows, "sha256": sha256})
    digest = hashlib.sha256("\n".join(entry["sha256"] for entry in entries).encode()).hexdigest()
    write_json(here / COMMIT, {"table": name, "partition": partition, "files": entries, "digest": digest})
    kept = {COMMIT, *(entry["name"] for entry in entries)}
    for leftover in here.iterdir():
        if leftover.name not in kept and leftover.is_file():
            leftover.unlink()
    return read_commit(lake, name, partition)


def write(lake: Path, table: Table, partition: str, parts: Iterable[pa.Table]) -> Commit:
    """Replaces a partition by the rows of `parts`, one Parquet file a part, each checked; memory holds one part.

    Raises InputError when a part breaks the table's contract; the old partition then stays.
    """
    here = folder(lake, table.name, partition)
    here.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for number, part in enumerate(parts):
        rows = check(table, part, f"{table.name}/{partition} part {number}")
        check_key(table, rows, f"{table.name}/{partition} part {number}")
        files.append(here / f".{number:05d}-{uuid.uuid4().hex[:8]}.parquet")
        pq.write_table(rows, files[-1], compression="zstd")
    if not files:
        return write(lake, table, partition, [table.schema.empty_table()])
    return commit_files(lake, table.name, partition, files)


def read_commit(lake: Path, name: str, partition: str) -> Commit:
    """What a partition holds. Raises InputError where nothing was ever committed."""
    path = folder(lake, name, partition) / COMMIT
    if not path.exists():
        raise InputError(f"{name}/{partition} is not in the lake {lake}: run the job that writes {name} for it first")
    value = json.loads(path.read_text())
    return Commit(
        table=name,
        partition=partition,
        files=tuple(entry["name"] for entry in value["files"]),
        rows=sum(entry["rows"] for entry in value["files"]),
        digest=value["digest"],
    )


def partitions(lake: Path, name: str, under: str = "") -> list[str]:
    """Committed partitions of a table below `under`, in order: `partitions(lake, "llm_embeddings", "encoder=ab12")`."""
    root = lake / name
    return sorted(path.parent.relative_to(root).as_posix() for path in (root / under).rglob(COMMIT))


def latest(lake: Path, name: str, ds: str) -> str:
    """The newest partition `ds=DATE` of a table at or before `ds`. Raises InputError where there is none."""
    dates = [partition for partition in partitions(lake, name) if partition <= f"ds={ds}"]
    if not dates:
        raise InputError(f"{name} has no partition at or before {ds} in the lake {lake}: run the job that writes it first")
    return dates[-1]


def scan(
    lake: Path, table: Table, partition: str, columns: Sequence[str] | None = None, batch_rows: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """Rows of a partition in bounded batches, in the order of its files. `check` them where a law matters."""
    here = folder(lake, table.name, partition)
    for name in read_commit(lake, table.name, partition).files:
        with pq.ParquetFile(here / name) as file:
            yield from file.iter_batches(batch_size=batch_rows, columns=list(columns) if columns else None)


def read(lake: Path, table: Table, partition: str) -> pa.Table:
    """A whole partition, schema, laws and key checked. Raises InputError."""
    batches = list(scan(lake, table, partition))
    rows = pa.Table.from_batches(batches) if batches else table.schema.empty_table()
    rows = check(table, rows, f"{table.name}/{partition}")
    check_key(table, rows, f"{table.name}/{partition}")
    return rows


def content_hash(attributes: Iterable[tuple[str, str]]) -> str:
    """Identity of an item's text: SHA-256 over its (name, value) pairs in their order, 32 hexadecimal digits.

    Each text stands behind its length in code points, so that no two lists of pairs are written alike.
    """
    written = "".join(f"{len(name)}:{name}{len(value)}:{value}" for name, value in attributes)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def tombstones(lake: Path) -> frozenset[str]:
    """Ids of the items that were forgotten: no job may bring them back."""
    return frozenset(json.loads(path.read_text())["item_id"] for path in (lake / "tombstones").glob("*.json"))


def bury(lake: Path, item_id: str, ds: str) -> None:
    """Writes an item's tombstone, before anything of it is removed: a killed `forget` is then finished by its rerun."""
    name = hashlib.sha256(item_id.encode()).hexdigest()[:32]
    write_json(lake / "tombstones" / f"{name}.json", {"item_id": item_id, "forgotten_ds": ds})


def space_id(encoder_id: str, recommender_id: str) -> str:
    """Identity of a space: one (encoder, whitening, recommender); the whitening is part of the recommender."""
    return hashlib.sha256(f"{encoder_id}\n{recommender_id}".encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- one at a time


@contextmanager
def alone(lake: Path, what: str, wait_s: float = math.inf) -> Iterator[None]:
    """Holds the lake's lock `what` meanwhile; another process that wants it waits, `wait_s` at most.

    The kernel lets a lock go when its process ends, however it ends. On a network file system it needs one that passes `flock` on
    (NFS 4, CephFS, EFS). Raises Refused that names who holds it.
    """
    path = lake / "locks" / f"{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        wait_for(lock.fileno(), path, what, wait_s)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        # by the file that is locked: over NFS, closing another one of the same name would let the lock go
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def wait_for(lock: int, path: Path, what: str, wait_s: float) -> None:
    """Takes a lock that `path` tells the holder of. Raises Refused once `wait_s` are over."""
    began, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text() or "another process"
        if time.monotonic() - began >= wait_s:
            raise Refused(f"{what} is under way already ({holder}): run again when that has ended")
        if not told:
            print(f"waiting for {what}: {holder} is at it", file=sys.stderr, flush=True)
        told = True
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------- artifacts, manifests


def keep_artifact(lake: Path, kind: str, staged: Path) -> str:
    """Moves a finished artifact folder to `models/KIND/ID` and returns ID, a digest of its bytes; equal bytes are kept once."""
    identity = digest_folder(staged)[:16]
    target = lake / "models" / kind / identity
    if target.exists():
        shutil.rmtree(staged)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(target)
    return identity


def stage_artifact(lake: Path, kind: str) -> Path:
    """An empty folder beside the artifacts of `kind`, for `keep_artifact`."""
    staged = lake / "models" / kind / f".staged-{uuid.uuid4().hex[:8]}"
    staged.mkdir(parents=True)
    return staged


def artifact(lake: Path, kind: str, identity: str) -> Path:
    """Folder of an artifact, for example `artifact(lake, "encoder", "ab12…")`. Raises InputError where it is absent."""
    path = lake / "models" / kind / identity
    if not path.is_dir():
        raise InputError(f"{kind} {identity} is not in the lake ({path}): train it, or fetch it from the registry first")
    return path


def manifest_path(lake: Path, ds: str, job: str) -> Path:
    """Where a job's manifest of one date lies."""
    return lake / "manifests" / f"ds={ds}" / f"{job}.json"


def read_manifest(lake: Path, ds: str, job: str) -> dict[str, Any]:
    """The newest manifest of a job at or before `ds` that ended well. Raises InputError where there is none."""
    found = [
        path
        for path in sorted((lake / "manifests").glob(f"ds=*/{job}.json"))
        if path.parent.name <= f"ds={ds}" and json.loads(path.read_text())["status"] == "done"
    ]
    if not found:
        raise InputError(f"no run of {job!r} at or before {ds} in the lake {lake}: run `python -m jobs {job}` first")
    value: dict[str, Any] = json.loads(found[-1].read_text())
    return value


@cache
def code_revision() -> str:
    """The git revision of this code (with `-dirty` if changed), or LLMEMB_REVISION where there is no checkout."""
    if revision := os.environ.get("LLMEMB_REVISION"):
        return revision
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def as_json(value: object) -> Any:
    """A dataclass, path or mapping as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: as_json(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
