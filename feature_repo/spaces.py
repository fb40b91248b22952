"""How a space reaches serving and leaves it: staged, verified by reading it back, pointed to, collected; items forgotten.

Nothing here depends on how vectors were made: rows come in chunks of (item ids, vector_ND). Every step may be killed at any
instant and run again. Shapes: N rows of a chunk, D width.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from feast.protos.feast.types.Value_pb2 import StringList, Value

from feature_repo import feature_definitions as views
from feature_repo.keys import serialized
from feature_repo.leases import SCAN, NotPublished, Store
from feature_repo.reader import CODECS, NothingServed, Pointer, Reader, Space, encode, end_of
from feature_repo.strangers import DELETES, batched, delete_codes, remove_items, strangers
from feature_repo.transport import entity_keys

Chunk = tuple[Sequence[str], npt.NDArray[np.float32]]
Chunks = Callable[[], Iterable[Chunk]]
"""Gives the rows of a space, from the start at every call: (item ids, vector_ND) in bounded chunks."""


class Unverified(NotPublished):
    """What was read back is not what was written."""


# ---------------------------------------------------------------------------------------------------------------- staging


def inspect(chunks: Iterable[Chunk], width: int, codec: str) -> npt.NDArray[np.int64]:
    """Checks every row of a space before anything is written; returns one hash an item, 8 bytes, for set questions.

    Raises ValueError for an empty space, another width, values that are not finite in the codec, zero rows, ids that stand
    twice or have no text, each with an example.
    """
    hashes = []
    for ids, vector_ND in chunks:
        if vector_ND.ndim != 2 or vector_ND.shape != (len(ids), width):
            raise ValueError(f"vectors of shape {vector_ND.shape} for {len(ids)} items: the space is {width} wide")
        with np.errstate(over="ignore"):
            stored_ND = vector_ND.astype(CODECS[codec][1])
        for wrong_N, what in (
            (~np.isfinite(stored_ND).all(axis=1), f"a value that is not finite as {codec}"),
            (~stored_ND.any(axis=1), f"nothing but zeros as {codec}"),
        ):
            if wrong_N.any():
                raise ValueError(
                    f"{wrong_N.sum():,} items have {what}, for example {ids[int(wrong_N.argmax())]!r}: project again"
                )
        if not all(ids):
            raise ValueError("an item id is empty: extract again")
        hashes.append(np.fromiter(map(hash, ids), np.int64, len(ids)))
    hash_N = np.concatenate(hashes) if hashes else np.empty(0, np.int64)
    hashes.clear()
    hash_N.sort()
    if not len(hash_N):
        raise ValueError("the space has no items: run project first")
    if (hash_N[1:] == hash_N[:-1]).any():
        raise ValueError(f"{(hash_N[1:] == hash_N[:-1]).sum():,} item ids stand more than once in the space: project again")
    return hash_N


def stage(store: Store, reader: Reader, space: Space, chunks: Iterable[Chunk], *, only_changes: bool) -> tuple[int, int]:
    """Writes the rows of a space; returns (written, left as they were).

    With `only_changes` each chunk is read first and equal rows are left alone: a nightly delta, which also mends rows that
    were damaged. Raises Fenced when the lease is lost.
    """
    written = kept = 0
    store.note(space.space_id, None)
    for ids, vector_ND in chunks:
        raws = encode(vector_ND, space.codec)
        if only_changes:
            before = [raw for _, raw in reader.rows(space, ids)]
            changed = [number for number, raw in enumerate(raws) if raw != before[number]]
            kept += len(ids) - len(changed)
            ids, raws = [ids[number] for number in changed], [raws[number] for number in changed]
        if ids:
            store.write(views.item_embedding, embedding_rows(space, ids, raws))
        else:
            store.renew()
        written += len(ids)
    return written, kept


def embedding_rows(space: Space, ids: Sequence[str], raws: Sequence[bytes]) -> list[Any]:
    """Feast's rows of `item_embedding`. Their event timestamp is the end of the snapshot: a rerun writes the same bytes."""
    field = CODECS[space.codec][0]
    keys = entity_keys({"item_id": ids, "space_id": [space.space_id] * len(ids)})
    moment = end_of(space.ds)
    if space.codec == "float16":
        values = [Value(bytes_val=raw) for raw in raws]
    else:
        # a float list's message is a head and the numbers as they lie in memory: twenty times faster than appending floats
        blank = Value()
        blank.float_list_val.val.extend([0.0] * space.width)
        head = blank.SerializeToString()[: -4 * space.width]
        values = [Value.FromString(head + raw) for raw in raws]
    return [(key, {field: value}, moment, None) for key, value in zip(keys, values, strict=True)]


def verify(store: Store, reader: Reader, space: Space, chunks: Iterable[Chunk], hash_N: npt.NDArray[np.int64]) -> int:
    """Reads every row back as a client would and compares its bytes; returns how many.

    Rows that the space should not have count too; `hash_N` are the hashes of its items, from `inspect`. Raises Unverified with
    the count and an example, Fenced when the lease is lost.
    """
    count, wrong, example = 0, 0, ""
    for ids, vector_ND in chunks:
        store.renew()
        raws = encode(vector_ND, space.codec)
        for item_id, raw, (_, online) in zip(ids, raws, reader.rows(space, ids), strict=True):
            if raw != online:
                wrong, example = wrong + 1, example or f"{item_id!r} is {'absent' if online is None else 'different'}"
        count += len(ids)
    if surplus := [item_id for ids in strangers(store, space.space_id, hash_N) for item_id in ids]:
        raise Unverified(
            f"space {space.space_id}: {len(surplus):,} rows of items that it should not have, for example {surplus[0]!r}. Does "
            "another program write to the store? Run again"
        )
    if wrong or count != space.items:
        raise Unverified(
            f"space {space.space_id}: {wrong:,} of {count:,} vectors read back differ from those written ({example}), "
            f"{space.items:,} expected. Is the store full, evicting, or written by others? Run again"
        )
    return count


# ---------------------------------------------------------------------------------------------------------------- pointer


def current(reader: Reader) -> Pointer | None:
    """What serves, if anything does."""
    try:
        return reader.pointer()
    except NothingServed:
        return None


def flip(store: Store, reader: Reader, space: Space) -> Pointer:
    """Lets a verified space serve: one write. Serving it already as it is, nothing is written. Raises Fenced, Unreplicated."""
    now = current(reader)
    if now is not None and now.space == space:
        store.settle()  # the run that wrote it may have died before replicas had it
        return now
    same = now is not None and now.space_id == space.space_id
    previous = None if now is None else now.previous if same else now.space
    return point(store, reader, space, previous, now)


def point(
    store: Store, reader: Reader, space: Space, previous: Space | None, now: Pointer | None, withheld: Sequence[str] = ()
) -> Pointer:
    """Writes the pointer, reads it back, and waits for replicas.

    Its timestamp always moves on, also when the snapshot's date does not. Raises Fenced; Unreplicated where it serves by now, but
    a failover could undo it.
    """
    moment = end_of(space.ds)
    if now is not None:
        moment = max(moment, now.written + dt.timedelta(seconds=1))
    values = {
        "space_id": Value(string_val=space.space_id),
        "recommender_id": Value(string_val=space.recommender_id),
        "ds": Value(string_val=space.ds),
        "width": Value(int64_val=space.width),
        "codec": Value(string_val=space.codec),
        "items": Value(int64_val=space.items),
        "sequence": Value(int64_val=now.sequence + 1 if now else 1),
        "previous": Value(string_val=json.dumps(dataclasses.asdict(previous), sort_keys=True) if previous else ""),
        "index": Value(string_val=space.index),
        "withheld": Value(string_val=json.dumps(sorted(withheld))),
    }
    store.write(views.serving_pointer, [(entity_keys({"catalogue": [views.CATALOGUE]})[0], values, moment, None)])
    after = reader.pointer()
    if after.space != space:
        raise Unverified(
            f"the pointer names space {after.space_id} after {space.space_id} was written: another writer is at work"
        )
    store.settle()
    return after


def rollback(store: Store, reader: Reader, sample: Sequence[str] = ()) -> Pointer:
    """Lets the space before serve again: one write. A second rollback undoes the first.

    Raises NotPublished where there is no space before, or it lacks items of the `sample`, all of which it had.
    """
    now = reader.pointer()
    if now.previous is None:
        raise NotPublished(f"space {now.space_id} is the first that was published: there is none to go back to")
    rows = reader.rows(now.previous, sample)
    absent = [item_id for item_id, (_, raw) in zip(sample, rows, strict=True) if raw is None]
    if lost := sorted(set(absent) - reader.forgotten(absent)):
        raise NotPublished(
            f"space {now.previous.space_id} is no longer whole in the store: of {len(sample):,} of its items {len(lost):,} are "
            f"absent, for example {lost[0]!r}; publish it again"
        )
    return point(store, reader, now.previous, now.space, now)


def withhold(store: Store, reader: Reader, item_id: str) -> Pointer:
    """Tells every process that serves from an index to leave an item out, before that index is built anew: one write.

    An item without a row in any space is in no index either, or withheld already: run again after its end, nothing is written.
    """
    now = reader.pointer()
    if item_id in now.withheld or not store.rows_of(item_id):
        return now
    return point(store, reader, now.space, now.previous, now, [*now.withheld, item_id])


def reindex(store: Store, reader: Reader, digests: Mapping[str, str]) -> Pointer:
    """Names the indexes (space_id -> digest) that were built anew of the live spaces, and withholds nothing more: one write."""
    now = reader.pointer()
    space, previous = (
        dataclasses.replace(one, index=digests.get(one.space_id, one.index)) if one else None for one in (now.space, now.previous)
    )
    assert space is not None
    if (space, previous, now.withheld) == (now.space, now.previous, ()):
        return now
    return point(store, reader, space, previous, now)


# ------------------------------------------------------------------------------------------------------------- attributes


def write_attributes(store: Store, reader: Reader, items: Sequence[Mapping[str, Any]], ds: str) -> int:
    """Writes the attributes of those items whose `content_hash` is not online; returns how many.

    An item is {item_id, attributes: [{name, value}], content_hash}.
    """
    ids = {"item_id": [item["item_id"] for item in items]}
    online = reader.transport.read("item_attributes", ids, ["content_hash"]) if items else []
    rows: list[Any] = []
    for key, item, (_, now) in zip(entity_keys(ids), items, online, strict=True):
        if now.get("content_hash") != item["content_hash"]:
            values = {
                "names": Value(string_list_val=StringList(val=[pair["name"] for pair in item["attributes"]])),
                "values": Value(string_list_val=StringList(val=[pair["value"] for pair in item["attributes"]])),
                "content_hash": Value(string_val=item["content_hash"]),
            }
            rows.append((key, values, end_of(ds), None))
    if rows:
        store.write(views.item_attributes, rows)
    else:
        store.renew()
    return len(rows)


# ---------------------------------------------------------------------------------------------------------------- leaving


def remove_space(store: Store, space_id: str) -> int:
    """Removes all rows of a space; returns how many. Raises Fenced."""
    removed = 0
    for ids in store.members(space_id):
        store.renew()
        removed += remove_items(store, space_id, sorted(set(ids)))
    return removed


def live(pointer: Pointer) -> dict[str, Space]:
    """The spaces that must stay: the serving one and the one before."""
    kept = [pointer.space, *([pointer.previous] if pointer.previous else [])]
    return {space.space_id: space for space in kept}


def forget(store: Store, item_id: str, ds: str) -> int:
    """Removes an item from every space and leaves its tombstone, first: a reader never finds it merely missing.

    Returns how many vectors were removed. Run again after a kill, it finishes.
    """
    bury(store, [item_id], ds)
    for key in entity_keys({"item_id": [item_id]}):
        store.delete(views.item_attributes, [serialized(key)])
    keys = store.rows_of(item_id)
    for part in batched(keys, DELETES):
        store.delete(views.item_embedding, part)
        delete_codes(store, part)
    return len(keys)


def bury(store: Store, item_ids: Sequence[str], ds: str) -> None:
    """Writes tombstones, by which readers tell deleted from missing."""
    moment = end_of(ds)
    for part in batched(list(item_ids), SCAN):
        value = {"forgotten_at": Value(unix_timestamp_val=int(moment.timestamp()))}
        store.write(views.item_tombstone, [(key, value, moment, None) for key in entity_keys({"item_id": part})])


def vectors_of(store: Store, item_id: str) -> int:
    """How many vectors of an item are in the store, in any space: the proof of `forget`."""
    return len(store.rows_of(item_id))
