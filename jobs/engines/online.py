"""The lake's side of serving: rows of a space in chunks, its index, and refusals in the jobs' words."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import index
from feature_repo.compatibility import Matrix
from feature_repo.index import Described, Graph, Index
from feature_repo.reader import NothingServed, Pointer, Reader, Space, offline_folder
from feature_repo.spaces import Chunk
from feature_repo.stores import BROKEN, Fenced, Held, NotPublished, Unreplicated, locked_out
from jobs.lake import arrivals, artifacts, manifests, partitions, tables
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.items import tombstones, without_forgotten
from jobs.lake.store import Store
from jobs.lake.tables import ITEMS, SEQUENCES, Table, item_embeddings, space_of
from jobs.run import InputError, Refused, Unavailable

INDEX = "_index.json"
Forgotten = frozenset[str] | None
RECENT_DAYS = 30
"""Days before the last event whose events count towards what is popular."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the feature repository refuses is a refusal of the job; a store that fails is told in a line, and may be retried."""
    try:
        yield
    except (Held, Fenced, Unreplicated) as error:  # another writer is at it: what this one began, a later run may end
        raise Unavailable(str(error)) from error
    except NotPublished as error:
        raise Refused(str(error)) from error
    except BROKEN as error:
        if locked_out(error):
            raise InputError(
                f"the online store let nobody in ({type(error).__name__}: {error}): check its user and password in "
                "LLMEMB_ONLINE_STORE"
            ) from error
        stays = "A new space serves only once it is whole; what was written into the one that serves stays there"
        raise Unavailable(f"{broken(error)} {stays}") from error


def broken(error: Exception) -> str:
    """What is said of a store that failed."""
    return (
        f"the online store failed ({type(error).__name__}: {error}): is it down, slow, full or locked? Run again once it is well."
    )


def served(reader: Reader) -> Pointer:
    """What serves. Raises InputError before the first publish, ConnectionError where the store fails."""
    try:
        with refusals():
            return reader.pointer()
    except NothingServed as error:
        raise InputError(str(error)) from error


def partition_of(space_id: str, ds: str) -> str:
    """The partition of `item_embeddings` that a space serves."""
    return f"space={space_id}/ds={ds}"


def width_of(lake: Path, partition: str) -> int:
    """Width of a partition's vectors. Raises InputError where it is absent, or is no table of vectors."""
    kind = partitions.read_schema(lake, "item_embeddings", partition).field("embedding").type
    if not pa.types.is_fixed_size_list(kind):
        raise InputError(f"item_embeddings/{partition}: embedding is {kind}, not a list of fixed size: run project again")
    return int(kind.list_size)


def chunks(
    lake: Path, partition: str, rows: int, *, checked: bool = False, arrived: bool = True, forgotten: Forgotten = None
) -> Iterator[Chunk]:
    """(item ids, vector_ND) of a partition of `item_embeddings`, at most `rows` at once, without forgotten items.

    What arrived since that snapshot is laid over it, unless it is `arrived` = False. Who reads the rows several times gives the
    `forgotten` of the first time, or the next could be others.

    With `checked`, raises InputError where a row breaks the table's contract or belongs to another space.
    """
    table = item_embeddings(width_of(lake, partition))
    base = partitions.scan(lake, table, partition, ("item_id", "embedding") if not checked else None, rows)
    over = arrivals.item_embeddings(width_of(lake, partition))
    batches = arrivals.laid_over(lake, table, over, partition, base) if arrived else base
    for batch in without_forgotten(lake, watched(table, batches, partition) if checked else batches, forgotten):
        flat = batch["embedding"].flatten().to_numpy(zero_copy_only=False)
        if batch.num_rows:
            yield batch["item_id"].to_pylist(), flat.reshape(batch.num_rows, -1)


def watched(table: Table, batches: Iterator[pa.RecordBatch], partition: str) -> Iterator[pa.RecordBatch]:
    """The same batches, each held against the contract first."""
    for batch in batches:
        check_batch(table, batch, partition)
        yield batch


def check_batch(table: Table, batch: pa.RecordBatch, partition: str) -> None:
    """Raises InputError where rows break their contract, or another space's rows stand among them."""
    where = f"item_embeddings/{partition}"
    rows = tables.check(table, pa.Table.from_batches([batch]), where)
    space_id = partition.split("/")[0].removeprefix("space=")
    strange = pc.filter(rows["space_id"], pc.not_equal(rows["space_id"], space_id))
    if len(strange):
        raise InputError(f"{where} has {len(strange)} rows of space {strange[0].as_py()}: run project again")


def unchanged(lake: Path, before: Space, after: Space, most: int) -> tuple[Matrix, Matrix, list[str]]:
    """(old_ND, new_ND, group of each) of at most about `most` items, chosen by their ids, whose text is the same in both.

    Nothing where the lake no longer holds the snapshot that serves.
    """
    old, new = (partition_of(space.space_id, space.ds) for space in (before, after))
    if not partitions.is_committed(lake, "item_embeddings", old):
        return np.empty((0, before.width), np.float32), np.empty((0, after.width), np.float32), []
    share = min(1.0, most / max(1, after.items))
    known = {row["item_id"]: row for row in chosen_rows(lake, old, share)}
    pairs = [(known[row["item_id"]], row) for row in chosen_rows(lake, new, share) if row["item_id"] in known]
    pairs = [(was, now) for was, now in pairs if was["content_hash"] == now["content_hash"]]
    old_ND, new_ND = (np.array([pair[side]["embedding"] for pair in pairs], np.float32) for side in (0, 1))
    return old_ND, new_ND, [now["group"] for _, now in pairs]


def chosen_rows(lake: Path, partition: str, share: float) -> Iterator[dict[str, Any]]:
    """Rows of a share of the items, the same items in every partition."""
    table = item_embeddings(width_of(lake, partition))
    for batch in partitions.scan(lake, table, partition, ("item_id", "embedding", "content_hash", "group")):
        hashes = (zlib.crc32(item_id.encode()) for item_id in batch["item_id"].to_pylist())
        yield from batch.filter(pa.array([number < share * 2**32 for number in hashes], pa.bool_())).to_pylist()


# ----------------------------------------------------------------------------------------------------------------- index


def index_home(lake: Path, space: Space) -> Path:
    """Folder of a space's index."""
    return lake / "indexes" / f"space={space.space_id}" / f"ds={space.ds}"


def build_index(
    lake: Path, space: Space, graph: Graph | None, rows: int, *, arrived: bool = True, forgotten: Forgotten = None
) -> str:
    """Builds the index of a space from the lake and swaps it in at once; returns the digest of its files.

    An index of the same rows, vectors, attributes, counts and parameters that is there already is kept. The one before stays
    for hosts that serve from it: `prune_index` or `collect` removes it.
    """
    home, partition = index_home(lake, space), partition_of(space.space_id, space.ds)
    over = arrivals.digest(lake, arrivals.VECTORS, partition) if arrived else ""
    forgotten = tombstones(lake) if forgotten is None else forgotten
    # counted, not taken from the pointer: that knows nothing of items forgotten since
    items = sum(len(ids) for ids, _ in chunks(lake, partition, rows, arrived=arrived, forgotten=forgotten))
    snapshot = partitions.latest(lake, ITEMS.name, space.ds)
    made_of = sources(lake, space, snapshot, over) | {"items": items, "graph": dataclasses.asdict(graph) if graph else None}
    now = partitions.read_json(lake, home / INDEX) or {}
    if now.get("made_of") != made_of or not artifacts.has_folder(lake, home / now["folder"]):
        staged = home / f".staged-{uuid.uuid4().hex[:8]}"
        staged.mkdir(parents=True)
        given = chunks(lake, partition, rows, arrived=arrived, forgotten=forgotten)
        vectors = ((list(ids), emb_ND) for ids, emb_ND in given)
        known = described(lake, snapshot, space.ds, arrived=bool(over))
        about = {"space_id": space.space_id, "recommender_id": space.recommender_id, "ds": space.ds}
        index.build(staged, vectors, items, space.width, graph, known, about)
        digest = artifacts.keep_folder(lake, staged, home)
        now = {"made_of": made_of, "folder": digest[:16], "digest": digest}
        partitions.publish_json(lake, home / INDEX, now)
    return str(now["digest"])


def sources(lake: Path, space: Space, snapshot: str, over: str) -> dict[str, object]:
    """What an index is made of, beside its parameters; `over` is the digest of the vectors that arrived."""
    vectors = partitions.read_commit(lake, "item_embeddings", partition_of(space.space_id, space.ds)).digest
    attributes = partitions.read_commit(lake, ITEMS.name, snapshot).digest
    found: dict[str, object] = {
        "format": index.FORMAT,
        "item_embeddings": vectors + over,
        "attributes": attributes + (arrivals.digest(lake, ARRIVING_ITEMS.name, snapshot) if over else ""),
        "recent": events_digest(lake, space.ds),
    }
    lists = lists_of(lake, snapshot)
    return found | {"lists": lists} if lists else found


def prune_index(home: Path, older_s: float = 0.0) -> None:
    """Removes indexes of a snapshot that another one took the place of, at least so many seconds ago."""
    if not (home / INDEX).exists() or time.time() - (home / INDEX).stat().st_mtime < older_s:
        return
    folder = json.loads((home / INDEX).read_text())["folder"]
    for other in home.iterdir():
        if other.is_dir() and other.name != folder:
            shutil.rmtree(other, ignore_errors=True)


def events_digest(lake: Path, ds: str) -> str:
    """What the counts of recent events are made of; empty where the lake has no sequences up to then."""
    try:
        return partitions.read_commit(lake, SEQUENCES.name, partitions.latest(lake, SEQUENCES.name, ds)).digest
    except InputError:
        return ""


def described(lake: Path, snapshot: str, ds: str, *, arrived: bool = False) -> Described:
    """Attributes of a snapshot's items, and how often each stands among the last events of the lake's users."""
    rows = partitions.scan(lake, ITEMS, snapshot, ("item_id", "attributes"))
    if arrived:
        rows = arrivals.laid_over(lake, ITEMS, ARRIVING_ITEMS, snapshot, rows)
    parts = [batch.select(["item_id", "attributes"]) for batch in rows]
    items = pa.Table.from_batches(parts).combine_chunks() if parts else pa.table({"item_id": [], "attributes": []})
    item_ids = pa.array([], pa.string()) if not parts else items["item_id"].chunk(0)
    counts = recent_events(lake, ds)
    recent = pa.array([counts.get(item_id, 0) for item_id in item_ids.to_pylist()], pa.int64())
    attributes = items["attributes"].chunk(0).cast(index.PAIRS) if parts else pa.array([], index.PAIRS)
    return Described(item_ids=item_ids, attributes=attributes, recent=recent, lists=lists_of(lake, snapshot))


def lists_of(lake: Path, snapshot: str) -> dict[str, str]:
    """Attributes of a snapshot that hold several values, and what parts them: as the `extract` of its date says."""
    told = manifests.of_date(lake, snapshot.removeprefix("ds="), "extract").get("result") or {}
    return dict(told.get("lists") or {})


def recent_events(lake: Path, ds: str) -> Counter[str]:
    """Events an item in the last days of the lake's histories: what people take of late. Empty where there are none."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(InputError):
        partition = partitions.latest(lake, SEQUENCES.name, ds)
        last = max((pc.max(batch["timestamps"].flatten()).as_py() or 0 for batch in events(lake, partition)), default=0)
        for batch in events(lake, partition):
            late = pc.greater(batch["timestamps"].flatten(), last - RECENT_DAYS * 86_400)
            for pair in pc.value_counts(batch["item_ids"].flatten().filter(late)).to_pylist():
                counts[pair["values"]] += pair["counts"]
    return counts


def events(lake: Path, partition: str) -> Iterator[pa.RecordBatch]:
    """Items and times of all histories, without their users."""
    yield from partitions.scan(lake, SEQUENCES, partition, ("item_ids", "timestamps"))


def drop_index(home: Path) -> None:
    """Removes an index: first the file that names it, so that no reader opens half of one."""
    (home / INDEX).unlink(missing_ok=True)
    shutil.rmtree(home, ignore_errors=True)


def open_index(lake: Path, space: Space) -> Index:
    """The index of a space. Raises InputError where there is none."""
    home = index_home(lake, space)
    for _ in range(2):  # an index swapped between the two reads is found at the second try
        now = partitions.read_json(lake, home / INDEX)
        with contextlib.suppress(FileNotFoundError):
            if now and artifacts.has_folder(lake, home / now["folder"]):
                return Index(home / now["folder"])
    raise InputError(f"space {space.space_id} has no index for {space.ds} in {home}: run `python -m jobs publish` for it")


# --------------------------------------------------------------------------------------------------------------- offline


@contextlib.contextmanager
def offline_home(lake: Path) -> Iterator[Path]:
    """The folder of Feast's offline tables; where they are on an object store, what is written into it is put there after."""
    there = offline_folder(lake)
    if "://" not in there:
        yield Path(there)
        return
    with tempfile.TemporaryDirectory() as aside:
        yield Path(aside)
        files = [(file.relative_to(aside).as_posix(), file) for file in sorted(Path(aside).rglob("*")) if file.is_file()]
        Store(there).put_files(files)


# ----------------------------------------------------------------------------------------------------------- recommender


def recommender_of(lake: Path, space_id: str) -> dict[str, str]:
    """Ids of the encoder and recommender that make a space, from the artifacts of the lake; empty texts where not found."""
    for recommender_id, known in artifacts.described(lake, "recommender"):
        encoder_id = str(known.get("encoder_id", ""))
        if space_of(encoder_id, recommender_id) == space_id:
            return {"encoder_id": encoder_id, "recommender_id": recommender_id}
    return {"encoder_id": "", "recommender_id": ""}


def sample_ids(lake: Path, space: Space, count: int) -> list[str]:
    """About `count` ids, at most twice as many, spread over a space's partition; none where the lake does not hold it.

    What arrived between nights is left out: it may never have been published.
    """
    step, found, seen = max(1, space.items // count), list[str](), 0
    with contextlib.suppress(InputError):
        for ids, _ in chunks(lake, partition_of(space.space_id, space.ds), 4_096, arrived=False):
            found += ids[-seen % step :: step]
            seen += len(ids)
    return found


def pointer_text(pointer: Pointer) -> str:
    """The pointer in a word, for manifests."""
    return f"{pointer.space_id}@{pointer.ds}#{pointer.sequence}"
