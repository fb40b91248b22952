"""Finished parts of a partition that is still being made, kept aside under names of their own, so that a kill loses none."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake import partitions, remote, tables
from jobs.lake import store as stores
from jobs.lake.partitions import Commit
from jobs.lake.tables import Table
from jobs.run import InputError

FEW = 4
"""Small parts that may lie at a partition's end; one more, and they are joined. Every reader opens each of them."""


def part_path(lake: Path, table: Table, partition: str, name: str) -> Path:
    """Where the finished part of that name lies, or would."""
    return aside_of(lake, table, partition) / f"{name}.parquet"


def aside_of(lake: Path, table: Table, partition: str) -> Path:
    """The folder of a partition's finished parts."""
    return partitions.folder(lake, table.name, partition) / ".parts"


def write_part(path: Path, rows: pa.Table) -> None:
    """A finished part, on the disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(rows, unfinished, compression="zstd")
    partitions.sync(unfinished)
    unfinished.replace(path)


def commit_parts(lake: Path, table: Table, partition: str, parts: list[Path], full: int) -> Commit:
    """Commits the partition: what it held already, and the new parts behind it; small ones at its end are then joined.

    Parts are linked, so a kill loses none. Raises Unavailable where another writer, such as `forget`, was faster.
    """
    over = partitions.read_commit(lake, table.name, partition) if partitions.is_committed(lake, table.name, partition) else None
    if parts:
        staged = [link(part) for part in parts]
        now = partitions.commit_files(lake, table.name, partition, staged, over=over, kept=len(over.files) if over else 0)
    else:
        now = over or partitions.write(lake, table, partition, [])
    commit = joined(lake, table, now, full)
    shutil.rmtree(aside_of(lake, table, partition), ignore_errors=True)
    return commit


def joined(lake: Path, table: Table, commit: Commit, full: int) -> Commit:
    """The partition of a commit, its last parts made one where they are more than FEW and have at most `full` rows together.

    So nights leave at most FEW small parts to what a reader opens, and any FEW + 1 in a row have more than `full` rows; memory
    holds `full` rows. `forget` alone takes rows out: that of a forgotten item may hold the text of a living one, which a night
    then embeds anew. Parts of another number type stay as they are.
    """
    partition, rows = commit.partition, list[pa.Table]()
    small = last_parts(commit, full)
    if small <= FEW:
        return commit
    for file in reversed(commit.files[-small:]):
        with partitions.opened(lake, f"{table.name}/{partition}/{file}", table.schema.names) as part:
            if not part.schema_arrow.equals(table.schema):
                break
            rows.insert(0, part.read())
    if len(rows) <= FEW:
        return commit
    path = part_path(lake, table, partition, f"joined-{commit.digest[:32]}")
    write_part(path, tables.check(table, pa.concat_tables(rows), f"{table.name}/{partition}"))
    kept = len(commit.files) - len(rows)
    return partitions.commit_files(lake, table.name, partition, [link(path)], over=commit, kept=kept)


def last_parts(commit: Commit, full: int) -> int:
    """How many of the last parts have at most `full` rows together."""
    together = itertools.accumulate(reversed(commit.counts))
    return sum(1 for _ in itertools.takewhile(lambda rows: rows <= full, together))


def commit_put(
    lake: Path, table: Table, partition: str, entries: Sequence[remote.Entry], before: stores.Found | None, rows: int
) -> Commit:
    """Commits parts that were put into a lake on an object store, in order; `before` stood there before they were put.

    Raises InputError where the parts hold another number of rows than `rows`, Unavailable where another writer was faster.
    """
    store = stores.of(lake)
    assert store is not None
    found = sum(entry["rows"] for entry in entries)
    if found != rows:
        raise InputError(f"{table.name}/{partition}: {found:,} rows were put into {store.address}, of {rows:,}: run again")
    if not entries:
        return partitions.write(lake, table, partition, [])
    remote.commit(store, table.name, partition, entries, before)
    return partitions.read_commit(lake, table.name, partition)


def link(part: Path) -> Path:
    """A second name of a finished part, for the commit to move."""
    name = part.parent.parent / f".{part.name}"
    name.unlink(missing_ok=True)
    os.link(part, name)
    return name
