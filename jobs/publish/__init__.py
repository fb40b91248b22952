"""`item_embeddings` of one space -> Feast's offline and online stores, verified; then the index; then the pointer."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from sqlalchemy.exc import OperationalError

from feature_repo import compatibility, feature_definitions, offline, spaces, strangers
from feature_repo.compatibility import Compatibility
from feature_repo.index import Graph
from feature_repo.reader import Pointer, Reader, Space, offline_folder, open_store, settings
from feature_repo.stores import alone, lease, open_writer
from jobs.engines import online, registry
from jobs.lake import arrivals, partitions
from jobs.lake.items import live_items, tombstones
from jobs.lake.tables import ITEMS, space_of
from jobs.publish import beside, undo
from jobs.run import InputError, Older, Refused, Run, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which space goes online, and how. Where the stores are say LLMEMB_ONLINE_STORE and LLMEMB_REGISTRY, or else the lake."""

    run: Run
    space: str = "champion"
    """`champion`, `latest`, `previous`, a recommender's id, or a space's id."""
    arriving: bool = False
    """Lays what arrived since the snapshot of ds over the space that serves it (`project.arriving`). Where another space or
    snapshot serves by now, a night was faster, and nothing is done."""
    restore: bool = False
    """Brings back the snapshot of ds, older than what serves, inside the space that serves: the way back from a bad delta, which
    `rollback` can't undo, as it overwrote its rows. The next night goes on from there."""
    codec: Literal["float32", "float16"] = "float32"
    """How vectors lie in the online store: a float32 array, or float16 bytes: half the size, faster, about 3 digits."""
    chunk_rows: int = 1_024
    """Items written or read at once: bounds memory and one transaction, for which Redis lets its readers wait."""
    approximate: bool = True
    """Builds the approximate index beside the exact one; it holds all vectors in memory while it is built."""
    graph: Graph = field(default_factory=Graph)
    offline: bool = True
    """Writes Feast's offline tables too: vectors, attributes and histories as they were at the end of ds."""
    attributes: bool = True
    """Writes `item_attributes` online, where they changed."""
    max_churn: float = 0.05
    """Inside the space that serves: more of the nearest neighbours changed in a group, though no text did, is refused."""
    max_churn_new_space: float = 1.0
    """The same for another space than the one that serves; 1 only reports it, as the gates of `promote` judge quality."""
    churn_items: int = 20_000
    """Items compared for churn, chosen by their ids: bounds memory."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""

    def __post_init__(self) -> None:
        if self.restore and self.arriving:
            raise InputError("publish.restore and publish.arriving exclude each other: restore a snapshot, the hour follows")

    @property
    def manifest(self) -> str:
        """What arrives between nights is no part of a night's record."""
        return "arriving-publish" if self.arriving else "publish"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What went online."""

    space_id: str
    encoder_id: str
    recommender_id: str
    previous_space_id: str
    sequence: int
    """How many times the pointer was written."""
    kind: Literal["new space", "delta", "nothing to do", "superseded"]
    codec: str
    width: int
    items: int
    written: int
    """Vectors written; the others were online as they are."""
    removed: int
    """Vectors removed: their items left the catalogue, or were left by a publishing that was killed."""
    verified: int
    """Vectors read back and compared, byte by byte."""
    attributes_written: int
    compatibility: str
    """With what served: `first`, `same space`, `aligned` (nearly equal as it is, see `rat.rotate_to`), `alignable` (it is the old
    space, turned) or `breaking`."""
    distance: float
    """|new - old| / |old| over vectors of items whose text did not change."""
    residual: float
    """What the best rotation of the new ones leaves of it."""
    churn: dict[str, float]
    """Share of the ten nearest neighbours that changed, by group, among items whose text did not."""
    recall_at_10: float
    """Of the approximate index, for up to 256 items as queries; 0 without one."""
    seconds: dict[str, float]
    """Of each step."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Puts a space online whole, verified, and lets it serve; or brings the changes of a night into the space that serves.

    Raises InputError for rows that must not be served, or a space that is not in the lake; Refused where what is read back
    differs or has no room, or the serving space has another width; Older where ds is older than what serves. The pointer stays.
    """
    lake, clock = config.run.lake, beside.Clock()
    forgotten = tombstones(lake)
    made_by = resolve(config)
    space_id = made_by["space_id"]
    partition = online.partition_of(space_id, config.run.ds)
    width = online.width_of(lake, partition)
    if config.arriving and not beside.serves(lake, space_id, config.run.ds):
        return superseded(config, made_by, width)
    hash_N = inspected(config, partition, width, forgotten)
    space = Space(space_id=space_id, recommender_id=made_by["recommender_id"], ds=config.run.ds, width=width,
                  codec=config.codec, items=len(hash_N))  # fmt: skip
    clock.lap("inspect", f"{space.items:,} vectors of width {width} are fit to serve")
    with online.refusals():
        register(lake, config.lease_wait_s)
        before = spaces.current(Reader.open(lake))
    if config.arriving and not beside.points_to(before, space_id, config.run.ds):  # a night was faster meanwhile
        return superseded(config, made_by, width)
    moved = check_compatibility(config, before, space)
    clock.lap("compare", f"{moved.kind}, residual {moved.residual} of {moved.distance}, neighbours moved {moved.churn or 'none'}")
    graph = config.graph if config.approximate else None
    index_digest = online.build_index(lake, space, graph, config.chunk_rows, arrived=config.arriving, forgotten=forgotten)
    space = dataclasses.replace(space, index=index_digest)
    found = beside.recall(lake, space, graph)
    clock.lap("index", f"recall@10 of the approximate index {found:.4f}" if config.approximate else "exact only")
    if config.offline and not config.arriving:
        beside.write_offline(lake, space, config.chunk_rows)
        clock.lap("offline", f"history up to {space.ds}")
    with online.refusals():
        figures = put_online(config, space, before, hash_N, forgotten, clock)
    digests = {
        "inputs": {"item_embeddings": partitions.read_commit(lake, "item_embeddings", partition).digest},
        "outputs": {"index": index_digest, "pointer": online.pointer_text(figures.after)},
    }
    return summed(space, made_by, moved, before, figures, found, clock, digests)


def superseded(config: Config, made_by: dict[str, str], width: int) -> Result:
    """The Result where a night has published since: what arrived is in it, or comes with the next hour."""
    log.info("space %s of %s serves no longer: nothing to lay over it", made_by["space_id"], config.run.ds)
    return Result(
        space_id=made_by["space_id"], encoder_id=made_by["encoder_id"], recommender_id=made_by["recommender_id"],
        previous_space_id="", sequence=0, kind="superseded", codec=config.codec, width=width, items=0, written=0, removed=0,
        verified=0, attributes_written=0, compatibility="same space", distance=0.0, residual=0.0, churn={}, recall_at_10=0.0,
        seconds={}, inputs={}, outputs={}, rows={},
    )  # fmt: skip


def summed(
    space: Space, made_by: dict[str, str], moved: Compatibility, before: Pointer | None, figures: Figures, found: float,
    clock: beside.Clock, digests: dict[str, dict[str, str]],
) -> Result:  # fmt: skip
    """The Result of a publish; `found` is the recall of the approximate index."""
    after = figures.after
    return Result(
        space_id=space.space_id,
        encoder_id=made_by["encoder_id"],
        recommender_id=made_by["recommender_id"],
        previous_space_id=after.previous.space_id if after.previous else "",
        sequence=after.sequence,
        kind=kind(before, after),
        codec=space.codec,
        width=space.width,
        items=space.items,
        written=figures.written,
        removed=figures.removed,
        verified=figures.verified,
        attributes_written=figures.attributes,
        compatibility=moved.kind,
        distance=moved.distance,
        residual=moved.residual,
        churn=moved.churn,
        recall_at_10=round(found, 4),
        seconds=clock.seconds,
        inputs=digests["inputs"] | {"encoder": made_by["encoder_id"], "recommender": made_by["recommender_id"]},
        outputs=digests["outputs"],
        rows={"item_embedding": figures.verified},
    )


def kind(before: Pointer | None, after: Pointer) -> Literal["new space", "delta", "nothing to do"]:
    """What a publish turned out to be."""
    if before is None or before.space_id != after.space_id:
        return "new space"
    return "delta" if before.sequence != after.sequence else "nothing to do"


def resolve(config: Config) -> dict[str, str]:
    """`space_id`, `encoder_id` and `recommender_id` of the space that the recipe asks for. Raises InputError."""
    lake = config.run.lake
    if partitions.committed(lake, "item_embeddings", f"space={config.space}"):
        return {"space_id": config.space, **online.recommender_of(lake, config.space)}
    chosen = registry.resolve(config.run, config.space)
    ids = {name: str(chosen[name]) for name in ("encoder_id", "recommender_id")}
    return {"space_id": space_of(ids["encoder_id"], ids["recommender_id"]), **ids}


def inspected(config: Config, partition: str, width: int, forgotten: frozenset[str]) -> npt.NDArray[np.int64]:
    """Hashes of the items to publish, every row checked, every item of the catalogue there. Raises InputError, Refused."""
    lake = config.run.lake
    try:
        hash_N = spaces.inspect(rows_of(config, partition, forgotten, checked=True), width, config.codec)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"item_embeddings/{partition}: {error}") from error
    snapshot = partitions.latest(lake, ITEMS.name, config.run.ds)
    absent, example = 0, ""
    for batch in live_items(lake, snapshot, ("item_id",)):
        lost = strangers.outside(batch["item_id"].to_pylist(), hash_N)
        absent, example = absent + len(lost), example or next(iter(lost), "")
    if absent:
        raise Refused(
            f"item_embeddings/{partition} lacks {absent:,} items of the catalogue items/{snapshot}, for example {example!r}: "
            f"run embed and project for {config.run.ds} first"
        )
    return hash_N


def rows_of(config: Config, partition: str, forgotten: frozenset[str], *, checked: bool = False) -> Iterator[spaces.Chunk]:
    """The rows to publish; a night's are without what arrived."""
    return online.chunks(
        config.run.lake, partition, config.chunk_rows, checked=checked, arrived=config.arriving, forgotten=forgotten
    )


def check_compatibility(config: Config, before: Pointer | None, space: Space) -> Compatibility:
    """The new rows against those that serve. Raises Refused for an older ds, or neighbours that changed without a reason."""
    if config.restore:
        return undo.allowed(config.run.lake, before, space, config.churn_items)
    if before is None:
        return Compatibility(kind="first", distance=0.0, residual=0.0, churn={}, items=0)
    if space.ds < before.ds:
        raise Older(
            f"ds {space.ds} is older than what serves ({before.ds}): `rollback` goes back to the space before, publish.restore "
            "to an earlier date of the same space"
        )
    same = before.space_id == space.space_id
    if same and space.width != before.width:
        raise Refused(
            f"space {space.space_id} serves vectors of width {before.width}, these are {space.width} wide: one space has one "
            "recommender and so one width; project again"
        )
    moved = compatibility.compare(*online.unchanged(config.run.lake, before, space, config.churn_items), same=same)
    key, most = ("max_churn", config.max_churn) if same else ("max_churn_new_space", config.max_churn_new_space)
    above = {group: share for group, share in moved.churn.items() if share > most}
    if above:
        raise Refused(
            f"of the nearest neighbours of items whose text did not change, too many changed: {above}, more than publish.{key} = "
            f"{most} ({moved.kind}, residual {moved.residual}); has the encoder's precision, machine or code changed? If it is "
            f"meant, run once with --set publish.{key}=1"
        )
    return moved


# ---------------------------------------------------------------------------------------------------------------- online


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was done to the online store."""

    after: Pointer
    written: int
    removed: int
    verified: int
    attributes: int


def put_online(
    config: Config,
    space: Space,
    before: Pointer | None,
    hash_N: npt.NDArray[np.int64],
    forgotten: frozenset[str],
    clock: beside.Clock,
) -> Figures:
    """Stages, verifies and flips, under the lease. Raises NotPublished, Refused."""
    lake = config.run.lake
    store, reader = open_writer(settings(lake)), Reader.open(lake)

    def rows() -> Iterator[spaces.Chunk]:
        return rows_of(config, online.partition_of(space.space_id, space.ds), forgotten)

    with lease(store, "publish", config.lease_wait_s):
        refuse_moved(lake, reader, before, forgotten)
        delta = before is not None and before.space_id == space.space_id
        beside.refuse_full(lake, store, reader, space)
        spaces.bury(store, sorted(forgotten), space.ds)
        serves = before if delta else None
        with undo.on_failure(lake, store, reader, serves, config.chunk_rows, arriving=config.arriving):
            written, kept = spaces.stage(store, reader, space, rows(), only_changes=delta)
            removed = strangers.remove_strangers(store, space.space_id, hash_N)
            clock.lap("stage", f"{written:,} vectors written, {kept:,} online already, {removed:,} removed")
            verified = spaces.verify(store, reader, space, rows(), hash_N)
        clock.lap("verify", f"{verified:,} vectors read back, all equal")
        attributes = 0
        if config.attributes:
            attributes = beside.write_attributes(lake, store, reader, space.ds, config.chunk_rows, arriving=config.arriving)
        clock.lap("attributes", f"{attributes:,} items written")
        if not config.arriving:
            arrivals.drop(lake, space.space_id, space.ds)
        after = spaces.flip(store, reader, space)
        clock.lap("flip", f"space {space.space_id} of {space.ds} serves")
    if config.offline and not config.arriving:
        with online.offline_home(lake) as home:
            offline.write_pointer(home, after)
    return Figures(after=after, written=written, removed=removed, verified=verified, attributes=attributes)


def refuse_moved(lake: Path, reader: Reader, before: Pointer | None, forgotten: frozenset[str]) -> None:
    """Raises Unavailable where another writer was faster, or a `forget`: a later one waits for the lease, and finds the rows."""
    if spaces.current(reader) != before:
        raise Unavailable("another writer moved the pointer since this publish began: look at what serves now, then run again")
    if tombstones(lake) != forgotten:
        raise Unavailable("items were forgotten since this publish began: run again")


def register(lake: Path, wait_s: float = 60.0) -> None:
    """Makes Feast's registry and tables as the definitions say. Raises Held; ConnectionError where the registry stays locked."""
    for last in (False, False, True):
        try:
            with alone(settings(lake), "publish", wait_s):
                open_store(lake).apply(list(feature_definitions.define(offline_folder(lake))))
            return
        except OperationalError as error:
            if last:
                raise ConnectionError(
                    f"Feast's registry can't be written ({error.orig}): is it locked or down? What serves is untouched; run again"
                ) from error
            time.sleep(1)
