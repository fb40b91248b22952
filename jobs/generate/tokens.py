"""The published codes of a catalogue, in its order, and whether their books still make them.

Shapes: N items, K books.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jobs.generate.config import Config
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.tables import ITEM_CODES, space_of
from jobs.lake.tensors import Catalogue
from jobs.run import InputError
from models.behaviour.codes import Books, load_books


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Codes of the catalogue's items."""

    books_id: str
    entries: int
    of_vectors: bool
    """Codes are of the space's vectors, not of LLM embeddings."""
    code_NK: Tensor
    number_N: Tensor
    books: Books


def read_tokens(config: Config, catalogue: Catalogue, encoder_id: str, recommender_id: str) -> Tokens:
    """The codes of ds. Raises InputError where there are none, they are of another space, or an item lacks them."""
    books_id = str(manifests.latest(config.run, "codes")["books_id"]) if config.books == "latest" else config.books
    model, known = load_books(artifacts.find(config.run.lake, "books", books_id))
    own = (f"space {space_of(encoder_id, recommender_id)}", f"encoder {encoder_id}")
    if known["source"] not in own:
        raise InputError(f"books {books_id} are of {known['source']}, the vectors of {own[0]}: run codes for it first")
    rows = partitions.read(config.run.lake, ITEM_CODES, f"books={books_id}/ds={config.run.ds}")
    place = pc.index_in(pa.array(catalogue.item_ids, pa.string()), value_set=rows["item_id"].combine_chunks())
    if place.null_count:
        strange = catalogue.item_ids[pc.is_null(place).to_pylist().index(True)]
        raise InputError(f"{place.null_count} items have no codes, for example {strange!r}: run codes for {config.run.ds}")
    rows = rows.take(place)
    flat = pc.list_flatten(rows["codes"].combine_chunks()).to_numpy(zero_copy_only=False)
    return Tokens(
        books_id=books_id, entries=known["entries"], of_vectors=known["source"] == own[0],
        books=model,
        code_NK=torch.from_numpy(flat.reshape(len(rows), -1).astype(np.int64)),
        number_N=torch.from_numpy(rows["number"].to_numpy().astype(np.int64)),
    )  # fmt: skip


def drift(known: Tokens, emb_ND: Tensor) -> float:
    """Share of items whose codes the books would make otherwise from these vectors; 0 while both are as they were."""
    made_NK = known.books.to(emb_ND.device).encode(emb_ND).cpu()
    return round(float((made_NK != known.code_NK).any(1).double().mean()), 5)
