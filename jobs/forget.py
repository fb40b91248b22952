"""An item -> removed from lake, every space, index and offline history; it stays forgotten, and the proof is printed."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_repo import offline, spaces
from feature_repo.index import Graph
from feature_repo.reader import Reader, offline_folder, settings
from feature_repo.stores import lease, open_writer
from jobs.engines import online
from jobs.lake import arrivals, partitions
from jobs.lake.items import bury
from jobs.run import InputError, Refused, Run

log = logging.getLogger(__name__)

TABLES = ("items", "interactions", "sequences", "quarantine", "llm_embeddings", "item_embeddings", *arrivals.TABLES)
ECHOES = ("lookup", "recommend", "explain")
"""Jobs whose manifests repeat items as their answer."""
BATCH_ROWS = 65_536


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is forgotten."""

    run: Run
    item: str | int
    """The item's id."""
    approximate: bool = True
    """As in `publish`: indexes of live spaces are built anew without the item."""
    graph: Graph = field(default_factory=Graph)
    """As in `publish`."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""


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
    """Answers of `lookup`, `recommend` and `explain` that named it."""
    left_online: int
    """Vectors still found afterwards: 0."""
    left_in_lake: list[str]
    """Tables, indexes and history that still name it: none."""
    named_by_models: list[str]
    """Trained models list the ids they were trained on; a model is its bytes, so only the next training drops the name."""
    inputs: dict[str, str]
    """Digests of the partitions before."""
    outputs: dict[str, str]
    """Digests of the partitions after."""
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Tombstone first, then the stores, the lake, history and indexes; run again after a kill, it finishes.

    Raises InputError for an empty id; Refused where something of the item is still found, or another writer is at work.
    """
    item, lake = str(config.item), config.run.lake
    if not item:
        raise InputError("forget.item is empty: give an item's id, for example --set forget.item=1193")
    bury(lake, item, config.run.ds)
    with online.refusals():
        emptied = forget_online(config, item)
    removed, inputs, outputs = forget_tables(lake, item)
    if gone := offline.forget(Path(offline_folder(lake)), item):
        removed["feast_offline"] = gone
    drop_leftovers(lake, item)
    echoes = forget_answers(lake, item)
    indexes = forget_indexes(config)
    left_online, left = still_online(config, item), sorted(mentions(lake, item))
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
    tell(result)
    if result.left_online or result.left_in_lake:
        raise Refused(
            f"the item is still in {result.left_in_lake or 'the online store'}: is another job writing? Run forget again"
        )
    return result


# ---------------------------------------------------------------------------------------------------------------- online


def forget_tables(lake: Path, item: str) -> tuple[dict[str, int], dict[str, str], dict[str, str]]:
    """(rows removed by table, digests of the partitions before, and after)."""
    removed, inputs, outputs = dict[str, int](), dict[str, str](), dict[str, str]()
    for name in TABLES:
        for partition in partitions.committed(lake, name):
            before = partitions.read_commit(lake, name, partition)
            if gone := forget_partition(lake, name, partition, item):
                removed[name] = removed.get(name, 0) + gone
                inputs[f"{name}/{partition}"] = before.digest
                outputs[f"{name}/{partition}"] = partitions.read_commit(lake, name, partition).digest
    return removed, inputs, outputs


def forget_online(config: Config, item: str) -> int:
    """Removes the item's rows from every space; returns how many vectors went, 0 where nothing was ever published."""
    lake = config.run.lake
    if spaces.current(Reader.open(lake)) is None:
        return 0
    store = open_writer(settings(lake))
    with lease(store, "forget", config.lease_wait_s):
        # first the processes that serve from memory: they leave it out within a second
        spaces.withhold(store, Reader.open(lake), item)
        return spaces.forget(store, item, config.run.ds)


def still_online(config: Config, item: str) -> int:
    """Vectors of the item in any space."""
    lake = config.run.lake
    return 0 if spaces.current(Reader.open(lake)) is None else spaces.vectors_of(open_writer(settings(lake)), item)


def forget_indexes(config: Config) -> int:
    """Builds the indexes of live spaces without the item, and removes those of other snapshots; returns how many were built."""
    lake, built = config.run.lake, 0
    pointer = spaces.current(Reader.open(lake))
    digests = {}
    for space in spaces.live(pointer).values() if pointer else ():
        if online.index_home(lake, space).is_dir():
            digests[space.space_id] = online.build_index(lake, space, config.graph if config.approximate else None, 4_096)
            built += 1
    if pointer:
        with online.refusals():
            repoint(config, digests)
    for space in spaces.live(pointer).values() if pointer else ():
        online.prune_index(online.index_home(lake, space))
    live = {online.index_home(lake, space) for space in spaces.live(pointer).values()} if pointer else set()
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


# ------------------------------------------------------------------------------------------------------------------ lake


def forget_partition(lake: Path, name: str, partition: str, item: str) -> int:
    """Rewrites a partition without the item, at once, file by file; returns how many rows changed or went."""
    here, staged, changed = partitions.folder(lake, name, partition), [], 0
    for file in partitions.read_commit(lake, name, partition).files:
        rows = sum(pc.sum(named(batch, item)).as_py() or 0 for batch in batches(here / file))
        changed += rows
        staged.append(rewritten(here / file, item) if rows else here / file)
    if changed:
        partitions.commit_files(lake, name, partition, staged)
    return changed


def drop_leftovers(lake: Path, item: str) -> None:
    """Deletes Parquet files that name the item and are no part of a table: what writers that were killed left behind."""
    for path in sorted(lake.rglob("*.parquet")):
        commit = path.parent / partitions.COMMIT
        live = {entry["name"] for entry in json.loads(commit.read_text())["files"]} if commit.exists() else set()
        if path.name not in live and any(pc.any(named(batch, item)).as_py() for batch in batches(path)):
            path.unlink()


def rewritten(path: Path, item: str) -> Path:
    """A copy of a Parquet file beside it, without the item."""
    aside = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.parquet")
    with pq.ParquetWriter(aside, pq.read_schema(path), compression="zstd") as writer:
        for batch in batches(path):
            writer.write_table(without(pa.Table.from_batches([batch]), item))
    return aside


def batches(path: Path) -> Iterator[pa.RecordBatch]:
    """A Parquet file in bounded batches."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=BATCH_ROWS)


def named(batch: pa.RecordBatch, item: str) -> pa.Array:
    """Which rows name the item: in `item_id`, in the list `item_ids`, or as a value of the raw `record` in quarantine."""
    names = batch.schema.names
    if "item_id" in names:
        return pc.equal(batch["item_id"], item)
    if "item_ids" in names:
        return pa.array([item in ids for ids in batch["item_ids"].to_pylist()], pa.bool_())
    if "record" in names:
        may = pc.match_substring(batch["record"], json.dumps(item, ensure_ascii=False)[1:-1]).to_pylist()
        texts = batch["record"].to_pylist()
        return pa.array([hit and item in values(text) for hit, text in zip(may, texts, strict=True)], pa.bool_())
    return pa.array([False] * batch.num_rows, pa.bool_())


def values(text: str) -> set[str]:
    """All values of a JSON text, as texts."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return set()
    stack, seen = [found], set()
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list):
            stack += list(value.values() if isinstance(value, dict) else value)
        else:
            seen.add(str(value))
    return seen


def without(rows: pa.Table, item: str) -> pa.Table:
    """Rows without the item: whole rows go, but a user's history only loses its events."""
    if "item_ids" not in rows.schema.names:
        return (
            pa.concat_tables(pa.Table.from_batches([batch]).filter(pc.invert(named(batch, item))) for batch in rows.to_batches())
            if rows.num_rows
            else rows
        )
    histories = [shorter(row, item) for row in rows.to_pylist()]
    return pa.Table.from_pylist([row for row in histories if row["item_ids"]], rows.schema)


def shorter(row: dict[str, Any], item: str) -> dict[str, Any]:
    """A row of `sequences` without an item's events; the split falls between the same events as before."""
    kept = [number for number, item_id in enumerate(row["item_ids"]) if item_id != item]
    return row | {
        "item_ids": [row["item_ids"][number] for number in kept],
        "timestamps": [row["timestamps"][number] for number in kept],
        "train_end": sum(number < row["train_end"] for number in kept),
        "valid_end": sum(number < row["valid_end"] for number in kept),
    }


def forget_answers(lake: Path, item: str) -> int:
    """Removes what was said of the item: manifests of serving jobs whose answer named it, and reports; returns how many."""
    found = [
        path for job in ECHOES for path in (lake / "manifests").glob(f"ds=*/{job}.*json") if item in values(path.read_text())
    ]
    found += [page for page in (lake / "reports").glob("ds=*/*.html") if item in shown(page.read_text())]
    for path in found:
        path.unlink()
    return len(found)


def shown(page: str) -> set[str]:
    """The ids of the items that a report names: it lists them for its own script."""
    listed = re.search(r'(?s)id="titles">(.*?)</script>', page)
    return set(json.loads(listed[1])["named"]) if listed else set()


# ----------------------------------------------------------------------------------------------------------------- proof


def mentions(lake: Path, item: str) -> Iterator[str]:
    """Files of the lake that still name the item, read whole: tables, indexes, offline history, artifacts.

    Left out: its tombstone, and manifests, which are the record of what was done.
    """
    for path in sorted(lake.rglob("*")):
        name = path.relative_to(lake).as_posix()
        if name.startswith(("tombstones/", "manifests/", "feast/offline/item_tombstone/")) or not path.is_file():
            continue
        if path.suffix == ".parquet" and any(pc.any(named(batch, item)).as_py() for batch in batches(path)):
            yield name
        if path.suffix == ".arrow" and item in pa.ipc.open_file(path).read_all()["item_id"].to_pylist():
            yield name
        if path.suffix == ".html" and item in shown(path.read_text()):
            yield name
        if path.suffix == ".json" and not name.endswith(partitions.COMMIT) and item in values(path.read_text()):
            yield name


def tell(result: Result) -> None:
    """What went and the proof, for a person."""
    log.info("removed: %s vectors online, rows of the lake %s", result.online_removed, result.lake_removed or "none")
    log.info("proof: %s vectors online, files that name it: %s", result.left_online, result.left_in_lake or "none")
    if result.named_by_models:
        log.warning("trained before, so they list its id until the next training: %s", result.named_by_models)
