"""The report on codes: use of books, collisions, neighbours kept, categories told; at a refit what moved, and the controls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from jobs.codes.coding import matrix
from jobs.codes.config import Config, Result
from jobs.engines.quantisers import quantised
from jobs.lake import partitions
from jobs.lake.items import live_items
from jobs.lake.tables import ITEMS
from models.behaviour import code_figures
from models.behaviour.codes import Books

DIGITS = 5
FEW = 100
"""Values of an attribute that is a category, at most."""


def report(
    config: Config, rows: pa.Table, model: Books, sample_ND: Tensor, other: pa.Table | None, *, fresh: bool
) -> dict[str, Any]:
    """Figures of the codes written; of `fresh` books also the controls; `other` are the codes by the books before."""
    code_NK = torch.from_numpy(matrix(rows).astype(np.int64))
    entries, some_ND = model.entry_KCD.shape[1], sample_ND[: config.figures_items]
    found: dict[str, Any] = {
        "usage": [rounded(book) for book in code_figures.usage(code_NK, entries)],
        "collisions": rounded(code_figures.collisions(code_NK)) | {"most_numbered": int(pc.max(rows["number"]).as_py()) + 1},
        "bits": len(model.entry_KCD) * (entries - 1).bit_length(),
        "items": len(code_NK),
        "books": reading_errors(some_ND, model.decode(model.encode(some_ND))),
    }
    name, category_N = categories(config, rows)
    if name:
        told = code_figures.information(code_NK, torch.from_numpy(category_N))
        found["category"] = {"attribute": name, "information": [round(value, DIGITS) for value in told]}
    if other is not None:
        found["moved"] = moved(other, rows)
    if config.controls and fresh:
        read = quantised(sample_ND, len(model.entry_KCD), entries)
        found |= {kind: reading_errors(some_ND, read_ND[: len(some_ND)]) for kind, (read_ND, _) in read.items()}
    return found


def reading_errors(emb_ND: Tensor, read_ND: Tensor) -> dict[str, float]:
    """Neighbours kept, and the error, of what codes tell."""
    if len(emb_ND) < 2:
        return {}
    kept = code_figures.neighbours_kept(emb_ND, read_ND)
    return {"recall_at_10": round(kept, DIGITS), "error": round(code_figures.error(emb_ND, read_ND), DIGITS)}


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Figures for JSON."""
    return {name: round(value, DIGITS) for name, value in values.items()}


def moved(other: pa.Table, rows: pa.Table) -> dict[str, float]:
    """Of the items that both have: the share whose codes are others than before."""
    place = pc.index_in(rows["item_id"].combine_chunks(), value_set=other["item_id"].combine_chunks())
    both_N = pc.is_valid(place).to_numpy(zero_copy_only=False)
    then_NK, now_NK = matrix(other)[pc.fill_null(place, 0).to_numpy(zero_copy_only=False)], matrix(rows)
    if then_NK.shape[1] != now_NK.shape[1]:
        return {"items": int(both_N.sum()), "share": 1.0}
    differ_N = (then_NK != now_NK).any(1)[both_N]
    return {"items": int(both_N.sum()), "share": round(float(differ_N.mean()), DIGITS) if len(differ_N) else 0.0}


def categories(config: Config, rows: pa.Table) -> tuple[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """An attribute and a number for its first value of each item, -1 for none; "" where no attribute is a category."""
    values: dict[str, dict[str, str]] = {}
    snapshot = partitions.latest(config.run.lake, ITEMS.name, config.run.ds)
    for batch in live_items(config.run.lake, snapshot, ("item_id", "attributes")):
        for item_id, pairs in zip(batch["item_id"].to_pylist(), batch["attributes"].to_pylist(), strict=True):
            for pair in pairs:
                values.setdefault(pair["name"], {})[item_id] = pair["value"].split(",")[0].strip()
    sizes = {name: len(set(of.values())) for name, of in values.items()}
    fit = [name for name, size in sizes.items() if 2 <= size <= FEW and len(values[name]) * 2 >= rows.num_rows]
    name = config.category or min(fit, key=lambda one: sizes[one], default="")
    if name not in values:
        return "", np.zeros(0, np.int64)
    numbers = {value: number for number, value in enumerate(sorted(set(values[name].values())))}
    of = values[name]
    return name, np.array([numbers[of[item]] if item in of else -1 for item in rows["item_id"].to_pylist()], np.int64)


def in_words(result: Result) -> Iterator[str]:
    """Lines for a person."""
    yield (f"codes: {result.books} books of {result.entries}, {result.books_id}, of {result.source}: {result.new:,} items new, "
           f"{result.changed:,} changed, {result.kept:,} kept, {result.published:,} written online")  # fmt: skip
    for kind in ("books", "pq", "rq"):
        if result.report.get(kind):
            yield f"  {kind:<6} recall@10 {result.report[kind]['recall_at_10']:.4f}  error {result.report[kind]['error']:.4f}"
    if "moved" in result.report:
        yield f"  {result.report['moved']['share']:.1%} of the items' codes are others than before"
