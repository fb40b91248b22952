"""The items that a report looks at: every one whose content hash lies below a bound, the same in every table, whatever its order.

Shapes: N items sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from jobs.lake import partitions
from jobs.lake.items import live_items, title
from jobs.lake.tables import ITEMS

OTHERS = 7
"""Group of the categories that are too many to tell apart by colour."""
TITLE = 90
"""Characters of a title that are shown."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some items of the snapshot."""

    item_ids: list[str]
    attributes: list[list[tuple[str, str]]]
    hashes: list[str]
    total: int
    """Items of the snapshot."""
    bound: str
    """Content hashes below it are in the sample."""

    @property
    def titles(self) -> list[str]:
        """A name for each item."""
        return [short_title(item_id, pairs) for item_id, pairs in zip(self.item_ids, self.attributes, strict=True)]


def short_title(item_id: str, pairs: Sequence[tuple[str, str]]) -> str:
    """An item's title on one line, cut to what is shown."""
    text = " ".join(title(item_id, pairs).split())
    return text if len(text) <= TITLE else f"{text[: TITLE - 1]}…"


def hash_bound(rows: int, most: int) -> str:
    """Content hashes below it are about `most` of `rows`."""
    return "g" if rows <= most else f"{int(most / rows * 2**32):08x}"


def draw_sample(lake: Path, partition: str, most: int) -> Sample:
    """About `most` items of a snapshot, or all where there are no more."""
    total = partitions.read_commit(lake, ITEMS.name, partition).rows
    bound = hash_bound(total, most)
    found = []
    for batch in live_items(lake, partition, ("item_id", "content_hash", "attributes")):
        found += batch.filter(pc.less(batch["content_hash"], bound)).to_pylist()
    rows = sorted(found, key=lambda row: (row["content_hash"], row["item_id"]))
    return Sample(
        item_ids=[row["item_id"] for row in rows],
        attributes=[[(pair["name"], pair["value"] or "") for pair in row["attributes"]] for row in rows],
        hashes=[row["content_hash"] for row in rows],
        total=total,
        bound=bound,
    )


def categories_of(sample: Sample, wanted: str) -> tuple[str, list[str], list[int]]:
    """(attribute, its commonest first values, group of each item): `wanted`, or the attribute with the fewest values above one.

    A list's first value counts. Values past the seventh commonest, and none, are group OTHERS.
    """
    firsts: dict[str, list[str]] = {}
    for place, pairs in enumerate(sample.attributes):
        for name, value in pairs:
            firsts.setdefault(name, [""] * len(sample.attributes))[place] = value.split(",")[0].strip()
    counted = {name: Counter(value for value in values if value) for name, values in firsts.items()}
    # a field that most items lack, or that names nearly every one, sorts nothing
    usable = [
        name
        for name, counts in counted.items()
        if 1 < len(counts) <= max(2, counts.total() / 2) and counts.total() * 2 >= len(sample.attributes)
    ]
    if wanted not in counted:
        wanted = min(usable, key=lambda name: len(counted[name]), default="")
    if not wanted:
        return "", [], [OTHERS] * len(sample.item_ids)
    ranked = sorted(counted[wanted].items(), key=lambda pair: (-pair[1], pair[0]))
    names = [value for value, _ in ranked[:OTHERS]]
    return wanted, names, [names.index(value) if value in names else OTHERS for value in firsts[wanted]]
