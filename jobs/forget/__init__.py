"""Items -> removed from lake, every space, index and offline history; they stay forgotten, and the proof is printed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from feature_repo import offline, spaces
from feature_repo.index import Graph
from feature_repo.reader import Reader, offline_folder, settings
from feature_repo.stores import lease, open_writer
from jobs.engines import online
from jobs.forget import known, proof, tables
from jobs.forget.home import Home, home_of
from jobs.forget.names import Ids
from jobs.lake import partitions, unnamed
from jobs.lake import store as stores
from jobs.lake.items import bury
from jobs.lake.locks import others_ended
from jobs.run import InputError, Refused, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is forgotten."""

    run: Run
    item: str | int = ""
    """An item's id."""
    items: tuple[str | int, ...] = ()
    """Further ids: the lake is rewritten once for all of them, `--set 'forget.items=["a", "b"]'`."""
    approximate: bool = True
    """As in `publish`: indexes of live spaces are built anew without the item."""
    graph: Graph = field(default_factory=Graph)
    """As in `publish`."""
    unknown: bool = False
    """Also ids that neither the lake nor the online store knows: they are kept away before they ever come. Else such an id is
    refused, as it is more likely a slip than a wish."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""
    jobs_wait_s: float = 3_600.0
    """How long to wait for jobs that were at work when the tombstones were written: what they write may hold the items."""

    @property
    def ids(self) -> Ids:
        """The ids of all that is forgotten. Raises InputError for none, and for an empty one among others."""
        found = [str(item) for item in ((self.item, *self.items) if str(self.item) else self.items)]
        if not found or not all(found):
            raise InputError("forget.item is empty: give an item's id, for example --set forget.item=1193")
        return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What went, and the proof that nothing stayed."""

    online_removed: int
    """Vectors removed, of all spaces."""
    lake_removed: dict[str, int]
    """Rows removed or shortened, by table."""
    indexes: int
    """Indexes of live spaces built anew."""
    manifests_removed: int
    """Answers of `lookup`, `recommend` and `explain`, and reports, that named one."""
    left_online: int
    """Vectors still found afterwards: 0."""
    left_in_lake: list[str]
    """Files that still name one, of all files of the lake: none."""
    named_by_models: list[str]
    """Trained models list the ids they were trained on; a model is its bytes, so only the next training drops the name."""
    inputs: dict[str, str]
    """Digests of the partitions before."""
    outputs: dict[str, str]
    """Digests of the partitions after."""
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Tombstone first, then the stores, the lake, history and indexes; run again after a kill, it finishes.

    Holds against jobs that run at the same moment: who began before the tombstones were written is waited for, and what it wrote
    is searched; who begins later reads them. Raises InputError for an empty or unknown id; Refused where something of the item is
    still found; Unavailable where another writer is at work, or a job does not end in time: run again, it finishes.
    """
    ids, lake = config.ids, config.run.lake
    with home_of(lake) as home:
        if not config.unknown:
            known.refuse_unknown(lake, home.path, ids)
        emptied = bury_all(config, ids)
        home.refresh()
        removed, inputs, outputs = tables.forget_tables(home.path, ids)
        if gone := offline.forget(history(lake, home), ids):
            removed["feast_offline"] = gone
        tables.drop_leftovers(home.path, ids)
        echoes = proof.forget_answers(home.path, ids)
        home.put_back()
        indexes = forget_indexes(config)
        home.refresh()
        proof.scrub(home.path)
        left_online, left = still_online(config, ids), sorted(proof.mentions(home.path, ids))
    models = [name for name in left if name.startswith("models/")]
    result = Result(
        online_removed=emptied,
        lake_removed=removed,
        indexes=indexes,
        manifests_removed=echoes,
        left_online=left_online,
        left_in_lake=[name for name in left if name not in models],
        named_by_models=models,
        inputs=inputs,
        outputs=outputs,
        rows={name: -count for name, count in removed.items()},
    )
    log_result(result)
    return result


# ---------------------------------------------------------------------------------------------------------------- online


def bury_all(config: Config, ids: Ids) -> int:
    """Tombstones first, then the online store, again once the jobs that were at work have ended; how many vectors went."""
    for item in sorted(ids):
        bury(config.run.lake, item, config.run.ds)
    with online.refusals():
        emptied = forget_online(config, ids)
        if others_ended(config.run.lake, config.jobs_wait_s):
            emptied += forget_online(config, ids)
    return emptied


def history(lake: Path, home: Home) -> Path:
    """The folder of Feast's offline tables. Raises InputError for one on an object store that is no part of the lake."""
    there = offline_folder(lake)
    if "://" not in there:
        return Path(there)
    if home.store is None or not there.startswith(f"{home.store.address}/"):
        raise InputError(f"LLMEMB_OFFLINE is {there}: forget finds Feast's history below the lake, or in a folder")
    return home.path / there.removeprefix(f"{home.store.address}/")


def forget_online(config: Config, ids: Ids) -> int:
    """Removes the items' rows from every space, also those of a first publish that was killed; returns how many vectors went."""
    lake = config.run.lake
    store = open_writer(settings(lake))
    if spaces.current(Reader.open(lake)) is None and not any(store.rows_of(item) for item in ids):
        return 0  # perhaps nothing was ever published: there may be no tables
    with lease(store, "forget", config.lease_wait_s):
        # first the processes that serve from memory: they leave it out within a second
        if spaces.current(reader := Reader.open(lake)) is not None:
            for item in sorted(ids):
                spaces.withhold(store, reader, item)
        emptied = sum(spaces.forget(store, item, config.run.ds) for item in sorted(ids))
        store.settle()
        return emptied


def still_online(config: Config, ids: Ids) -> int:
    """Vectors of the items in any space, whether one serves or not."""
    store = open_writer(settings(config.run.lake))
    return sum(spaces.vectors_of(store, item) for item in ids)


def forget_indexes(config: Config) -> int:
    """Builds the indexes of live spaces without the items, and removes those of other snapshots; returns how many were built."""
    lake, built = config.run.lake, 0
    pointer = spaces.current(Reader.open(lake))
    digests = {}
    for space in spaces.live(pointer).values() if pointer else ():
        if partitions.read_json(lake, online.index_home(lake, space) / online.INDEX):
            digests[space.space_id] = online.build_index(lake, space, config.graph if config.approximate else None, 4_096)
            built += 1
    if pointer:
        with online.refusals():
            repoint(config, digests)
    live = {online.index_home(lake, space) for space in spaces.live(pointer).values()} if pointer else set()
    if store := stores.of(lake):
        unnamed.indexes(store, {home.relative_to(lake).as_posix() for home in live}, 0.0, dry_run=False)
        return built
    for home in live:
        online.prune_index(home)
    for home in (lake / "indexes").glob("space=*/ds=*"):
        if home not in live:
            online.drop_index(home)
    return built


def repoint(config: Config, digests: dict[str, str]) -> None:
    """Lets the pointer name the new indexes; only then may the old ones go."""
    lake = config.run.lake
    store = open_writer(settings(lake))
    with lease(store, "forget", config.lease_wait_s):
        spaces.reindex(store, Reader.open(lake), digests)


def log_result(result: Result) -> None:
    """What went and the proof, for a person. Raises Refused where the proof fails."""
    log.info("removed: %s vectors online, rows of the lake %s", result.online_removed, result.lake_removed or "none")
    log.info("proof: %s vectors online, files that name it: %s", result.left_online, result.left_in_lake or "none")
    if result.named_by_models:
        log.warning("trained before, so they list its id until the next training: %s", result.named_by_models)
    if result.left_online or result.left_in_lake:
        raise Refused(
            f"an item is still in {result.left_in_lake or 'the online store'}: is another job writing? Run forget again"
        )
