"""Neighbours of a few items before and after: under every embedding, and in the space that served before.

Shapes: Q queries, B rows of a batch, E LLM width, D width of the space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import partitions
from jobs.lake.tables import ITEM_GROUPS, ITEMS
from jobs.report.layers import BASE, Layer, Matrix, rows_below, served_vectors
from jobs.report.maps import centred_directions
from jobs.report.sample import Sample, hash_bound, short_title
from jobs.report.spaces import Spaces
from jobs.run import Run


@dataclass(frozen=True, kw_only=True)
class Example:
    """Neighbours of one item."""

    item_id: str
    title: str
    group: str
    columns: dict[str, list[tuple[str, str]]]
    """(id, title) of the nearest items, by layer; empty where the layer lacks the item."""


def examples_of(
    run: Run, spaces: Spaces, sample: Sample, layers: Sequence[Layer], pool_items: int, each: int, count: int
) -> tuple[Example, ...]:
    """Items of each group -> their neighbours under every layer, and in the space before."""
    if not spaces.served:
        return ()
    examples = choose_examples(sample, groups_of(run.lake, spaces.served, sample), each)
    items = [item_id for item_id, _ in examples]
    columns = {layer.name: nearest_under(run.lake, spaces, sample, layer, items, pool_items, count) for layer in layers}
    if spaces.before:
        before = replace(spaces, served=spaces.before)
        old = Layer(name="Served before", what="", vectors=served_vectors(run.lake, spaces.before, sample), by_dot=True)
        columns[old.name] = nearest_under(run.lake, before, sample, old, items, pool_items, count)
    titles = dict(zip(sample.item_ids, sample.titles, strict=True))
    return tuple(
        Example(
            item_id=item_id,
            title=titles[item_id],
            group=group,
            columns={name: found.get(item_id, []) for name, found in columns.items()},
        )
        for item_id, group in examples
    )


def nearest_under(
    lake: Path, spaces: Spaces, sample: Sample, layer: Layer, items: Sequence[str], pool_items: int, count: int
) -> dict[str, list[tuple[str, str]]]:
    """Neighbours of some items under one layer, best first, as (id, title)."""
    bound = hash_bound(sample.total, pool_items)
    if layer.by_dot:
        near = nearest_served(lake, spaces.served, layer, items, bound, count)
    elif layer.name == BASE:
        near = nearest_sampled(layer, items, count)
    else:
        near = nearest_texts(lake, spaces.encoder_id, layer, sample, items, bound, count)
        return with_titles(lake, spaces.items, "content_hash", near)
    return with_titles(lake, spaces.items, "item_id", near)


def choose_examples(sample: Sample, groups: Mapping[str, str], each: int) -> list[tuple[str, str]]:
    """(item, group) of examples: the first of each group by content hash, so nobody picked them."""
    found = []
    for group in reversed(ITEM_GROUPS):
        some = [item_id for item_id in sample.item_ids if groups.get(item_id) == group]
        found += [(item_id, group) for item_id in some[:each]]
    return found


def groups_of(lake: Path, partition: str, sample: Sample) -> dict[str, str]:
    """cold, tail or head, of the sample's items."""
    wanted, found = pa.array(sample.item_ids, pa.string()), dict[str, str]()
    for file in partitions.read_files(lake, "item_embeddings", partition, ["item_id", "group"]):
        for batch in file.iter_batches(columns=["item_id", "group"]):
            some = batch.filter(pc.is_in(batch["item_id"], wanted))
            found |= dict(zip(some["item_id"].to_pylist(), some["group"].to_pylist(), strict=True))
    return found


class Nearest:
    """The best K rows for each query, kept over batches."""

    def __init__(self, query_QD: Matrix, own: Sequence[str], count: int) -> None:
        self.query_QD = query_QD
        self.own = own
        self.count = count
        self.best: list[list[tuple[float, str]]] = [[] for _ in own]

    def take(self, keys: Sequence[str], vector_BD: Matrix) -> None:
        """Looks through a batch."""
        score_QB = self.query_QD @ vector_BD.T
        take = min(self.count + 1, len(keys))
        for query, score_B in enumerate(score_QB):
            top = np.argpartition(-score_B, take - 1)[:take]
            new = [(float(score_B[row]), keys[row]) for row in top.tolist() if keys[row] != self.own[query]]
            merged = dict.fromkeys(sorted([*self.best[query], *new], key=lambda pair: (-pair[0], pair[1])))
            self.best[query] = list(merged)[: self.count]

    def keys(self) -> list[list[str]]:
        """Keys of each query's neighbours, best first."""
        return [[key for _, key in found] for found in self.best]


def nearest_served(
    lake: Path, partition: str, layer: Layer, items: Sequence[str], bound: str, count: int
) -> dict[str, list[str]]:
    """Nearest items of some items in a space, by dot product as serving ranks."""
    known = [item_id for item_id in items if item_id in layer.vectors]
    if not known:
        return {}
    nearest = Nearest(np.stack([layer.vectors[item_id] for item_id in known]), known, count)
    for ids, _, vector_BD in rows_below(lake, "item_embeddings", partition, bound, "item_id"):
        nearest.take(ids, vector_BD)
    return dict(zip(known, nearest.keys(), strict=True))


def nearest_texts(
    lake: Path, encoder_id: str, layer: Layer, sample: Sample, items: Sequence[str], bound: str, count: int
) -> dict[str, list[str]]:
    """Content hashes nearest to some items under an encoder, by cosine of vectors centred at the sample's mean."""
    known = [item_id for item_id in items if item_id in layer.vectors]
    if not known:
        return {}
    mean_E = np.stack(list(layer.vectors.values())).mean(0)
    hashes = dict(zip(sample.item_ids, sample.hashes, strict=True))
    nearest = Nearest(
        unit_rows(np.stack([layer.vectors[item_id] for item_id in known]) - mean_E), [hashes[i] for i in known], count
    )
    for partition in partitions.committed(lake, "llm_embeddings", f"encoder={encoder_id}"):
        for keys, _, emb_BE in rows_below(lake, "llm_embeddings", partition, bound, "content_hash"):
            nearest.take(keys, unit_rows(emb_BE - mean_E))
    return dict(zip(known, nearest.keys(), strict=True))


def nearest_sampled(layer: Layer, items: Sequence[str], count: int) -> dict[str, list[str]]:
    """Nearest items among those that a layer has itself: a base model embeds no more."""
    known = [item_id for item_id in items if item_id in layer.vectors]
    if not known or len(layer.vectors) < 2:
        return {}
    ids = list(layer.vectors)
    unit_ND = centred_directions(np.stack(list(layer.vectors.values())))
    nearest = Nearest(np.stack([unit_ND[ids.index(item_id)] for item_id in known]), known, count)
    nearest.take(ids, unit_ND)
    return dict(zip(known, nearest.keys(), strict=True))


def unit_rows(vector_ND: Matrix) -> Matrix:
    """Rows of length one."""
    return np.asarray(vector_ND / np.maximum(np.linalg.norm(vector_ND, axis=1, keepdims=True), 1e-12), np.float32)


def with_titles(lake: Path, partition: str, column: str, near: Mapping[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    """The same neighbours, given by their id or content hash, as (id, title); what the catalogue lacks is named by its key."""
    keys = sorted({key for found in near.values() for key in found})
    known = {key: (key, key) for key in keys}
    for batch in partitions.scan(lake, ITEMS, partition, ("item_id", "content_hash", "attributes")):
        for row in batch.filter(pc.is_in(batch[column], pa.array(keys, pa.string()))).to_pylist():
            pairs = [(pair["name"], pair["value"] or "") for pair in row["attributes"]]
            known[row[column]] = (row["item_id"], short_title(row["item_id"], pairs))
    return {item_id: [known[key] for key in found] for item_id, found in near.items()}
