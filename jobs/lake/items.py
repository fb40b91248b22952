"""Items of the lake: the catalogue of a snapshot without those that were forgotten, their titles, the identity of a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import partitions, remote
from jobs.lake import store as stores
from jobs.lake.partitions import publish_json
from jobs.lake.tables import ITEMS

BATCH = 65_536


def content_hash(attributes: Iterable[tuple[str, str]]) -> str:
    """Identity of an item's text: SHA-256 over its (name, value) pairs in their order, 32 hexadecimal digits.

    Each text stands behind its length in code points, so that no two lists of pairs are written alike.
    """
    written = "".join(f"{len(name)}:{name}{len(value)}:{value}" for name, value in attributes)
    return hashlib.sha256(written.encode()).hexdigest()[:32]


def tombstones(lake: Path, since: str = "") -> frozenset[str]:
    """Ids of the items that were forgotten, on that date or later: no job may bring them back."""
    if store := stores.of(lake):
        remote.mirror(store, lake, "tombstones", ".json")
    found = [json.loads(path.read_text()) for path in (lake / "tombstones").glob("*.json")]
    return frozenset(one["item_id"] for one in found if one["forgotten_ds"] >= since)


def bury(lake: Path, item_id: str, ds: str) -> None:
    """Writes an item's tombstone, before anything of it is removed: a killed `forget` is then finished by its rerun."""
    name = hashlib.sha256(item_id.encode()).hexdigest()[:32]
    publish_json(lake, lake / "tombstones" / f"{name}.json", {"item_id": item_id, "forgotten_ds": ds})


def without_forgotten(
    lake: Path, batches: Iterable[pa.RecordBatch], forgotten: frozenset[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Batches that have a column `item_id`, without the rows of forgotten items: those of now, or those given."""
    gone = pa.array(sorted(tombstones(lake) if forgotten is None else forgotten), pa.string())
    for batch in batches:
        yield batch.filter(pc.invert(pc.is_in(batch["item_id"], gone))) if len(gone) else batch


def live_items(
    lake: Path, partition: str, columns: Sequence[str] | None = None, batch_rows: int = BATCH
) -> Iterator[pa.RecordBatch]:
    """Rows of a snapshot of `items` without forgotten ones, in bounded batches; `columns` must name `item_id`."""
    return without_forgotten(lake, partitions.scan(lake, ITEMS, partition, columns, batch_rows))


def texts(lake: Path, ds: str, item_ids: Sequence[str], said_of: Callable[[str], bool]) -> list[str]:
    """Values of each item's attributes for whose names `said_of` is true, in the newest snapshot up to ds; "" for unknown ids."""
    said: dict[str, str] = {}
    for batch in live_items(lake, partitions.latest(lake, ITEMS.name, ds), ("item_id", "attributes")):
        for item_id, pairs in zip(batch["item_id"].to_pylist(), batch["attributes"].to_pylist(), strict=True):
            said[item_id] = " ".join(pair["value"] for pair in pairs if said_of(pair["name"]))
    return [said.get(item_id, "") for item_id in item_ids]


def title(item_id: str, pairs: Iterable[tuple[str, str]]) -> str:
    """An item's attribute `title`, else its first one, else its id."""
    values = dict(pairs)
    return values.get("title") or next(iter(values.values()), "") or item_id


def titles(lake: Path, ds: str, item_ids: Sequence[str]) -> dict[str, str]:
    """The title of each item in the newest snapshot up to ds; its id where the catalogue lacks it."""
    wanted, found = pa.array(item_ids, pa.string()), dict(zip(item_ids, item_ids, strict=True))
    for batch in partitions.scan(lake, ITEMS, partitions.latest(lake, ITEMS.name, ds), ("item_id", "attributes")):
        some = batch.filter(pc.is_in(batch["item_id"], wanted))
        for item_id, pairs in zip(some["item_id"].to_pylist(), some["attributes"].to_pylist(), strict=True):
            found[item_id] = title(item_id, ((pair["name"], pair["value"]) for pair in pairs))
    return found
