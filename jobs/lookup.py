"""The online store -> nothing: reads vectors back as a client would, and fails on any difference from the lake."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_repo import strangers
from feature_repo.reader import BATCH, Answer, Pointer, Reader, encode, settings
from feature_repo.stores import Store, lease, open_writer
from jobs.engines import online
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.run import InputError, Refused, Run, Unavailable

log = logging.getLogger(__name__)

SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is read back."""

    run: Run
    item: str | int = ""
    """An item whose vector is shown; empty takes the first."""
    sample: int = 0
    """Vectors compared, spread over the catalogue; 0 compares all."""
    url: str = ""
    """Reads through Feast's feature server, for example `http://localhost:6566`; empty reads the store itself."""
    space: str = ""
    """The space that this night published; empty asks nothing. See `sequence`."""
    sequence: int = 0
    """The write of the pointer that this night made (`publish`, `rollback` say it); 0 asks nothing. Where the store tells of an
    earlier write, or of this one with another space, it has lost what was published, as in a failover: refused."""
    max_age_days: float = 0.0
    """A space whose snapshot ended longer ago is refused; 0 allows any age."""
    lease_wait_s: float = 60.0
    """How long to wait for a writer who is at work, where the store holds a row too many."""

    @property
    def manifest(self) -> str:
        """Who asks for one item learns of that item: the night's own record stays as it was."""
        return "asked-lookup" if str(self.item) else "lookup"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a client sees."""

    space_id: str
    sequence: int
    """How many times the pointer was written."""
    recommender_id: str
    serves_ds: str
    age_days: float
    """Since the end of the snapshot that serves."""
    codec: str
    width: int
    compared: int
    """Vectors that were read and equal the lake's, byte by byte."""
    item: str
    vector: list[float]
    """The first numbers of the item's vector."""
    norm: float
    read_ms_p50: float
    """Median time of a read of up to 500 items, pointer included."""
    read_ms_p99: float
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Compares what is online with `item_embeddings` of the space that serves.

    Raises InputError where nothing serves, or the item is unknown or forgotten; Refused where a vector differs or is missing,
    the store lost what was published, or the space is too old.
    """
    lake, reader = config.run.lake, Reader.over_http(config.url) if config.url else Reader.open(config.run.lake)
    pointer = online.served(reader)
    refuse_lost(config, pointer)
    age_days = checked_age(config, pointer)
    partition = online.partition_of(pointer.space_id, pointer.ds)
    compared, milliseconds, first = compare(config, reader, partition, pointer.codec, pointer.items)
    refuse_surplus(config, reader, pointer, partition)
    item, commit = str(config.item) or first, partitions.read_commit(lake, "item_embeddings", partition)
    shown = reader.vectors([item])
    if not shown.item_ids:
        why = "was forgotten" if shown.deleted else "is not in the space that serves"
        raise InputError(f"lookup.item {item!r} {why}: take one of items/ds={pointer.ds}, for example {first!r}")
    result = Result(
        space_id=pointer.space_id,
        sequence=pointer.sequence,
        recommender_id=pointer.recommender_id,
        serves_ds=pointer.ds,
        age_days=age_days,
        codec=pointer.codec,
        width=pointer.width,
        compared=compared,
        item=item,
        vector=[round(float(value), 6) for value in shown.vector_ND[0, :SHOWN]],
        norm=round(float(np.linalg.norm(shown.vector_ND[0])), 6),
        read_ms_p50=round(float(np.percentile(milliseconds, 50)), 3),
        read_ms_p99=round(float(np.percentile(milliseconds, 99)), 3),
        inputs={"item_embeddings": commit.digest, "pointer": online.pointer_text(pointer)},
        outputs={},
        rows={},
    )
    log_result(result)
    return result


def log_result(result: Result) -> None:
    """What was compared and what the item's vector is like, for a person."""
    log.info("%s vectors of space %s (%s) equal the lake's", f"{result.compared:,}", result.space_id, result.serves_ds)
    log.info("%s: [%s, …] width %d", result.item, ", ".join(f"{value:.4f}" for value in result.vector), result.width)


def refuse_lost(config: Config, pointer: Pointer) -> None:
    """Raises Refused where the store has lost the write of the pointer that it is asked for; a later one is only told."""
    if not config.sequence:
        return
    other = bool(config.space) and config.space != pointer.space_id
    if pointer.sequence < config.sequence or (pointer.sequence == config.sequence and other):
        raise Refused(
            f"space {pointer.space_id} serves by write {pointer.sequence} of the pointer, but {config.space or 'another one'} "
            f"was published by write {config.sequence}: the store lost it. Did a replica take over? Run publish again, and see "
            "docs/security.md on LLMEMB_REPLICAS"
        )
    if other:
        log.warning("space %s serves by a later write than that of %s: somebody has moved on", pointer.space_id, config.space)


def checked_age(config: Config, pointer: Pointer) -> float:
    """Age of what serves, in days. Raises Refused where it is too old."""
    age_days: float = round(pointer.age.total_seconds() / 86_400, 2)
    if config.max_age_days and age_days > config.max_age_days:
        raise Refused(
            f"what serves is of {pointer.ds}, {age_days} days old, more than lookup.max_age_days = {config.max_age_days}"
        )
    return age_days


def compare(config: Config, reader: Reader, partition: str, codec: str, items: int) -> tuple[int, list[float], str]:
    """(vectors compared, milliseconds of each read, first item id). Raises Refused at the first difference."""
    step = max(1, items // config.sample) if config.sample else 1
    compared, seen, milliseconds, first = 0, 0, list[float](), ""
    for ids, emb_ND in online.chunks(config.run.lake, partition, BATCH):
        rows = range(-seen % step, len(ids), step)
        seen += len(ids)
        chosen = [ids[row] for row in rows]
        if chosen:
            started = time.monotonic()
            answer = reader.vectors(chosen)
            milliseconds.append((time.monotonic() - started) * 1000)
            check_answer(answer, chosen, encode(emb_ND[list(rows)], codec), partition)
            compared, first = compared + len(chosen), first or chosen[0]
    forgotten = len(tombstones(config.run.lake))
    if not config.sample and not items - forgotten <= compared <= items:
        raise Refused(f"the pointer promises {items:,} items, item_embeddings/{partition} has {compared:,}: publish again")
    return compared, milliseconds, first


def refuse_surplus(config: Config, reader: Reader, pointer: Pointer, partition: str) -> None:
    """Raises Refused where the space that serves has rows of items that the lake's partition lacks.

    Where all is compared and the store itself is read: a feature server lists nothing. Rows that a publishing has written and not
    yet pointed to are no fault, so it is looked again once no writer is at work.
    """
    if config.url or config.sample:
        return
    ids = (ids for ids, _ in online.chunks(config.run.lake, partition, BATCH))
    hash_N = np.sort(np.concatenate([np.fromiter(map(hash, some), np.int64, len(some)) for some in ids]))
    store = open_writer(settings(config.run.lake))
    if not surplus(store, pointer, hash_N):
        return
    with online.refusals(), lease(store, "lookup", config.lease_wait_s):
        if online.served(reader) != pointer:
            raise Unavailable("the pointer moved during the lookup: run it again")
        if found := surplus(store, pointer, hash_N):
            raise Refused(
                f"{len(found):,} items of space {pointer.space_id} are online and not in {partition}, for example {found[0]!r}: "
                "publish again"
            )


def surplus(store: Store, pointer: Pointer, hash_N: npt.NDArray[np.int64]) -> list[str]:
    """Items with a row in the space that serves which are not among the hashes."""
    return [item_id for ids in strangers.strangers(store, pointer.space_id, hash_N, all_keys=True) for item_id in ids]


def check_answer(answer: Answer, chosen: list[str], wanted: list[bytes], partition: str) -> None:
    """Raises Refused where an answer is not the lake's rows, each under its own id."""
    if online.partition_of(answer.pointer.space_id, answer.pointer.ds) != partition:
        raise Unavailable(f"the pointer moved to space {answer.pointer.space_id} during the lookup: run it again")
    if answer.missing or answer.deleted:
        absent = answer.missing + answer.deleted
        raise Refused(f"{len(absent)} items of {partition} are not online, for example {absent[0]!r}: publish again")
    written = encode(answer.vector_ND, answer.pointer.codec)
    wrong = [item_id for item_id, raw, want in zip(chosen, written, wanted, strict=True) if raw != want]
    if answer.item_ids != chosen or wrong:
        raise Refused(f"{len(wrong)} vectors of {partition} differ online, for example {(wrong or chosen)[0]!r}: publish again")
