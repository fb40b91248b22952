"""`llm_embeddings`, a recommender -> `item_embeddings` of one space: every item's vector, in bounded batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jobs.engines import registry
from jobs.lake import arrivals, artifacts, partitions
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.items import without_forgotten
from jobs.lake.tables import ITEMS, SEQUENCES, Table, item_embeddings, space_of
from jobs.lake.tensors import embeddings_digest, pick_device, read_embeddings
from jobs.run import InputError, Run
from models.behaviour.artifact import Loaded, load_recommender
from models.behaviour.data import GROUPS, item_groups


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which recommender projects, and how much of the catalogue is held at once."""

    run: Run
    recommender: str = "champion"
    """`champion`, `latest` (of the newest `rat` run), `previous`, or a recommender's id."""
    arriving: bool = False
    """Projects what arrived since the snapshot of ds (`extract.arriving`), to be laid over that snapshot's vectors."""
    pass_items: int = 1_000_000
    """Items joined with their embeddings at once; a larger catalogue takes several passes over both tables."""
    batch_rows: int = 65_536
    """Items projected at once, and rows of one Parquet file."""

    def __post_init__(self) -> None:
        if self.pass_items < 1 or self.batch_rows < 1:
            raise InputError("project.pass_items and project.batch_rows must be at least 1")

    @property
    def items(self) -> Table:
        """Which items are projected."""
        return ARRIVING_ITEMS if self.arriving else ITEMS

    @property
    def manifest(self) -> str:
        """What arrives between nights is no part of a night's record."""
        return "arriving-project" if self.arriving else "project"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The space written."""

    space_id: str
    encoder_id: str
    recommender_id: str
    width: int
    groups: dict[str, int]
    """Items by train interactions: cold, tail, head."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Replaces partition `space=SPACE/ds=DATE` of `item_embeddings`, or of `arriving_embeddings`.

    Raises InputError for items without an embedding (run embed), a catalogue of another date, or a recommender that is not there;
    ValueError for a vector that is zero or not finite. The partition of before then stays.
    """
    lake = config.run.lake
    chosen = registry.resolve(config.run, config.recommender)
    encoder_id, recommender_id = chosen["encoder_id"], chosen["recommender_id"]
    recommender = load_recommender(artifacts.find(lake, "recommender", recommender_id), pick_device(config.run))
    space_id = space_of(encoder_id, recommender_id)
    items, sequences = snapshots(config)
    counted = dict.fromkeys(GROUPS, 0)
    parts = counting_groups(vectors(config, recommender, space_id, items, sequences), counted)
    made = arrivals.item_embeddings if config.arriving else item_embeddings
    commit = partitions.write(lake, made(recommender.width), f"space={space_id}/ds={config.run.ds}", parts)
    inputs = {
        "items": partitions.read_commit(lake, config.items.name, items).digest,
        "sequences": partitions.read_commit(lake, SEQUENCES.name, sequences).digest,
        "llm_embeddings": embeddings_digest(config.run, encoder_id),
        "encoder": encoder_id,
        "recommender": recommender_id,
    }
    return Result(
        space_id=space_id, encoder_id=encoder_id, recommender_id=recommender_id, width=recommender.width, groups=counted,
        inputs=inputs, outputs={commit.table: commit.digest}, rows={commit.table: commit.rows},
    )  # fmt: skip


def vectors(config: Config, recommender: Loaded, space_id: str, items: str, sequences: str) -> Iterator[pa.Table]:
    """Rows of every item's vector, a batch at a time."""
    sources = ("llm_embeddings", arrivals.LLM) if config.arriving else ("llm_embeddings",)
    encoder_id, warm = str(recommender.meta["encoder_id"]), warm_groups(config.run, sequences)
    for rows in passes(config, items):
        llm_NE = read_embeddings(config.run, encoder_id, rows["content_hash"].combine_chunks(), sources)
        for start in range(0, rows.num_rows, config.batch_rows):
            some = rows.slice(start, config.batch_rows)
            yield projected(some, llm_NE[start : start + config.batch_rows], recommender, space_id, warm)


def counting_groups(parts: Iterator[pa.Table], counted: dict[str, int]) -> Iterator[pa.Table]:
    """The same parts; `counted` then has the items of each group."""
    for part in parts:
        for group in GROUPS:
            counted[group] += pc.sum(pc.equal(part["group"], group)).as_py()
        yield part


def snapshots(config: Config) -> tuple[str, str]:
    """Partitions of the items and of `sequences`. Raises InputError for items of another date."""
    lake = config.run.lake
    items, sequences = (partitions.latest(lake, table.name, config.run.ds) for table in (config.items, SEQUENCES))
    if items != f"ds={config.run.ds}":
        found = items.removeprefix("ds=")
        raise InputError(
            f"the newest snapshot of the catalogue is of {found}, and its vectors must not bear the date {config.run.ds}: run "
            f"extract for {config.run.ds}, or project with --ds {found}"
        )
    return items, sequences


def passes(config: Config, partition: str) -> Iterator[pa.Table]:
    """The catalogue's (item_id, content_hash), at most about `pass_items` at once: ranges of the hash, which is even."""
    lake = config.run.lake
    count = max(1, -(-partitions.read_commit(lake, config.items.name, partition).rows // config.pass_items))
    bounds = [f"{number * 16**8 // count:08x}" for number in range(count)] + ["g"]
    for low, high in itertools.pairwise(bounds):
        found = []
        rows = partitions.scan(lake, config.items, partition, ("item_id", "content_hash"))
        for batch in without_forgotten(lake, rows):
            inside = pc.and_(pc.greater_equal(batch["content_hash"], low), pc.less(batch["content_hash"], high))
            found.append(batch.filter(inside))
        if any(batch.num_rows for batch in found):
            yield pa.Table.from_batches(found).sort_by("item_id")


def warm_groups(run: Run, partition: str) -> pa.Table:
    """(item_id, group) of every item with a train event; all others are cold."""
    counts = pa.table({"item_id": pa.array([], pa.string()), "count": pa.array([], pa.int64())})
    for batch in partitions.scan(run.lake, SEQUENCES, partition, columns=("item_ids", "train_end")):
        length = pc.list_value_length(batch["item_ids"]).to_numpy(zero_copy_only=False)
        position = np.arange(length.sum()) - np.repeat(length.cumsum() - length, length)
        in_train = pa.array(position < np.repeat(batch["train_end"].to_numpy(zero_copy_only=False), length))
        items = batch["item_ids"].flatten().filter(in_train)
        new = pa.table({"item_id": items, "count": pa.array(np.ones(len(items), dtype=np.int64))})
        merged = pa.concat_tables([counts, new]).group_by("item_id").aggregate([("count", "sum")])
        counts = merged.rename_columns(["item_id", "count"]).select(["item_id", "count"])
    counts = counts.sort_by("item_id")
    group_V = item_groups(torch.tensor([0, *counts["count"].to_pylist()]))
    return pa.table({"item_id": counts["item_id"], "group": [GROUPS[group] for group in group_V[1:].tolist()]})


def projected(rows: pa.Table, llm_NE: torch.Tensor, recommender: Loaded, space_id: str, warm: pa.Table) -> pa.Table:
    """Rows of `item_embeddings`. Raises ValueError for a vector that is zero or not finite."""
    emb_ND = recommender.project(llm_NE, rows["item_id"].to_pylist()).cpu()
    bad_N = ~emb_ND.isfinite().all(1) | (emb_ND == 0).all(1)
    if bool(bad_N.any()):
        raise ValueError(f"{int(bad_N.sum())} items have a vector that is zero or not finite, for example "
                         f"{rows['item_id'][int(bad_N.nonzero()[0])]}: the recommender is broken, or none of its parts reads "
                         "text and the item is new; train it again, with a part in rat.fusion.parts that does")  # fmt: skip
    group = warm["group"].take(pc.index_in(rows["item_id"], value_set=warm["item_id"].combine_chunks()))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(emb_ND.flatten().numpy()), recommender.width)
    return pa.table(
        {
            "item_id": rows["item_id"],
            "space_id": pa.repeat(space_id, rows.num_rows),
            "embedding": vectors,
            "content_hash": rows["content_hash"],
            "group": pc.fill_null(group, GROUPS[0]),
        }
    )
