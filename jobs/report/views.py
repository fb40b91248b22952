"""What the report shows of the vectors: a sample of the items, laid out in two dimensions, and neighbours before and after.

A sample is every item whose content hash lies below a bound: the same items in every table, whatever its order.
Shapes: N items sampled, Q queries, B rows of a batch, E LLM width, D width of the space, K neighbours.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.lake import artifacts, partitions
from jobs.lake.items import tombstones
from jobs.lake.tables import ITEM_GROUPS, ITEMS
from jobs.run import Run

Matrix = npt.NDArray[np.float32]
OTHERS = 7
"""Group of the categories that are too many to tell apart by colour."""
ALONE = 10
"""Neighbours in which a map's purity is measured."""
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
        return [title(item_id, pairs) for item_id, pairs in zip(self.item_ids, self.attributes, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One kind of embedding of the sample."""

    name: str
    what: str
    """In words."""
    vectors: dict[str, Matrix]
    """By item id; items without one are missing."""
    by_dot: bool = False
    """Neighbours by dot product, as serving ranks; otherwise by cosine of centred vectors."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """A layer laid out in two dimensions."""

    name: str
    what: str
    places: list[int]
    """Which items of the sample it shows, in the order of its points."""
    point_N2: Matrix
    purity: float | None
    """Share of an item's nearest neighbours, among the items of all maps, that have its category; none without categories."""
    chance: float | None
    """The same for neighbours drawn at random."""
    compared: int
    """Items that all maps show: among more of them neighbours are nearer, so shares are compared on these."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Neighbours of one item."""

    item_id: str
    title: str
    group: str
    columns: dict[str, list[tuple[str, str]]]
    """(id, title) of the nearest items, by layer; empty where the layer lacks the item."""


@dataclass(frozen=True, kw_only=True)
class Views:
    """All that is shown of the vectors."""

    sample: Sample
    attribute: str
    """Whose values are the categories; empty where none fits."""
    categories: list[str]
    """In the order of their colours."""
    groups: list[int]
    maps: tuple[Map, ...]
    examples: tuple[Example, ...]
    pool: int
    """Items among which neighbours were looked for."""
    missing: dict[str, str] = field(default_factory=dict)
    """Layers that are not shown, and why."""


# ----------------------------------------------------------------------------------------------------------------- sample


def title(item_id: str, pairs: Sequence[tuple[str, str]]) -> str:
    """An item's attribute `title`, else its first one, else its id."""
    values = dict(pairs)
    text = " ".join((values.get("title") or next(iter(values.values()), "") or item_id).split())
    return text if len(text) <= TITLE else f"{text[: TITLE - 1]}…"


def bound_of(rows: int, most: int) -> str:
    """Content hashes below it are about `most` of `rows`."""
    return "g" if rows <= most else f"{int(most / rows * 2**32):08x}"


def draw(lake: Path, partition: str, most: int) -> Sample:
    """About `most` items of a snapshot, or all where there are no more."""
    total = partitions.read_commit(lake, ITEMS.name, partition).rows
    bound = bound_of(total, most)
    found = []
    for batch in partitions.scan(lake, ITEMS, partition, ("item_id", "content_hash", "attributes")):
        found += batch.filter(pc.less(batch["content_hash"], bound)).to_pylist()
    gone = tombstones(lake)
    rows = sorted((row for row in found if row["item_id"] not in gone), key=lambda row: (row["content_hash"], row["item_id"]))
    return Sample(
        item_ids=[row["item_id"] for row in rows],
        attributes=[[(pair["name"], pair["value"] or "") for pair in row["attributes"]] for row in rows],
        hashes=[row["content_hash"] for row in rows],
        total=total,
        bound=bound,
    )


def categorised(sample: Sample, wanted: str) -> tuple[str, list[str], list[int]]:
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


# ---------------------------------------------------------------------------------------------------------------- vectors


def matrix(column: pa.Array) -> Matrix:
    """A column of fixed-size lists as rows."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(column), column.type.list_size)


def rows_below(lake: Path, table: str, partition: str, bound: str, key: str) -> Iterator[tuple[list[str], list[str], Matrix]]:
    """(keys, content hashes, vector_BD) of a partition of vectors, of those content hashes that lie below the bound."""
    here = partitions.folder(lake, table, partition)
    for name in partitions.read_commit(lake, table, partition).files:
        with pq.ParquetFile(here / name) as file:
            for batch in file.iter_batches(batch_size=16_384, columns=list(dict.fromkeys([key, "content_hash", "embedding"]))):
                some = batch.filter(pc.less(batch["content_hash"], bound))
                if some.num_rows:
                    yield some[key].to_pylist(), some["content_hash"].to_pylist(), matrix(some["embedding"])


def served_vectors(lake: Path, partition: str, sample: Sample) -> dict[str, Matrix]:
    """Vectors of the sample's items in a space."""
    wanted, found = set(sample.item_ids), dict[str, Matrix]()
    for ids, _, vector_BD in rows_below(lake, "item_embeddings", partition, sample.bound, "item_id"):
        found |= {item_id: vector_BD[row] for row, item_id in enumerate(ids) if item_id in wanted}
    return found


def text_vectors(lake: Path, encoder_id: str, sample: Sample) -> dict[str, Matrix]:
    """Embeddings of the sample's texts under an encoder."""
    found: dict[str, Matrix] = {}
    for partition in partitions.committed(lake, "llm_embeddings", f"encoder={encoder_id}"):
        for hashes, _, emb_BE in rows_below(lake, "llm_embeddings", partition, sample.bound, "content_hash"):
            found |= dict(zip(hashes, emb_BE, strict=True))
    return {item_id: found[text] for item_id, text in zip(sample.item_ids, sample.hashes, strict=True) if text in found}


def base_encoder(lake: Path, encoder_id: str) -> str:
    """The encoder without LoRA over the same base model that has embedded something; empty where there is none."""
    described = {path.parent.name: json.loads(path.read_text()) for path in (lake / "models" / "encoder").glob("*/encoder.json")}
    own = described.get(encoder_id, {})
    alike = [
        name
        for name, known in sorted(described.items())
        if known.get("lora") is None
        and known.get("base_sha256") == own.get("base_sha256")
        and partitions.committed(lake, "llm_embeddings", f"encoder={name}")
    ]
    return alike[0] if alike else ""


def embed_base(run: Run, encoder_id: str, sample: Sample, most: int) -> dict[str, Matrix]:
    """The first items of the sample, embedded by the base model as it was before SCFT. Raises ValueError where it isn't there."""
    from jobs.lake.tensors import pick_device
    from models.text.base_model import load_base
    from models.text.embedding import embed_items
    from models.text.encoder import Encoder, read_spec

    spec = replace(read_spec(artifacts.find(run.lake, "encoder", encoder_id)), lora=None)
    model, tokenizer, _ = load_base(spec.base, device=pick_device(run), layers=spec.layers)
    emb_NE = embed_items(Encoder(model, tokenizer, spec).eval(), sample.attributes[:most])
    return dict(zip(sample.item_ids[:most], emb_NE, strict=True))


# ------------------------------------------------------------------------------------------------------------------- maps


def directions(vector_ND: Matrix) -> Matrix:
    """Centred and of length one: LLM embeddings share a large common part that would hide all else."""
    centred_ND = vector_ND - vector_ND.mean(0)
    return np.asarray(centred_ND / np.maximum(np.linalg.norm(centred_ND, axis=1, keepdims=True), 1e-12), np.float32)


def laid_out(vector_ND: Matrix, start_N2: Matrix | None, seed: int) -> Matrix:
    """point_N2 by t-SNE (van der Maaten and Hinton 2008) from `start_N2` or the principal components; those for a few items."""
    unit_ND = directions(vector_ND)
    left_NN, value_N, _ = np.linalg.svd(unit_ND, full_matrices=False)
    scores_ND = (left_NN * value_N)[:, :50].astype(np.float32)
    start_N2 = np.pad(scores_ND[:, :2], ((0, 0), (0, max(0, 2 - scores_ND.shape[1])))) if start_N2 is None else start_N2
    if len(vector_ND) < 10 or not np.ptp(scores_ND) > 1e-6:
        return start_N2
    from sklearn.manifold import TSNE

    start_N2 = start_N2 / max(float(start_N2[:, 0].std()), 1e-9) * 1e-4
    # from four neighbours up to the usual thirty
    perplexity = min(30.0, max(2.0, len(vector_ND) / 4))
    return np.asarray(TSNE(init=start_N2, perplexity=perplexity, random_state=seed).fit_transform(scores_ND), np.float32)


def purity(vector_ND: Matrix, group_N: npt.NDArray[np.int64]) -> tuple[float | None, float | None]:
    """(share of nearest neighbours of an item's own category, the same by chance), over items whose category has a colour."""
    named_N = group_N != OTHERS
    if len(set(group_N[named_N].tolist())) < 2 or len(vector_ND) < 3:
        return None, None
    unit_ND = directions(vector_ND)
    score_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(score_NN, -np.inf)
    near_NK = np.argsort(-score_NN, axis=1, kind="stable")[:, : min(ALONE, len(vector_ND) - 1)]
    same_NK = group_N[near_NK] == group_N[:, None]
    counts = np.bincount(group_N, minlength=OTHERS + 1)
    chance_N = (counts[group_N] - 1) / (len(group_N) - 1)
    return float(same_NK[named_N].mean()), float(chance_N[named_N].mean())


def mapped(layers: Sequence[Layer], sample: Sample, group_N: Sequence[int], seed: int) -> tuple[Map, ...]:
    """Maps of the layers; each begins where the one before ended, so that an item stays about where it was."""
    shared = [place for place, item_id in enumerate(sample.item_ids) if all(item_id in layer.vectors for layer in layers)]
    group_S = np.asarray([group_N[place] for place in shared], np.int64)
    maps: list[Map] = []
    before: dict[int, Matrix] = {}
    for layer in layers:
        places = [place for place, item_id in enumerate(sample.item_ids) if item_id in layer.vectors]
        if not places:
            continue
        vector_ND = np.stack([layer.vectors[sample.item_ids[place]] for place in places])
        known = bool(before) and all(place in before for place in places)
        point_N2 = laid_out(vector_ND, np.stack([before[place] for place in places]) if known else None, seed)
        shared_SD = np.stack([layer.vectors[sample.item_ids[place]] for place in shared]) if shared else vector_ND[:0]
        same, chance = purity(shared_SD, group_S)
        maps.append(
            Map(
                name=layer.name,
                what=layer.what,
                places=places,
                point_N2=point_N2,
                purity=same,
                chance=chance,
                compared=len(shared),
            )
        )
        before = dict(zip(places, point_N2, strict=True))
    return tuple(maps)


# ------------------------------------------------------------------------------------------------------------- neighbours


def chosen(sample: Sample, groups: Mapping[str, str], each: int) -> list[tuple[str, str]]:
    """(item, group) of examples: the first of each group by content hash, so nobody picked them."""
    found = []
    for group in reversed(ITEM_GROUPS):
        some = [item_id for item_id in sample.item_ids if groups.get(item_id) == group]
        found += [(item_id, group) for item_id in some[:each]]
    return found


def groups_of(lake: Path, partition: str, sample: Sample) -> dict[str, str]:
    """cold, tail or head, of the sample's items."""
    wanted, found = pa.array(sample.item_ids, pa.string()), dict[str, str]()
    here = partitions.folder(lake, "item_embeddings", partition)
    for name in partitions.read_commit(lake, "item_embeddings", partition).files:
        with pq.ParquetFile(here / name) as file:
            for batch in file.iter_batches(columns=["item_id", "group"]):
                some = batch.filter(pc.is_in(batch["item_id"], wanted))
                found |= dict(zip(some["item_id"].to_pylist(), some["group"].to_pylist(), strict=True))
    return found


def ids_of(lake: Path, partition: str) -> list[str]:
    """Item ids of a space."""
    here = partitions.folder(lake, "item_embeddings", partition)
    files = partitions.read_commit(lake, "item_embeddings", partition).files
    return [item for name in files for item in pq.read_table(here / name, columns=["item_id"])["item_id"].to_pylist()]


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


def near_served(lake: Path, partition: str, layer: Layer, items: Sequence[str], bound: str, count: int) -> dict[str, list[str]]:
    """Nearest items of some items in a space, by dot product as serving ranks."""
    known = [item_id for item_id in items if item_id in layer.vectors]
    if not known:
        return {}
    nearest = Nearest(np.stack([layer.vectors[item_id] for item_id in known]), known, count)
    for ids, _, vector_BD in rows_below(lake, "item_embeddings", partition, bound, "item_id"):
        nearest.take(ids, vector_BD)
    return dict(zip(known, nearest.keys(), strict=True))


def near_texts(
    lake: Path, encoder_id: str, layer: Layer, sample: Sample, items: Sequence[str], bound: str, count: int
) -> dict[str, list[str]]:
    """Content hashes nearest to some items under an encoder, by cosine of vectors centred at the sample's mean."""
    known = [item_id for item_id in items if item_id in layer.vectors]
    if not known:
        return {}
    mean_E = np.stack(list(layer.vectors.values())).mean(0)
    hashes = dict(zip(sample.item_ids, sample.hashes, strict=True))
    nearest = Nearest(unit(np.stack([layer.vectors[item_id] for item_id in known]) - mean_E), [hashes[i] for i in known], count)
    for partition in partitions.committed(lake, "llm_embeddings", f"encoder={encoder_id}"):
        for keys, _, emb_BE in rows_below(lake, "llm_embeddings", partition, bound, "content_hash"):
            nearest.take(keys, unit(emb_BE - mean_E))
    return dict(zip(known, nearest.keys(), strict=True))


def near_sampled(layer: Layer, items: Sequence[str], count: int) -> dict[str, list[str]]:
    """Nearest items among those that a layer has itself: a base model embeds no more."""
    known = [item_id for item_id in items if item_id in layer.vectors]
    if not known or len(layer.vectors) < 2:
        return {}
    ids = list(layer.vectors)
    unit_ND = directions(np.stack(list(layer.vectors.values())))
    nearest = Nearest(np.stack([unit_ND[ids.index(item_id)] for item_id in known]), known, count)
    nearest.take(ids, unit_ND)
    return dict(zip(known, nearest.keys(), strict=True))


def unit(vector_ND: Matrix) -> Matrix:
    """Rows of length one."""
    return np.asarray(vector_ND / np.maximum(np.linalg.norm(vector_ND, axis=1, keepdims=True), 1e-12), np.float32)


def named(lake: Path, partition: str, column: str, near: Mapping[str, list[str]]) -> dict[str, list[tuple[str, str]]]:
    """The same neighbours, given by their id or content hash, as (id, title); what the catalogue lacks is named by its key."""
    keys = sorted({key for found in near.values() for key in found})
    known = {key: (key, key) for key in keys}
    for batch in partitions.scan(lake, ITEMS, partition, ("item_id", "content_hash", "attributes")):
        for row in batch.filter(pc.is_in(batch[column], pa.array(keys, pa.string()))).to_pylist():
            pairs = [(pair["name"], pair["value"] or "") for pair in row["attributes"]]
            known[row[column]] = (row["item_id"], title(row["item_id"], pairs))
    return {item_id: [known[key] for key in found] for item_id, found in near.items()}


# -------------------------------------------------------------------------------------------------------------- all of it


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """What is looked at: the space of the night, its encoder, and the space before."""

    items: str
    """Partition of `items`."""
    encoder_id: str
    served: str
    """Partition of `item_embeddings`; empty where there is none yet."""
    before: str
    """Partition of another space that served before; empty where there is none."""


def layers_of(run: Run, spaces: Spaces, sample: Sample, base_items: int) -> tuple[list[Layer], dict[str, str]]:
    """Base, SCFT and served embeddings of the sample, and why one is missing."""
    layers: list[Layer] = []
    missing: dict[str, str] = {}
    base_id = base_encoder(run.lake, spaces.encoder_id) if spaces.encoder_id else ""
    try:
        if base_id:
            base = text_vectors(run.lake, base_id, sample)
        else:
            base = embed_base(run, spaces.encoder_id, sample, base_items) if base_items and spaces.encoder_id else {}
        what = "Text, as the LLM saw it before fine-tuning"
        if base:
            layers.append(Layer(name="Base LLM", what=what, vectors=base))
        else:
            missing["Base LLM"] = "no encoder without LoRA has embedded these items, and report.base_items is 0"
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        missing["Base LLM"] = f"the base model could not be asked ({type(error).__name__}: {error})"
    texts = text_vectors(run.lake, spaces.encoder_id, sample) if spaces.encoder_id else {}
    if texts:
        layers.append(Layer(name="After SCFT", what="Text, as the fine-tuned LLM sees it", vectors=texts))
    else:
        missing["After SCFT"] = "nothing of the sample is embedded by the night's encoder"
    served = served_vectors(run.lake, spaces.served, sample) if spaces.served else {}
    if served:
        layers.append(
            Layer(name="Served", what="After RAT: text bent to behaviour; what serving reads", vectors=served, by_dot=True)
        )
    else:
        missing["Served"] = "no item_embeddings for this night: project has not run"
    return layers, missing


def look(
    run: Run, spaces: Spaces, *, map_items: int, base_items: int, pool_items: int, each: int, count: int, category: str
) -> tuple[Views, list[Layer]]:
    """Sample, maps and examples, and the layers for whoever measures them. Raises InputError where there are no items."""
    sample = draw(run.lake, spaces.items, map_items)
    attribute, categories, group_N = categorised(sample, category)
    layers, missing = layers_of(run, spaces, sample, base_items)
    examples = exemplified(run, spaces, sample, layers, pool_items, each, count)
    views = Views(
        sample=sample,
        attribute=attribute,
        categories=categories,
        groups=group_N,
        maps=mapped(layers, sample, group_N, run.seed),
        examples=examples,
        pool=min(sample.total, pool_items),
        missing=missing,
    )
    return views, layers


def exemplified(
    run: Run, spaces: Spaces, sample: Sample, layers: Sequence[Layer], pool_items: int, each: int, count: int
) -> tuple[Example, ...]:
    """Neighbours of a few items of each group under every layer, and in the space before."""
    if not spaces.served:
        return ()
    lake, bound = run.lake, bound_of(sample.total, pool_items)
    examples = chosen(sample, groups_of(lake, spaces.served, sample), each)
    items = [item_id for item_id, _ in examples]
    columns: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for layer in layers:
        if layer.by_dot:
            columns[layer.name] = named(
                lake, spaces.items, "item_id", near_served(lake, spaces.served, layer, items, bound, count)
            )
        elif layer.name == "Base LLM":
            columns[layer.name] = named(lake, spaces.items, "item_id", near_sampled(layer, items, count))
        else:
            near = near_texts(lake, spaces.encoder_id, layer, sample, items, bound, count)
            columns[layer.name] = named(lake, spaces.items, "content_hash", near)
    if spaces.before:
        old = Layer(name="Served before", what="", vectors=served_vectors(lake, spaces.before, sample), by_dot=True)
        columns[old.name] = named(lake, spaces.items, "item_id", near_served(lake, spaces.before, old, items, bound, count))
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
