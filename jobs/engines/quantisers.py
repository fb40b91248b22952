"""What the kept library makes of as many bits: product quantisation and residual k-means, by faiss.

Shapes: N items, D width, K books.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jobs.run import InputError

ENOUGH = 39
"""Items an entry that faiss wants."""


def quantised(emb_ND: Tensor, books: int, entries: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Of `pq` and `rq`: read_ND, what codes tell of the vectors that they were trained on, and code_NK where those are bytes.

    Raises InputError where faiss is not installed, entries are no power of two, or there are fewer items than entries.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError("codes.controls needs faiss, which is not installed here: set controls to false") from error
    bits = entries.bit_length() - 1
    if 2**bits != entries:
        raise InputError(f"entries {entries} are no power of two: faiss has no control of as many bits; set controls to false")
    plain_ND = np.ascontiguousarray(emb_ND.float().cpu().numpy())
    # product quantisation cuts a vector into equal parts
    padded_ND = np.pad(plain_ND, ((0, 0), (0, -plain_ND.shape[1] % books)))
    made = {"pq": (faiss.ProductQuantizer(padded_ND.shape[1], books, bits), padded_ND),
            "rq": (faiss.ResidualQuantizer(plain_ND.shape[1], books, bits), plain_ND)}  # fmt: skip
    if len(plain_ND) < entries:
        raise InputError(f"{len(plain_ND)} items are fewer than {entries} entries: set entries lower, or controls to false")
    if len(plain_ND) < ENOUGH * entries:
        # of few items faiss can't make the directions that it trains in turn by default
        made["rq"][0].train_type = faiss.ResidualQuantizer.Train_default
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for name, (quantizer, vectors) in made.items():
        quantizer.train(vectors)
        packed_NB = quantizer.compute_codes(vectors)
        read_ND = np.ascontiguousarray(quantizer.decode(packed_NB)[:, : plain_ND.shape[1]])
        code_NK = torch.from_numpy(packed_NB.astype(np.int64)).to(emb_ND.device) if bits == 8 else None
        found[name] = torch.from_numpy(read_ND).to(emb_ND.device), code_NK
    return found
