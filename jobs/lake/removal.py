"""Removing what lies in a lake: a file, or a folder whose commits go first."""

from __future__ import annotations

import shutil
from pathlib import Path

from jobs.lake import partitions
from jobs.lake.locks import alone
from jobs.run import Unavailable


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())


def remove(lake: Path, path: Path) -> bool:
    """Removes a file, or a folder: first the commits that name its files, so that no reader sees half of it.

    A snapshot that an `extract` of its date is at stays; returns whether it went.
    """
    if path.is_file():
        path.unlink()
        return True
    try:
        with alone(lake, f"extract {path.name.removeprefix('ds=')}", 0):
            for commit in sorted(path.rglob(partitions.COMMIT)):
                commit.unlink()
                partitions.sync(commit.parent)
            shutil.rmtree(path)
    except Unavailable:
        return False
    return True
