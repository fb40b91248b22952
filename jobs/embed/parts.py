"""Parts of a shard: embedded, and kept aside under the name of their rows, so that a kill loses none."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jobs.embed.config import Config
from jobs.embed.tally import Tally
from jobs.lake import tables
from jobs.lake.parts import part_path, write_part
from jobs.lake.tables import Table
from jobs.run import InputError
from models.text.embedding import embed
from models.text.encoder import Encoder
from models.text.prompts import prompts

CHUNK = 8192
"""Texts tokenized at once."""


def finished(part: pa.Table, config: Config, ready: Callable[[], Encoder], table: Table, partition: str, tally: Tally) -> Path:
    """The file of a part, embedded now or by a run that was killed. It carries the name of its rows, so it is never mistaken."""
    # of the items too: one may have been forgotten since, and its text be another's
    named = [*part["content_hash"].to_pylist(), *part["item_id"].to_pylist()]
    name = hashlib.sha256("\n".join([config.dtype, str(config.fp8), *named]).encode()).hexdigest()
    path = part_path(config.run.lake, table, partition, name[:32])
    if path.exists():
        tally.resumed += part.num_rows
        return path
    encoder = ready()
    started, before = time.monotonic(), tally.seconds
    tally.start()
    rows = tables.check(table, embedded(part, encoder, config, tally), f"{table.name}/{partition}")
    write_part(path, rows)
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
