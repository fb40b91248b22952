"""The border between the lake and torch: tables as flat tensors, the device, and a training's progress and checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import save_file
from torch import Tensor

from jobs.lake import partitions
from jobs.lake.items import live_items, texts
from jobs.lake.store import called
from jobs.lake.tables import ITEMS, SEQUENCES
from jobs.run import InputError, Run, as_json, code_revision
from models.behaviour.data import Histories, histories
from models.text.prompts import LEAKS, normalised_name


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """The items of a snapshot in the order of their ids: item i has index i + 1, index 0 is padding."""

    item_ids: tuple[str, ...]
    content_hashes: pa.StringArray
    digest: str


def pick_device(run: Run) -> torch.device:
    """The device of `run.device`; under `torchrun` each process takes the GPU of its own number.

    Raises InputError for CUDA where there is none.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if run.device == "auto" else run.device
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"run.device is {run.device!r} but torch sees no GPU: set it to auto or cpu")
    if wanted == "cuda" and (local := os.environ.get("LOCAL_RANK")):
        wanted = f"cuda:{local}"
    device = torch.device(wanted)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def progress_log(job: str, epochs: int | None = None) -> Callable[[dict[str, float], int], None]:
    """A `log(metrics, step)` that logs one line at most every two seconds; of a known number of epochs also the seconds left.

    They are `at most`, as a training may stop early. Steps count from 1, or go on where a checkpoint was resumed.
    """
    last, told = -2.0, logging.getLogger(f"jobs.{job}")
    began, done = time.monotonic(), 0

    def log(metrics: dict[str, float], step: int) -> None:
        nonlocal last, done
        done, now = done + 1, time.monotonic()
        if now - last >= 2:
            last = now
            written = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            left = 0 if epochs is None else epochs - step
            estimate = f"  at most {left * (now - began) / done:,.0f} s to go" if left > 0 else ""
            told.info("epoch %d  %s%s", step, written, estimate)

    return log


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors of any device as one safetensors file."""
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)


def checkpoint_path(job: str, config: object, inputs: Mapping[str, str], lake: Path) -> Path:
    """Where a training keeps its progress: equal settings on equal inputs resume, anything else starts anew."""
    known = json.dumps([as_json(config), dict(inputs), code_revision()], sort_keys=True)
    return lake / "checkpoints" / f"{job}-{hashlib.sha256(known.encode()).hexdigest()[:16]}.safetensors"


def read_catalogue(run: Run) -> Catalogue:
    """The newest `items` at or before ds, without what was forgotten. Raises InputError where nothing is left."""
    partition = partitions.latest(run.lake, ITEMS.name, run.ds)
    batches = list(live_items(run.lake, partition, ("item_id", "content_hash")))
    rows = (pa.Table.from_batches(batches) if batches else ITEMS.schema.empty_table()).sort_by("item_id")
    if not rows.num_rows:
        raise InputError(f"items/{partition} holds no item: extract a catalogue first")
    return Catalogue(
        item_ids=tuple(rows["item_id"].to_pylist()),
        content_hashes=rows["content_hash"].combine_chunks(),
        digest=partitions.read_commit(run.lake, ITEMS.name, partition).digest,
    )


def texts_of(catalogue: Catalogue) -> Tensor:
    """text_V: a number for each different text of the catalogue, -1 for padding."""
    number_N = catalogue.content_hashes.dictionary_encode().indices.to_numpy()
    return torch.cat([torch.tensor([-1]), torch.from_numpy(number_N.astype("int64"))])


def said_without_leaks(run: Run, catalogue: Catalogue) -> list[str]:
    """What is said of each item, in the catalogue's order, without the fields that leak popularity."""
    leaks = {normalised_name(name) for name in LEAKS}
    return texts(run.lake, run.ds, catalogue.item_ids, lambda name: normalised_name(name) not in leaks)


def read_histories(run: Run, item_ids: Sequence[str]) -> tuple[Histories, str]:
    """The newest `sequences` at or before ds over a catalogue, on the CPU, and their digest; users stay in the table's order.

    Raises InputError for an item of the logs that the catalogue lacks.
    """
    partition = partitions.latest(run.lake, SEQUENCES.name, run.ds)
    rows = partitions.read(run.lake, SEQUENCES, partition)
    known = pa.array(item_ids, pa.string())
    lists = rows["item_ids"].combine_chunks()
    index = pc.index_in(lists.flatten(), value_set=known)
    if index.null_count:
        strange = pc.filter(lists.flatten(), pc.is_null(index))[0].as_py()
        raise InputError(f"sequences/{partition} has {index.null_count} events of items that are not in the catalogue, "
                         f"for example {strange!r}: extract items and sequences of one ds together")  # fmt: skip
    length = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    events = histories(
        offsets=torch.from_numpy(np.concatenate([[0], length.cumsum()]).astype(np.int64)),
        items=torch.from_numpy(index.to_numpy(zero_copy_only=False).astype(np.int64) + 1),
        timestamps=torch.from_numpy(rows["timestamps"].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()),
        train_end=torch.from_numpy(rows["train_end"].to_numpy().astype(np.int64)),
        valid_end=torch.from_numpy(rows["valid_end"].to_numpy().astype(np.int64)),
        catalogue=len(item_ids),
    )
    return events, partitions.read_commit(run.lake, SEQUENCES.name, partition).digest


def embedding_batches(
    run: Run, encoder_id: str, tables: Sequence[str] = ("llm_embeddings",)
) -> Iterator[tuple[pa.Array, Tensor]]:
    """(content hashes, llm_NE) of everything that an encoder embedded, in bounded batches.

    Raises InputError where it has embedded nothing yet.
    """
    found = [(table, name) for table in tables for name in partitions.committed(run.lake, table, f"encoder={encoder_id}")]
    if not found:
        raise InputError(f"encoder {encoder_id} has no embeddings in the lake {called(run.lake)}: run embed")
    columns = ["content_hash", "embedding"]
    for table, partition in found:
        for file in partitions.read_files(run.lake, table, partition, columns):
            for batch in file.iter_batches(batch_size=65_536, columns=columns):
                yield batch["content_hash"], as_matrix(batch["embedding"])


def as_matrix(vectors: pa.FixedSizeListArray) -> Tensor:
    """A column of fixed-size lists as a matrix, in its own float type."""
    flat = vectors.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(flat.copy()).view(len(vectors), vectors.type.list_size)


def read_embeddings(run: Run, encoder_id: str, wanted: pa.StringArray, tables: Sequence[str] = ("llm_embeddings",)) -> Tensor:
    """llm_NE of content hashes, in the order given and in the widest float type of its parts; equal texts share one embedding.

    Of a text in several of the `tables` the last one counts.

    Raises InputError for texts that the encoder has not embedded, with their number, and for values that are not finite.
    """
    unique = wanted.unique()
    llm_UE: Tensor | None = None
    found = np.zeros(len(unique), dtype=bool)
    for hashes, llm_BE in embedding_batches(run, encoder_id, tables):
        if llm_UE is None:
            llm_UE = torch.zeros(len(unique), llm_BE.shape[1], dtype=llm_BE.dtype)
        llm_UE = llm_UE.to(torch.promote_types(llm_UE.dtype, llm_BE.dtype))  # `embed.dtype` may change between two nights
        place = pc.index_in(hashes, value_set=unique).to_numpy(zero_copy_only=False)
        mine = ~np.isnan(place.astype(float))
        rows = torch.from_numpy(place[mine].astype(np.int64))
        llm_UE[rows] = llm_BE[torch.from_numpy(mine)].to(llm_UE.dtype)
        found[rows.numpy()] = True
    missing = pc.sum(pc.is_in(wanted, unique.filter(pa.array(~found)))).as_py() or 0
    if llm_UE is None or missing:
        raise InputError(
            f"{missing or len(wanted)} of {len(wanted)} items have no embedding under encoder {encoder_id}: run embed"
        )
    if not bool(llm_UE.isfinite().all()):
        raise InputError(f"encoder {encoder_id} has embeddings that are not finite: remove them and run embed")
    return llm_UE[torch.from_numpy(pc.index_in(wanted, value_set=unique).to_numpy().astype(np.int64))]


def embeddings_digest(run: Run, encoder_id: str) -> str:
    """Identity of all that an encoder embedded so far."""
    digests = [
        partitions.read_commit(run.lake, "llm_embeddings", partition).digest
        for partition in partitions.committed(run.lake, "llm_embeddings", f"encoder={encoder_id}")
    ]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
