"""`items`, an encoder -> `llm_embeddings`: each text is embedded once, ever; by shards, in parts that survive a kill."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import torch

from jobs.embed.config import Config as Config
from jobs.embed.missing import missing
from jobs.embed.parts import attributes, finished
from jobs.embed.tally import Tally
from jobs.engines import registry
from jobs.lake import arrivals, artifacts, manifests, partitions
from jobs.lake.locks import alone
from jobs.lake.partitions import Commit
from jobs.lake.parts import commit_parts
from jobs.lake.tables import ITEMS, llm_embeddings
from jobs.lake.tensors import pick_device
from jobs.run import InputError, Refused
from models.text import fp8
from models.text.embedding import check_packing, compile_layers, embed
from models.text.encoder import Encoder, load_encoder, read_spec
from models.text.prompts import prompts

log = logging.getLogger(__name__)
SAMPLE = 512
"""Texts on which the encoder is tried before the first part."""


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


def run(config: Config) -> Result:
    """Embeds the texts of the shard that the encoder has not embedded yet and commits them at once.

    Two runs of a shard at once, as two DAGs may start them, go one after the other: the second finds all done.
    Raises InputError for an encoder that is not there or went away, embeddings that are not finite or all zero (with the
    items), or a full disk: finished parts are kept aside and the next run goes on from them. Refused when 8 bits fail the gate.
    """
    lake, snapshot = config.run.lake, snapshot_of(config)
    encoder_id = chosen(config)
    if not encoder_id:
        log.info("no recommender has served yet: none to measure against, so nothing to embed")
        return summed(Tally(price=config.gpu_hour_price, total=0))
    folder, device = registry.fetch(config.run, "encoder", encoder_id), pick_device(config.run)
    made = arrivals.llm_embeddings if config.arriving else llm_embeddings
    table = made(read_spec(folder).width, config.dtype)
    partition = partition_of(config, encoder_id)
    items = partitions.read_commit(lake, config.items.name, snapshot)
    tally = Tally(price=config.gpu_hour_price, total=items.rows // config.shards)
    ready = cache(lambda: prepare(config, load_encoder(folder, device=device), snapshot, tally))
    try:
        with alone(lake, f"{'arriving ' if config.arriving else ''}embed {encoder_id} {config.shard:05d}-of-{config.shards:05d}"):
            portions = missing(config, snapshot, encoder_id, tally)
            parts = [finished(part, config, ready, table, partition, tally) for part in portions]
            artifacts.find(lake, "encoder", encoder_id)
            commit = commit_parts(lake, table, partition, parts, config.part_items)
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise InputError(f"the disk of {lake} is full: make room and run again; finished parts are kept") from error
        raise
    finally:
        tally.close()
    inputs = {"items": items.digest, "encoder": encoder_id}
    return summed(tally, encoder_id=encoder_id, partition=partition, device=str(device), inputs=inputs, commit=commit)


def partition_of(config: Config, encoder_id: str) -> str:
    """One of an encoder and a shard for all nights, as a text is embedded once, ever; what arrived goes with its snapshot."""
    when = f"/ds={config.run.ds}" if config.arriving else ""
    return f"encoder={encoder_id}{when}/shard={config.shard:05d}-of-{config.shards:05d}"


def snapshot_of(config: Config) -> str:
    """The newest snapshot up to ds; of what arrived that of ds alone, for it is told against that one."""
    return f"ds={config.run.ds}" if config.arriving else partitions.latest(config.run.lake, ITEMS.name, config.run.ds)


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
        outputs={commit.table: commit.digest} if commit else {},
        rows={commit.table: commit.rows} if commit else {},
    )


def chosen(config: Config) -> str:
    """The id of the configured encoder; "" for an opponent that is not there. Raises InputError where there is none."""
    if config.encoder == "latest":
        found: str = manifests.latest(config.run, "scft")["encoder_id"]
        return found
    if config.encoder in ("opponent", "reference"):
        challenger_id = str(manifests.latest(config.run, "rat")["recommender_id"])
        find = registry.opponent if config.encoder == "opponent" else registry.reference
        against = find(config.run, challenger_id)
        return registry.resolve(config.run, against)["encoder_id"] if against else ""
    if config.encoder != "champion":
        return config.encoder
    champion = registry.champion(config.run)
    if champion is None:
        raise InputError("embed.encoder is 'champion' but none has been promoted yet: set it to 'latest'")
    return champion["encoder_id"]


def prepare(config: Config, encoder: Encoder, snapshot: str, tally: Tally) -> Encoder:
    """The encoder, once it is sure that items don't see each other, with 8 bits (past their gate) and compilation turned on."""
    batch = next(partitions.scan(config.run.lake, config.items, snapshot, columns=("attributes",), batch_rows=SAMPLE))
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
