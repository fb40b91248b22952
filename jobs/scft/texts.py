"""The texts of a snapshot, from which an encoder learns."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow.compute as pc

from jobs.lake import partitions
from jobs.lake.items import live_items
from jobs.lake.tables import ITEMS
from jobs.run import InputError
from jobs.scft.config import Config
from models.text.prompts import Texts

log = logging.getLogger(__name__)

Attributes = list[tuple[str, str]]


def read_texts(config: Config, snapshot: str) -> tuple[list[str], list[str], list[Attributes]]:
    """An item, hash and attributes of each different text of the snapshot, by their hashes, without what was forgotten."""
    lake = config.run.lake
    rows = partitions.read_commit(lake, ITEMS.name, snapshot).rows
    bound = f"{min(int(config.max_items / max(rows, 1) * 2**32), 2**32 - 1):08x}"
    found: dict[str, tuple[str, Attributes]] = {}
    for batch in live_items(lake, snapshot, ("item_id", "content_hash", "attributes")):
        sampled = batch.filter(pc.less_equal(pc.utf8_slice_codeunits(batch["content_hash"], 0, 8), bound))
        for row in sampled.to_pylist():
            found[row["content_hash"]] = row["item_id"], [(entry["name"], entry["value"]) for entry in row["attributes"]]
    if not found:
        raise InputError(f"items/{snapshot} holds no item: extract a catalogue first")
    hashes = sorted(found)
    return [found[text][0] for text in hashes], hashes, [found[text][1] for text in hashes]


def warn_of_short(config: Config, texts: Texts) -> None:
    """Says where most texts have one attribute, as with titles alone, and two views of an item are to teach something."""
    training, alone = config.training, int((np.diff(texts.piece_I1) < 2).sum())
    views = training.steps and training.contrast_weight and training.pair_share < 1
    if views and alone > len(texts) / 2:
        log.warning("%d of %d texts have one attribute: both views of such an item read the same, and teach no more than to "
                    "spread items evenly; extract more attributes, learn from pairs (scft.training.pair_share = 1.0), or keep "
                    "the base (scft.training.steps = 0)", alone, len(texts))  # fmt: skip
