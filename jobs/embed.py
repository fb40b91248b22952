"""`items`, an encoder -> `llm_embeddings`: each text is embedded once, ever; by shards, in parts that survive a kill."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from jobs.engines import registry
from jobs.lake import artifacts, manifests, partitions, tables
from jobs.lake.items import tombstones
from jobs.lake.locks import alone
from jobs.lake.partitions import Commit
from jobs.lake.tables import ITEMS, Table, llm_embeddings
from jobs.lake.tensors import pick_device
from jobs.run import InputError, Refused, Run
from models.text import fp8
from models.text.encoder import Encoder, check_packing, compile_layers, embed, load_encoder, read_spec
from models.text.prompts import prompts

CHUNK = 8192
"""Texts tokenized at once."""
SAMPLE = 512
"""Texts on which the encoder is tried before the first part."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which texts are embedded, by which encoder, and in which portions."""

    run: Run
    encoder: str = "champion"
    """`champion` (the one that serves), `latest` (of the newest `scft` run), `opponent` (of the recommender that `evaluate` will
    measure the newest one against) or `reference` (of the fixed reference; both do nothing where there is none yet), or an
    encoder's id."""
    shards: int = 1
    """Tasks that share the catalogue, by content hash."""
    shard: int = 0
    part_items: int = 50_000
    """Texts of a part: what a kill can cost, and what memory holds."""
    token_budget: int = 0
    """Tokens of a step; 0 suits the device. It halves where memory is short."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored values."""
    compile: bool = False
    """Compiles the model's layers: worth half a minute's start from some 50,000 texts on, on a GPU."""
    fp8: bool = False
    """8-bit linear layers (Hopper and later), which must first pass the gate against bf16 below."""
    fp8_cosine: float = 0.99
    """Smallest mean cosine between an 8-bit embedding and its bf16 one, on a sample."""
    fp8_overlap: float = 0.8
    """Smallest share of a text's 10 nearest neighbours in bf16 that stay so in 8 bits, on a sample."""
    gpu_hour_price: float = 2.5
    """What an hour of the device costs, for the cost per million items."""

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.shards:
            raise InputError(f"embed.shard {self.shard} must lie in [0, {self.shards}): shards are counted from 0")
        if self.part_items < 1 or self.token_budget < 0:
            raise InputError("embed.part_items must be at least 1 and embed.token_budget at least 0")

    @property
    def manifest(self) -> str:
        """A shard's manifest stands beside the others, and the opponent's beside the challenger's: all are of one date."""
        name = f"embed-{self.encoder}" if self.encoder in ("opponent", "reference") else "embed"
        return name if self.shards == 1 else f"{name}-{self.shard:05d}-of-{self.shards:05d}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was embedded, and at what cost."""

    encoder_id: str
    """Empty, like all else, where there is no opponent."""
    partition: str
    embedded: int
    """Texts embedded in this run."""
    resumed: int
    """Texts that an earlier, killed run had embedded."""
    known: int
    """Texts of the shard that had an embedding already."""
    cut: int
    """Texts longer than the model's window, cut at an attribute's border."""
    empty: int
    """Texts in which nothing is known of the item."""
    tokens: int
    tokens_per_second: float
    cost_per_million_items: float | None
    fp8_cosine: float | None
    fp8_overlap: float | None
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


@dataclass(kw_only=True)
class Tally:
    """Counts of a run, and its progress on standard error."""

    price: float
    total: int
    embedded: int = 0
    resumed: int = 0
    known: int = 0
    cut: int = 0
    empty: int = 0
    tokens: int = 0
    seconds: float = 0.0
    last: float = field(default_factory=time.monotonic)
    gate: tuple[float, float] | None = None
    """Cosine and neighbour overlap of 8 bits with bf16."""

    def cost(self) -> float | None:
        """Price of a million items at this run's speed."""
        return self.seconds / 3600 * self.price / self.embedded * 1e6 if self.embedded else None

    def step(self, items: int, tokens: int) -> None:
        """Takes a step's counts; says where the run stands at most every five seconds."""
        now = time.monotonic()
        self.embedded, self.tokens = self.embedded + items, self.tokens + tokens
        if now - self.last >= 5:
            self.seconds, self.last = self.seconds + now - self.last, now
            done = self.embedded + self.resumed + self.known
            left = (self.total - done) * self.seconds / max(self.embedded, 1)
            say(f"{done:,} of about {self.total:,} texts  {self.tokens / self.seconds:,.0f} tokens/s  {left:,.0f} s to go  "
                f"{self.cost():,.2f} per million items")  # fmt: skip


def run(config: Config) -> Result:
    """Embeds the texts of the shard that the encoder has not embedded yet and commits them at once.

    Two runs of a shard at once, as two DAGs may start them, go one after the other: the second finds all done.
    Raises InputError for an encoder that is not there or went away, embeddings that are not finite or all zero (with the
    items), or a full disk: finished parts are kept aside and the next run goes on from them. Refused when 8 bits fail the gate.
    """
    lake, snapshot = config.run.lake, partitions.latest(config.run.lake, ITEMS.name, config.run.ds)
    encoder_id = chosen(config)
    if not encoder_id:
        say("no recommender has served yet: none to measure against, so nothing to embed")
        return summed(Tally(price=config.gpu_hour_price, total=0))
    folder, device = registry.fetch(config.run, "encoder", encoder_id), pick_device(config.run)
    table = llm_embeddings(read_spec(folder).width, config.dtype)
    partition = f"encoder={encoder_id}/ds={config.run.ds}/shard={config.shard:05d}-of-{config.shards:05d}"
    items = partitions.read_commit(lake, ITEMS.name, snapshot)
    tally = Tally(price=config.gpu_hour_price, total=items.rows // config.shards)
    ready = cache(lambda: prepare(config, load_encoder(folder, device=device), snapshot, tally))
    try:
        with alone(lake, f"embed {encoder_id} {config.shard:05d}-of-{config.shards:05d}"):
            portions = missing(config, snapshot, encoder_id, tally)
            parts = [finished(part, config, ready, table, partition, tally) for part in portions]
            artifacts.find(lake, "encoder", encoder_id)
            commit = publish(lake, table, partition, parts)
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise InputError(f"the disk of {lake} is full: make room and run again; finished parts are kept") from error
        raise
    inputs = {"items": items.digest, "encoder": encoder_id}
    return summed(tally, encoder_id=encoder_id, partition=partition, device=str(device), inputs=inputs, commit=commit)


def summed(
    tally: Tally,
    *,
    encoder_id: str = "",
    partition: str = "",
    device: str = "",
    inputs: Mapping[str, str] | None = None,
    commit: Commit | None = None,
) -> Result:
    """A run's Result; without a commit that of a run that had nothing to do."""
    cost = tally.cost()
    return Result(
        encoder_id=encoder_id,
        partition=partition,
        embedded=tally.embedded,
        resumed=tally.resumed,
        known=tally.known,
        cut=tally.cut,
        empty=tally.empty,
        tokens=tally.tokens,
        tokens_per_second=round(tally.tokens / tally.seconds, 1) if tally.seconds else 0.0,
        cost_per_million_items=None if cost is None else round(cost, 4),
        fp8_cosine=tally.gate[0] if tally.gate else None,
        fp8_overlap=tally.gate[1] if tally.gate else None,
        device=device,
        inputs=dict(inputs or {}),
        outputs={"llm_embeddings": commit.digest} if commit else {},
        rows={"llm_embeddings": commit.rows} if commit else {},
    )


def chosen(config: Config) -> str:
    """The id of the configured encoder; "" for an opponent that is not there. Raises InputError where there is none."""
    if config.encoder == "latest":
        found: str = manifests.read(config.run.lake, config.run.ds, "scft")["result"]["encoder_id"]
        return found
    if config.encoder in ("opponent", "reference"):
        challenger_id = str(manifests.read(config.run.lake, config.run.ds, "rat")["result"]["recommender_id"])
        find = registry.opponent if config.encoder == "opponent" else registry.reference
        against = find(config.run, challenger_id)
        return registry.resolve(config.run, against)["encoder_id"] if against else ""
    if config.encoder != "champion":
        return config.encoder
    champion = registry.champion(config.run)
    if champion is None:
        raise InputError("embed.encoder is 'champion' but none has been promoted yet: set it to 'latest'")
    return champion["encoder_id"]


# ------------------------------------------------------------------------------------------------------- what is missing


def missing(config: Config, snapshot: str, encoder_id: str, tally: Tally) -> Iterator[pa.Table]:
    """Parts of the shard's texts without an embedding, in the snapshot's order; memory holds keys and one part."""
    lake = config.run.lake
    known = committed(lake, encoder_id, config)
    forgotten = pa.array(sorted(tombstones(lake)), pa.string())
    waiting: list[pa.Table] = []
    for batch in partitions.scan(lake, ITEMS, snapshot, columns=("item_id", "content_hash", "attributes")):
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.invert(pc.is_in(rows["item_id"], forgotten)))
        rows = first_of_each(rows.filter(in_shard(keys_of(rows["content_hash"]), config)))
        keys = keys_of(rows["content_hash"])
        there = pc.is_in(keys, known)
        tally.known += pc.sum(there).as_py() or 0
        waiting.append(rows.filter(pc.invert(there)))
        known = pa.concat_arrays([known, keys.filter(pc.invert(there))])
        while sum(table.num_rows for table in waiting) >= config.part_items:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, config.part_items)
            waiting = [whole.slice(config.part_items)]
    rest = pa.concat_tables(waiting) if waiting else None
    if rest is not None and rest.num_rows:
        yield rest


def committed(lake: Path, encoder_id: str, config: Config) -> pa.FixedSizeBinaryArray:
    """Keys of the shard's texts that the encoder has embedded in any partition."""
    found = [pa.array([], pa.binary(16))]
    for partition in partitions.committed(lake, "llm_embeddings", f"encoder={encoder_id}"):
        for name in partitions.read_commit(lake, "llm_embeddings", partition).files:
            with pq.ParquetFile(partitions.folder(lake, "llm_embeddings", partition) / name) as file:
                for batch in file.iter_batches(columns=["content_hash"]):
                    keys = keys_of(batch["content_hash"])
                    found.append(keys.filter(in_shard(keys, config)))
    return pa.concat_arrays(found)


def keys_of(hashes: pa.Array | pa.ChunkedArray) -> pa.FixedSizeBinaryArray:
    """The 16 bytes that each content hash writes in hexadecimal: they alone stay in memory for the whole catalogue."""
    written = bytes.fromhex("".join(hashes.to_pylist()))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(hashes), [None, pa.py_buffer(written)])


def in_shard(keys: pa.FixedSizeBinaryArray, config: Config) -> pa.Array:
    """Which keys belong to the shard, by their first four bytes."""
    head_N = np.frombuffer(keys.buffers()[1], ">u4", len(keys) * 4, keys.offset * 16)[::4]
    return pa.array(head_N % config.shards == config.shard)


def first_of_each(rows: pa.Table) -> pa.Table:
    """One row of each text, the first."""
    place = pa.array(np.arange(rows.num_rows))
    firsts = pa.table({"hash": rows["content_hash"], "place": place}).group_by("hash").aggregate([("place", "min")])
    return rows.take(np.sort(firsts["place_min"].to_numpy()))


# ----------------------------------------------------------------------------------------------------------------- parts


def finished(part: pa.Table, config: Config, ready: Callable[[], Encoder], table: Table, partition: str, tally: Tally) -> Path:
    """The file of a part, embedded now or by a run that was killed. It carries the name of its texts, so it is never mistaken."""
    aside = partitions.folder(config.run.lake, table.name, partition) / ".parts"
    name = hashlib.sha256("\n".join([config.dtype, str(config.fp8), *part["content_hash"].to_pylist()]).encode()).hexdigest()
    path = aside / f"{name[:32]}.parquet"
    if path.exists():
        tally.resumed += part.num_rows
        return path
    aside.mkdir(parents=True, exist_ok=True)
    encoder = ready()
    started, before = time.monotonic(), tally.seconds
    tally.last = started
    rows = tables.check(table, embedded(part, encoder, config, tally), f"{table.name}/{partition}")
    unfinished = path.with_suffix(".unfinished")
    pq.write_table(rows, unfinished, compression="zstd")
    with unfinished.open("rb") as stream:
        os.fsync(stream.fileno())
    unfinished.replace(path)
    tally.seconds = before + time.monotonic() - started
    return path


def embedded(part: pa.Table, encoder: Encoder, config: Config, tally: Tally) -> pa.Table:
    """A part's rows of `llm_embeddings`. Raises InputError with the items whose embedding is not finite or zero."""
    chunks = [part.slice(start, CHUNK) for start in range(0, part.num_rows, CHUNK)]
    found = []
    with ThreadPoolExecutor(1) as aside:  # tokenizes a chunk while the one before is embedded
        for texts in aside.map(lambda chunk: encoder.tokenize(attributes(chunk)), chunks):
            whole, cut = prompts(texts, np.arange(len(texts)), encoder.limit)
            tally.cut, tally.empty = tally.cut + cut, tally.empty + texts.empty
            with np.errstate(over="ignore"):  # what overflows is refused below, with its items
                found.append(embed(encoder, whole, budget=config.token_budget, log=tally.step).astype(config.dtype))
    emb_BE = np.concatenate(found)
    refuse_bad_rows(emb_BE, part["item_id"])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(emb_BE.ravel()), emb_BE.shape[1])
    return pa.table({"item_id": part["item_id"], "content_hash": part["content_hash"], "embedding": vectors})


def attributes(rows: pa.Table) -> Iterator[list[tuple[str, str]]]:
    """(name, value) pairs of each item."""
    return ([(entry["name"], entry["value"]) for entry in item.as_py()] for item in rows["attributes"])


def refuse_bad_rows(emb_BE: NDArray[np.floating], item_ids: pa.ChunkedArray) -> None:
    """Raises InputError that names the items whose embedding is infinite, NaN or zero."""
    bad = np.flatnonzero(~np.isfinite(emb_BE).all(1) | ~emb_BE.any(1))
    if len(bad):
        named = ", ".join(item_ids.take(pa.array(bad[:20])).to_pylist())
        raise InputError(f"{len(bad)} embeddings are not finite or all zero, of items {named}{'…' if len(bad) > 20 else ''}: "
                         "look at their texts; if values overflow float16, set embed.dtype to float32")  # fmt: skip


def publish(lake: Path, table: Table, partition: str, parts: list[Path]) -> Commit:
    """Commits the partition: what it held already, and the new parts behind it. Parts are linked, so a kill loses none."""
    here = partitions.folder(lake, table.name, partition)
    before = partitions.read_commit(lake, table.name, partition) if (here / partitions.COMMIT).exists() else None
    if before and not parts:
        commit = before
    elif not parts:
        commit = partitions.write(lake, table, partition, [])
    else:
        held = [here / name for name in before.files] if before else []
        commit = partitions.commit_files(lake, table.name, partition, [*held, *map(link, parts)])
    shutil.rmtree(here / ".parts", ignore_errors=True)
    return commit


def link(part: Path) -> Path:
    """A second name of a finished part, for the commit to move."""
    name = part.parent.parent / f".{part.name}"
    name.unlink(missing_ok=True)
    os.link(part, name)
    return name


# --------------------------------------------------------------------------------------------------- before the first part


def prepare(config: Config, encoder: Encoder, snapshot: str, tally: Tally) -> Encoder:
    """The encoder, once it is sure that items don't see each other, with 8 bits (past their gate) and compilation turned on."""
    batch = next(partitions.scan(config.run.lake, ITEMS, snapshot, columns=("attributes",), batch_rows=SAMPLE))
    sample = attributes(pa.Table.from_batches([batch]))
    texts = encoder.tokenize(sample)
    whole, _ = prompts(texts, np.arange(len(texts)), encoder.limit)
    check_packing(encoder, whole)
    if config.fp8:
        exact = embed(encoder, whole)
        fp8.convert(encoder.model)
        cosine, overlap = tally.gate = fp8.agreement(torch.from_numpy(exact), torch.from_numpy(embed(encoder, whole)))
        if cosine < config.fp8_cosine or overlap < config.fp8_overlap:
            raise Refused(f"8-bit embeddings differ too much from bf16: cosine {cosine:.4f} (at least {config.fp8_cosine}), "
                          f"neighbour overlap {overlap:.3f} (at least {config.fp8_overlap}): set embed.fp8 to false")  # fmt: skip
    if config.compile:
        compile_layers(encoder)
    return encoder


def say(line: str) -> None:
    """One line on standard error."""
    print(f"embed: {line}", file=sys.stderr, flush=True)
