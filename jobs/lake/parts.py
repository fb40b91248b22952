"""Finished parts of a partition that is still being made, kept aside under names of their own, so that a kill loses none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake import partitions
from jobs.lake.partitions import Commit
from jobs.lake.tables import Table


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


def commit_parts(lake: Path, table: Table, partition: str, parts: list[Path]) -> Commit:
    """Commits the partition: what it held already, and the new parts behind it. Parts are linked, so a kill loses none."""
    if parts or partitions.is_committed(lake, table.name, partition):
        commit = partitions.commit_files(lake, table.name, partition, [link(part) for part in parts], behind=True)
    else:
        commit = partitions.write(lake, table, partition, [])
    shutil.rmtree(aside_of(lake, table, partition), ignore_errors=True)
    return commit


def link(part: Path) -> Path:
    """A second name of a finished part, for the commit to move."""
    name = part.parent.parent / f".{part.name}"
    name.unlink(missing_ok=True)
    os.link(part, name)
    return name
