"""Nearest neighbours in a space by dot product: exact, and approximate by codes or a graph (nearest.py); a folder, never changed.

A folder holds `items.arrow` (ids, attributes, recent events, in the order of the vectors), `hashes.npy` and `rows.npy` (from an
id to its row), `vectors.npy`, `index.json` (what it belongs to) and, for the approximate one, `graph.faiss`. All are mapped:
several processes of one machine share the pages. Shapes: N items, D width, Q queries, K found.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import nearest
from feature_repo.nearest import Graph as Graph  # publish and forget take it from here
from feature_repo.nearest import Matrix, Rows

ITEMS, HASHES, ROWS, VECTORS, GRAPH, ABOUT = (
    *("items.arrow", "hashes.npy", "rows.npy"),
    *("vectors.npy", "graph.faiss", "index.json"),
)
FORMAT = 3
READ = (2, 3)
"""Formats that are read: before 3 there were graphs alone."""
BLOCK = 262_144
"""Items scored at once by the exact index: bounds its memory."""
APART = 0.05
"""How far the shorter vectors of an approximate index may be from what it makes of the whole ones, as a share of these."""
REMEMBERED = 65_536
"""Ids and rows that a reader keeps in memory, each."""
PAIRS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))
SCHEMA = pa.schema([("item_id", pa.string()), ("attributes", PAIRS), ("recent", pa.int64())])


class Foreign(ValueError):
    """An index that is damaged, or that belongs to other vectors than those asked for."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What an index holds of its items beside their vectors: attributes and recent events, by id."""

    item_ids: pa.Array
    attributes: pa.Array
    """Of type `PAIRS`, in the order of `item_ids`."""
    recent: pa.Array
    """Events of late, int64, in the order of `item_ids`: what is popular."""
    lists: Mapping[str, str] = field(default_factory=dict)
    """Attributes that hold several values in one text, and what parts them: `{"genres": ", "}`."""


NOTHING = Described(item_ids=pa.array([], pa.string()), attributes=pa.array([], PAIRS), recent=pa.array([], pa.int64()))

# -------------------------------------------------------------------------------------------------------------- building


def build(
    folder: Path,
    chunks: Iterable[tuple[list[str], Matrix]],
    items: int,
    width: int,
    graph: Graph | None,
    described: Described = NOTHING,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes the index of a space into an empty folder; the exact one holds one chunk in memory, the approximate one all vectors.

    `about` says what it belongs to: `space_id`, `recommender_id`, `ds`.
    """
    vector_ND = np.lib.format.open_memmap(folder / VECTORS, mode="w+", dtype=np.float32, shape=(items, width))
    hash_N = np.empty(items, np.uint64)
    at = 0
    with pa.OSFile(str(folder / ITEMS), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for ids, chunk_ND in chunks:
            vector_ND[at : at + len(ids)] = chunk_ND
            hash_N[at : at + len(ids)] = hashed(ids)
            writer.write_batch(batch_of(ids, described))
            at += len(ids)
    vector_ND.flush()
    order_N = np.argsort(hash_N, kind="stable")
    np.save(folder / HASHES, hash_N[order_N])
    np.save(folder / ROWS, order_N.astype(np.uint32))
    if graph is not None:
        faiss.write_index(nearest.grown(vector_ND, graph), str(folder / GRAPH))
    known = {"format": FORMAT, "items": items, "width": width, "approximate": graph is not None, **(about or {})}
    known |= {"lists": dict(described.lists)} if described.lists else {}
    (folder / ABOUT).write_text(json.dumps(known, indent=1, sort_keys=True))


def batch_of(ids: Sequence[str], described: Described) -> pa.RecordBatch:
    """Ids with what is known of them; without attributes and with no recent event where nothing is."""
    item_ids = pa.array(ids, pa.string())
    if len(described.item_ids):
        at = pc.index_in(item_ids, value_set=described.item_ids)
        attributes, recent = described.attributes.take(at), pc.fill_null(described.recent.take(at), 0)
    else:
        attributes, recent = pa.nulls(len(ids), PAIRS), pa.array(np.zeros(len(ids), np.int64))
    return pa.record_batch([item_ids, attributes, recent], schema=SCHEMA)


def hashed(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """A hash of each id, the same in every process."""
    digests = b"".join(hashlib.blake2b(item_id.encode(), digest_size=8).digest() for item_id in ids)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def digest_of(folder: Path) -> str:
    """SHA-256 over the names and digests of all files below a folder: the identity of an artifact. Holds no lock meanwhile."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as stream:
                lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- reading


class Index:
    """An index read from a folder; everything stays on disk until it is touched. Nothing changes it: threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
        if self.about.get("format") not in READ:
            raise Foreign(f"{folder} has format {self.about.get('format')}, not {FORMAT}: publish the space again")
        mapped = np.load(folder / VECTORS, mmap_mode="r")
        self.pages: Any = mapped._mmap
        """The file behind the vectors, which are a plain array: rows of a `memmap` cost several times as much to take."""
        self.vector_ND: Matrix = mapped.view(np.ndarray)
        self.hash_N = np.load(folder / HASHES, mmap_mode="r")
        self.row_N = np.load(folder / ROWS, mmap_mode="r")
        self.items: pa.Table = pa.ipc.open_file(pa.memory_map(str(folder / ITEMS))).read_all()
        self.ids: pa.ChunkedArray = self.items["item_id"]
        self.rows: dict[str, int] = {}
        """Rows of ids that were asked for, REMEMBERED at most; and ids of rows."""
        self.names: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.vector_ND)

    @functools.cached_property
    def item_ids(self) -> list[str]:
        """All ids in the order of the rows, as texts in memory; a process that serves asks for single ones instead."""
        return list(self.ids.to_pylist())

    @functools.cached_property
    def tree(self) -> Any:
        """The approximate index. Raises ValueError where none was built."""
        if not (self.folder / GRAPH).exists():
            raise ValueError(f"{self.folder} has no approximate index: publish with publish.approximate = true")
        return nearest.read(self.folder / GRAPH)

    def check(self, **belongs: object) -> None:
        """Raises Foreign where parts do not fit each other, or `index.json` names something else than `belongs`."""
        other = {name: self.about.get(name) for name, value in belongs.items() if self.about.get(name) != value}
        if other:
            raise Foreign(f"the index in {self.folder} belongs to {other}, not to {belongs}: publish the space again")
        sizes = {len(self.vector_ND), len(self.hash_N), len(self.row_N), len(self.ids), self.about["items"]}
        if self.about["approximate"]:
            sizes.add(self.tree.ntotal)
        if len(sizes) != 1 or self.vector_ND.shape[1] != self.about["width"]:
            raise Foreign(f"the index in {self.folder} has parts of {sorted(sizes)} items: publish the space again")
        sample = np.unique(np.linspace(0, len(self) - 1, min(64, len(self))).astype(np.int64))
        if self.about["approximate"]:
            row_S, kept_SD = nearest.kept(self.tree, sample)
            same_width = kept_SD.shape[1] == self.vector_ND.shape[1]
            if not same_width or apart(kept_SD, nearest.shortened(self.tree, self.vector_ND[row_S])) > APART:
                raise Foreign(f"the approximate index in {self.folder} was not built of these vectors: publish the space again")
        if not np.array_equal(self.rows_of([self.id_of(int(row)) for row in sample]), sample):
            raise Foreign(f"ids in {self.folder} do not lead back to their rows: publish the space again")

    def id_of(self, row: int) -> str:
        """The id of a row."""
        name = self.names.get(row)
        if name is None:
            name = self.names[row] = str(self.ids[row].as_py())
            bound(self.names)
        return name

    def rows_of(self, ids: Sequence[str]) -> Rows:
        """The row of each id, -1 where the space lacks it."""
        row_N = [self.rows.get(item_id, -1) for item_id in ids]
        if looked_up := [number for number, row in enumerate(row_N) if row < 0]:
            wanted_N = hashed([ids[number] for number in looked_up])
            places = np.searchsorted(self.hash_N, wanted_N)
            for number, wanted, at in zip(looked_up, wanted_N, places, strict=True):
                # two ids may share a hash: the text decides
                while at < len(self.hash_N) and self.hash_N[at] == wanted:
                    if self.id_of(row := int(self.row_N[at])) == ids[number]:
                        row_N[number] = self.rows[ids[number]] = row
                        break
                    at += 1
            bound(self.rows)
        return np.array(row_N, np.int64)

    def attributes_of(self, row: int) -> dict[str, str]:
        """Names and values of a row's item."""
        pairs = self.items["attributes"][row].as_py() or []
        return {pair["name"]: pair["value"] for pair in pairs}

    def having(self, name: str, values: Sequence[str]) -> npt.NDArray[np.bool_]:
        """mask_N of the items whose attribute has one of some values, as a whole or, of a list, among others.

        Raises KeyError for an attribute that no item has.
        """
        mask_N, known, start = np.zeros(len(self), np.bool_), False, 0
        wanted, between = pa.array(values, pa.string()), self.about.get("lists", {}).get(name)
        for chunk in self.items["attributes"].chunks:
            flat = chunk.flatten()
            named = pc.equal(flat.field("name"), name)
            known = known or bool(pc.any(named).as_py())
            rows, texts = pc.list_parent_indices(chunk).filter(named), flat.field("value").filter(named)
            mask_N[start + rows.filter(pc.is_in(texts, value_set=wanted)).to_numpy()] = True
            if between:
                parts = pc.split_pattern(texts, between)
                hit = pc.is_in(pc.utf8_trim_whitespace(parts.flatten()), value_set=wanted)
                mask_N[start + rows.take(pc.list_parent_indices(parts).filter(hit)).to_numpy()] = True
            start += len(chunk)
        if not known:
            raise KeyError(name)
        return mask_N

    def exact(self, query_QD: Matrix, count: int) -> tuple[Rows, Matrix]:
        """(row_QK, score_QK) of the items with the largest dot products, best first; K is `count` or all items there are."""
        return self.among(query_QD, np.arange(len(self)), count, whole=True)

    def among(self, query_QD: Matrix, row_N: Rows, count: int, whole: bool = False) -> tuple[Rows, Matrix]:
        """As `exact`, of some rows alone; `whole` says that these are all, which needs no copy of their vectors."""
        count = min(count, len(row_N))
        row_QK = np.empty((len(query_QD), 0), np.int64)
        score_QK = np.empty((len(query_QD), 0), np.float32)
        for start in range(0, len(row_N), BLOCK):
            some_N = row_N[start : start + BLOCK]
            emb_ND = self.vector_ND[start : start + BLOCK] if whole else self.vector_ND[some_N]
            block_QN = query_QD.astype(np.float32) @ np.asarray(emb_ND).T
            rows_QN = np.broadcast_to(some_N, block_QN.shape)
            score_QK, row_QK = best(np.hstack([score_QK, block_QN]), np.hstack([row_QK, rows_QN]), count)
        return row_QK, score_QK

    def approximate(
        self, query_QD: Matrix, count: int, breadth: int = 250, mask_N: npt.NDArray[np.bool_] | None = None
    ) -> tuple[Rows, Matrix]:
        """As `exact`, approximately, among the items of a mask; some of the best may be missed, and fewer than `count` found.

        Raises ValueError where there is none.
        """
        count = min(count, len(self))
        row_QC = self.candidates(query_QD, nearest.scored(count), breadth, mask_N)
        score_QC = np.einsum("qd,qcd->qc", query_QD, np.asarray(self.vector_ND[row_QC]))
        score_QC[row_QC < 0] = -np.inf
        score_QK, row_QK = best(score_QC, row_QC, count)
        found = int(np.isfinite(score_QK).sum(axis=1).min(initial=count))
        return row_QK[:, :found], score_QK[:, :found]

    def candidates(self, query_QD: Matrix, count: int, breadth: int, mask_N: npt.NDArray[np.bool_] | None = None) -> Rows:
        """row_QC of what the approximate index finds, see `nearest.candidates`."""
        return nearest.candidates(self.tree, query_QD, count, breadth, mask_N)


def bound(known: dict[Any, Any]) -> None:
    """Forgets all once there is more than may be kept; what is asked for often comes back."""
    if len(known) > REMEMBERED:
        known.clear()


def apart(one_ND: Matrix, other_ND: Matrix) -> float:
    """|one - other| / |other|."""
    return float(np.linalg.norm(one_ND - other_ND) / max(float(np.linalg.norm(other_ND)), 1e-30))


def best(score_QN: Matrix, row_QN: Rows, count: int) -> tuple[Matrix, Rows]:
    """The `count` largest scores of each query with their rows, best first; ties in the order of the rows."""
    if score_QN.shape[1] > count:
        at_QK = np.argpartition(-score_QN, count - 1, axis=1)[:, :count]
        score_QN, row_QN = np.take_along_axis(score_QN, at_QK, 1), np.take_along_axis(row_QN, at_QK, 1)
    order_QK = np.lexsort((row_QN, -score_QN), axis=1)
    return np.take_along_axis(score_QN, order_QK, 1), np.take_along_axis(row_QN, order_QK, 1)


def recall(index: Index, query_QD: Matrix, count: int = 10, breadth: int = 250) -> float:
    """Share of the exact neighbours that the approximate index finds."""
    exact_QK, _ = index.exact(query_QD, count)
    found_QK, _ = index.approximate(query_QD, count, breadth)
    return float(np.mean([np.isin(wanted, found).mean() for wanted, found in zip(exact_QK, found_QK, strict=True)]))
