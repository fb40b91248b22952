"""The kinds of embedding that a report compares: the base LLM's, SCFT's, and those that serve.

Shapes: N items sampled, B rows of a batch, E LLM width, D width of the space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.lake import artifacts, partitions
from jobs.report.sample import Sample
from jobs.report.spaces import Spaces
from jobs.run import Run

Matrix = npt.NDArray[np.float32]
BASE, TEXT, SERVED = "Base LLM", "After SCFT", "Served"
"""Names of the layers."""


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


def layers_of(run: Run, spaces: Spaces, sample: Sample, base_items: int) -> tuple[list[Layer], dict[str, str]]:
    """Base, SCFT and served embeddings of the sample, in this order, and why one is missing, by its name."""
    base, why = base_vectors(run, spaces, sample, base_items)
    texts = text_vectors(run.lake, spaces.encoder_id, sample) if spaces.encoder_id else {}
    served = served_vectors(run.lake, spaces.served, sample) if spaces.served else {}
    layers = [
        Layer(name=BASE, what="Text, as the LLM saw it before fine-tuning", vectors=base),
        Layer(name=TEXT, what="Text, as the fine-tuned LLM sees it", vectors=texts),
        Layer(name=SERVED, what="After RAT: text bent to behaviour; what serving reads", vectors=served, by_dot=True),
    ]
    reasons = {
        BASE: why,
        TEXT: "nothing of the sample is embedded by the night's encoder",
        SERVED: "no item_embeddings for this night: project has not run",
    }
    shown = [layer for layer in layers if layer.vectors]
    return shown, {layer.name: reasons[layer.name] for layer in layers if not layer.vectors}


def base_vectors(run: Run, spaces: Spaces, sample: Sample, base_items: int) -> tuple[dict[str, Matrix], str]:
    """(embeddings by the LLM before SCFT, why there are none): from the lake, or else made here, of `base_items` at most."""
    try:
        base_id = base_encoder(run.lake, spaces.encoder_id) if spaces.encoder_id else ""
        if base_id:
            found = text_vectors(run.lake, base_id, sample)
        else:
            found = embed_base(run, spaces.encoder_id, sample, base_items) if base_items and spaces.encoder_id else {}
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        return {}, f"the base model could not be asked ({type(error).__name__}: {error})"
    return found, "no encoder without LoRA has embedded these items, and report.base_items is 0"


def base_encoder(lake: Path, encoder_id: str) -> str:
    """The encoder without LoRA over the same base model that has embedded something; empty where there is none."""
    described = dict(artifacts.described(lake, "encoder"))
    own = described.get(encoder_id, {})
    alike = [
        name
        for name, known in sorted(described.items())
        if known.get("lora") is None
        and not known.keys() & {"attention", "suffix_tokens"}
        and known.get("base_sha256") == own.get("base_sha256")
        and partitions.committed(lake, "llm_embeddings", f"encoder={name}")
    ]
    return alike[0] if alike else ""


def embed_base(run: Run, encoder_id: str, sample: Sample, most: int) -> dict[str, Matrix]:
    """The first items of the sample, embedded by the base model as it was before SCFT. Raises ValueError where it isn't there."""
    from jobs.lake.tensors import pick_device
    from models.text.base_model import load_base
    from models.text.embedding import embed_items
    from models.text.encoder import Encoder, of_base, read_spec

    spec = of_base(read_spec(artifacts.find(run.lake, "encoder", encoder_id)))
    model, tokenizer, _ = load_base(spec.base, device=pick_device(run), layers=spec.layers)
    emb_NE = embed_items(Encoder(model, tokenizer, spec).eval(), sample.attributes[:most])
    return dict(zip(sample.item_ids[:most], emb_NE, strict=True))


def text_vectors(lake: Path, encoder_id: str, sample: Sample) -> dict[str, Matrix]:
    """Embeddings of the sample's texts under an encoder."""
    found: dict[str, Matrix] = {}
    for partition in partitions.committed(lake, "llm_embeddings", f"encoder={encoder_id}"):
        for hashes, _, emb_BE in rows_below(lake, "llm_embeddings", partition, sample.bound, "content_hash"):
            found |= dict(zip(hashes, emb_BE, strict=True))
    return {item_id: found[text] for item_id, text in zip(sample.item_ids, sample.hashes, strict=True) if text in found}


def served_vectors(lake: Path, partition: str, sample: Sample) -> dict[str, Matrix]:
    """Vectors of the sample's items in a space."""
    wanted, found = set(sample.item_ids), dict[str, Matrix]()
    for ids, _, vector_BD in rows_below(lake, "item_embeddings", partition, sample.bound, "item_id"):
        found |= {item_id: vector_BD[row] for row, item_id in enumerate(ids) if item_id in wanted}
    return found


def rows_below(lake: Path, table: str, partition: str, bound: str, key: str) -> Iterator[tuple[list[str], list[str], Matrix]]:
    """(keys, content hashes, vector_BD) of a partition of vectors, of those content hashes that lie below the bound."""
    columns = list(dict.fromkeys([key, "content_hash", "embedding"]))
    for file in partitions.read_files(lake, table, partition, columns):
        for batch in file.iter_batches(batch_size=16_384, columns=columns):
            some = batch.filter(pc.less(batch["content_hash"], bound))
            if some.num_rows:
                yield some[key].to_pylist(), some["content_hash"].to_pylist(), matrix(some["embedding"])


def matrix(column: pa.Array) -> Matrix:
    """A column of fixed-size lists as rows."""
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(len(column), column.type.list_size)


def ids_of(lake: Path, partition: str) -> list[str]:
    """Item ids of a space."""
    files = partitions.read_files(lake, "item_embeddings", partition, ["item_id"])
    return [item for file in files for item in file.read(columns=["item_id"])["item_id"].to_pylist()]
