"""Spaces past their grace period -> removed from the online store, with their indexes; and old dates of the lake, by recipe.

The lake's tables may lie in a folder or on an object store: what is old is told by the times of files or of objects.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from feature_repo import leaving, spaces
from feature_repo.reader import Reader, Space, settings
from feature_repo.stores import lease, open_writer
from jobs.collect import retention
from jobs.engines import online
from jobs.lake import store as stores
from jobs.lake import unnamed
from jobs.lake.listing import Place
from jobs.run import InputError, Run, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How long a space stays after it was last seen to serve."""

    run: Run
    grace_days: float = 7.0
    """Counted from the first `collect` that finds the space neither serving nor the one before."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""
    snapshot_days: int | None = None
    """Snapshots (`items`, `interactions`, `sequences`, `quarantine`), vectors of spaces, codes and what arrived between nights of
    dates further back than this are removed, but for those that a live or previous space, an alias, the newest training or a
    report needs; so are checkpoints of trainings that nobody resumed for as long. Left out, all stay."""
    embedding_days: int | None = None
    """The same for `llm_embeddings` of encoders that no space, alias or newest run needs, counted from their last write."""
    offline_days: int | None = None
    """The same for Feast's offline rows: vectors and attributes as they were on a date."""
    dry_run: bool = False
    """Removes nothing: prints what would go, of the online store, of indexes and of the lake, with its bytes."""

    def __post_init__(self) -> None:
        for name in ("snapshot_days", "embedding_days", "offline_days"):
            days = getattr(self, name)
            if days is not None and days < 1:
                raise InputError(f"collect.{name} is {days}: keep one day at least, or leave it out to keep all")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What went and what stays."""

    removed: dict[str, int]
    """Vectors removed of each space; with `dry_run` those that would go."""
    online_bytes_estimate: dict[str, int]
    """Bytes of each of these spaces, about: its rows, times what keys and vectors of some of them take. Codes, and what the store
    adds to a row, are not in it."""
    waiting: dict[str, float]
    """Hours that other spaces have left."""
    kept: list[str]
    """The serving space and the one before."""
    indexes_removed: int
    """Folders of indexes; with `dry_run` those that would go. On an object store they are told in `lake_removed`."""
    lake_bytes: dict[str, int]
    """Bytes removed of the lake, by table, and of `indexes`; with `dry_run` those that would go."""
    lake_removed: list[str]
    """Partitions and files removed, below the lake; Feast's offline tables as `feast_offline/`, wherever they lie."""
    dry_run: bool
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Removes what no reader can need any more. Of the lake only what the recipe gives an age goes.

    Raises InputError for a negative grace period or where nothing serves; Unavailable where another writer is at work, or the
    registry, which knows what the aliases need, is away.
    """
    if config.grace_days < 0:
        raise InputError(f"collect.grace_days is {config.grace_days}: write 0 to remove at once")
    lake, grace = config.run.lake, dt.timedelta(days=config.grace_days)
    reader, store = Reader.open(lake), open_writer(settings(lake))
    pointer = online.served(reader)
    indexes = dict[str, int]()
    with online.refusals(), lease(store, "collect", config.lease_wait_s):
        if spaces.current(reader) != pointer:
            raise Unavailable("the pointer moved, or was lost, while collect waited for its lease: nothing is removed; run again")
        planned = leaving.due(store, pointer, grace)
        bytes_each = {space_id: leaving.row_bytes(store, reader, space_id) for space_id in planned.removed}
        done = planned if config.dry_run else leaving.collect(store, planned)
        if stores.of(lake) is None:
            indexes = remove_indexes(lake, done.kept, set(done.waiting), grace, config.dry_run)
    gone = sweep(config, done)
    gone |= {key: took for key, took in sweep_store(config, done).items() if not any(key.startswith(f"{name}/") for name in gone)}
    estimates = {space_id: round(rows * bytes_each[space_id]) for space_id, rows in done.removed.items()}
    tell(config, done, estimates)
    return Result(
        removed=done.removed,
        online_bytes_estimate=estimates,
        waiting=done.waiting,
        kept=sorted(done.kept),
        indexes_removed=len(indexes),
        lake_bytes=tally(gone | indexes),
        lake_removed=sorted(gone),
        dry_run=config.dry_run,
        inputs={"pointer": online.pointer_text(pointer)},
        outputs={},
        rows={"item_embedding": 0 if config.dry_run else -sum(done.removed.values())},
    )


def tell(config: Config, done: leaving.Collected, estimates: dict[str, int]) -> None:
    """What goes of the online store, and what stays how long, for a person."""
    for space_id, rows in done.removed.items():
        what = "would go" if config.dry_run else "removed"
        log.info("space %s: %s vectors %s, about %s bytes", space_id, f"{rows:,}", what, f"{estimates[space_id]:,}")
    for space_id, hours in done.waiting.items():
        log.info("space %s: stays %s hours more", space_id, hours)


def sweep_store(config: Config, done: leaving.Collected) -> dict[str, int]:
    """Of a lake on an object store what no record names any more, removed after a day, or the grace period if that is longer."""
    store, older_s = stores.of(config.run.lake), max(1.0, config.grace_days) * 86_400
    if store is None:
        return {}
    live = {online.index_home(Path(), space).as_posix() for space in done.kept.values()}
    waiting = {key for key in store.folders("indexes") if key.removeprefix("space=") in done.waiting}
    live |= {f"indexes/{space}/{ds}" for space in waiting for ds in store.folders(f"indexes/{space}")}
    gone = unnamed.parts(store, older_s, config.dry_run) | unnamed.indexes(store, live, older_s, config.dry_run)
    if gone:
        what = "would go" if config.dry_run else "removed"
        log.info("%s objects that no record names %s, %s bytes", f"{len(gone):,}", what, f"{sum(gone.values()):,}")
    return gone


def sweep(config: Config, done: leaving.Collected) -> dict[str, int]:
    """Old dates of the lake that were removed, or with `dry_run` would be, and their bytes."""
    rules = (
        (retention.old_snapshots, config.snapshot_days),
        (retention.old_vectors, config.snapshot_days),
        (retention.old_codes, config.snapshot_days),
        (retention.old_arrivals, config.snapshot_days),
        (retention.old_checkpoints, config.snapshot_days),
        (retention.old_embeddings, config.embedding_days),
        (retention.old_rows, config.offline_days),
    )
    wanted = [(rule, days) for rule, days in rules if days is not None]
    if not wanted:
        return {}
    needs = retention.needed(config.run, done.kept, set(done.waiting))
    if config.embedding_days is not None and not needs.encoders_known:
        log.warning("llm_embeddings stay: no registry (run.tracking_uri), or no artifact, tells which encoders are needed")
    gone = {}
    for one in [one for rule, days in wanted for one in rule(config.run, needs, days)]:
        if config.dry_run or retention.remove(config.run.lake, one):
            gone[one.called] = one.home.size
            what = "would remove" if config.dry_run else "removed"
            log.info("%s %s: %s bytes", what, one.called, f"{one.home.size:,}")
    return gone


def tally(gone: dict[str, int]) -> dict[str, int]:
    """Bytes by table."""
    found = Counter[str]()
    for name, took in gone.items():
        found[name.split("/")[0]] += took
    return dict(found)


def remove_indexes(lake: Path, kept: dict[str, Space], waiting: set[str], grace: dt.timedelta, dry_run: bool) -> dict[str, int]:
    """Removes indexes of snapshots that are not live, a grace period after they were built; folders below the lake and bytes."""
    live = {online.index_home(lake, space) for space in kept.values()}
    removed = dict[str, int]()
    for home in sorted((lake / "indexes").glob("space=*/ds=*")):
        space_id = home.parent.name.removeprefix("space=")
        old = time.time() - home.stat().st_mtime >= grace.total_seconds()
        if home not in live and space_id not in waiting and old:
            name = home.relative_to(lake).as_posix()
            removed[name] = sum(file.size for file in Place(lake).files(name).values())
            if not dry_run:
                online.drop_index(home)
        elif home in live and not dry_run:
            online.prune_index(home, grace.total_seconds())
    return removed
