"""Spaces past their grace period -> removed from the online store, with their indexes; the serving one and the last stay."""

from __future__ import annotations

import datetime as dt
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from feature_repo import spaces
from feature_repo.reader import Reader, Space, settings
from feature_repo.stores import lease, open_writer
from jobs.engines import online
from jobs.run import InputError, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long a space stays after it was last seen to serve."""

    run: Run
    grace_days: float = 7.0
    """Counted from the first `collect` that finds the space neither serving nor the one before."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What went and what stays."""

    removed: dict[str, int]
    """Vectors removed of each space."""
    waiting: dict[str, float]
    """Hours that other spaces have left."""
    kept: list[str]
    """The serving space and the one before."""
    indexes_removed: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Removes what no reader can need any more. Lake tables and offline history stay: a space can be published again.

    Raises InputError for a negative grace period or where nothing serves; Refused where another writer is at work.
    """
    if config.grace_days < 0:
        raise InputError(f"collect.grace_days is {config.grace_days}: write 0 to remove at once")
    lake, grace = config.run.lake, dt.timedelta(days=config.grace_days)
    reader, store = Reader.open(lake), open_writer(settings(lake))
    pointer = online.served(reader)
    with online.refusals(), lease(store, "collect", config.lease_wait_s):
        done = spaces.collect(store, reader, grace)
        indexes = remove_indexes(lake, done.kept, set(done.waiting), grace)
    for space_id, rows in done.removed.items():
        log.info("space %s: %s vectors removed", space_id, f"{rows:,}")
    for space_id, hours in done.waiting.items():
        log.info("space %s: stays %s hours more", space_id, hours)
    return Result(
        removed=done.removed,
        waiting=done.waiting,
        kept=sorted(done.kept),
        indexes_removed=indexes,
        inputs={"pointer": online.pointer_text(pointer)},
        outputs={},
        rows={"item_embedding": -sum(done.removed.values())},
    )


def remove_indexes(lake: Path, kept: dict[str, Space], waiting: set[str], grace: dt.timedelta) -> int:
    """Removes indexes of snapshots that are not live, a grace period after they were built; returns how many."""
    live = {online.index_home(lake, space) for space in kept.values()}
    removed = 0
    for home in sorted((lake / "indexes").glob("space=*/ds=*")):
        space_id = home.parent.name.removeprefix("space=")
        old = time.time() - home.stat().st_mtime >= grace.total_seconds()
        if home not in live and space_id not in waiting and old:
            online.drop_index(home)
            removed += 1
        elif home in live:
            online.prune_index(home, grace.total_seconds())
    return removed
