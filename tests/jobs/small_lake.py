"""A small lake with items, sequences and embeddings of two dates, for the jobs that train and project."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.lake import manifests, partitions
from jobs.lake.items import content_hash
from jobs.lake.tables import ATTRIBUTES, ITEMS, SEQUENCES, llm_embeddings
from jobs.run import Run, as_json
from models.text.encoder import Spec, save_encoder
from models.text.prompts import FieldPolicy

DS = "2026-03-10"
LATER = "2026-03-24"
"""A snapshot that no run of DS may see: other texts, an item more, and users who walk the other way."""
ENCODER = "e0e0e0e0e0e0e0e0"
ITEM_COUNT, USER_COUNT, WIDTH = 20, 24, 12


def item_rows(ds: str = DS) -> pa.Table:
    """Items i00…i19; i18 has the text of i17. At LATER one item more, and i00 has another text."""
    count = ITEM_COUNT if ds == DS else ITEM_COUNT + 1
    texts = [f"text {17 if number == 18 else number}" for number in range(count)]
    if ds != DS:
        texts[0] = "another text"
    attributes = [[{"name": "title", "value": text}] for text in texts]
    return pa.table(
        {
            "item_id": [f"i{number:02d}" for number in range(count)],
            "attributes": pa.array(attributes, ATTRIBUTES),
            "content_hash": [content_hash([("title", text)]) for text in texts],
            "first_seen_ds": [DS] * count,
        }
    )


def sequence_rows(ds: str = DS, tested: str = "") -> pa.Table:
    """Users walk i00…i18 in a circle, so that nobody touches i19; the last user has a single event.

    `tested` is the item of every second user's test event; at LATER users walk the other way.
    """
    way = 1 if ds == DS else -1
    lists = [
        [f"i{(user + way * step) % 19:02d}" for step in range(8 if user < USER_COUNT - 1 else 1)] for user in range(USER_COUNT)
    ]
    if tested:
        lists[:-1:2] = [[*events[:-1], tested] for events in lists[:-1:2]]
    lengths = [len(events) for events in lists]
    return pa.table(
        {
            "user_id": [f"u{user}" for user in range(USER_COUNT)],
            "item_ids": lists,
            "timestamps": [[7] * length for length in lengths],
            "train_end": pa.array([max(length - 2, 1) for length in lengths], pa.int32()),
            "valid_end": pa.array([max(length - 1, 1) for length in lengths], pa.int32()),
        }
    )


def embedding_rows(hashes: list[str]) -> pa.Table:
    """One random embedding a text, always the same."""
    vectors = np.stack([np.random.default_rng(int(text[:8], 16)).normal(size=WIDTH) for text in hashes]).astype(np.float16)
    flat = pa.array(vectors.ravel(), pa.float16())
    return pa.table(
        {
            "item_id": [f"of {text}" for text in hashes],
            "content_hash": hashes,
            "embedding": pa.FixedSizeListArray.from_arrays(flat, WIDTH),
        }
    )


def keep_encoder(lake: Path, *, from_users: bool = False) -> None:
    """The encoder's artifact: what it is, without weights."""
    spec = Spec(base="none", base_sha256="", tokenizer_sha256="", policy=FieldPolicy(), lora=None, pooling="mean", layers=0,
                max_tokens=64, width=WIDTH, from_users=from_users)  # fmt: skip
    folder = lake / "models" / "encoder" / ENCODER
    folder.mkdir(parents=True, exist_ok=True)
    save_encoder(folder, spec, None)


def make(path: Path) -> Run:
    """The run of DS in a lake in which `extract`, `scft` and `embed` (in two partitions) have run, and for LATER too."""
    run = Run(ds=DS, lake=path / "lake", device="cpu")
    for ds in (DS, LATER):
        partitions.write(run.lake, ITEMS, f"ds={ds}", [item_rows(ds)])
        partitions.write(run.lake, SEQUENCES, f"ds={ds}", [sequence_rows(ds)])
    hashes = sorted({text for ds in (DS, LATER) for text in item_rows(ds)["content_hash"].to_pylist()})
    for number, part in enumerate((hashes[:7], hashes[7:])):
        partitions.write(run.lake, llm_embeddings(WIDTH), f"encoder={ENCODER}/shard={number}", [embedding_rows(part)])
    keep_encoder(run.lake)
    remember(run, "scft", {"encoder_id": ENCODER})
    remember(dataclasses.replace(run, ds=LATER), "scft", {"encoder_id": "f" * 16})
    return run


def remember(run: Run, job: str, result: object, config: object = None) -> None:
    """Writes the manifest that the command line would have written."""
    manifest = {"ds": run.ds, "status": "done", "result": as_json(result), "config": as_json(config), "variant": run.variant}
    manifests.append(run.lake, run.ds, job, manifest)
