"""What the kept library makes of as many bits: product quantisation and residual k-means, by faiss.

Shapes: N items, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from jobs.run import InputError


def controls(emb_ND: Tensor, books: int, entries: int) -> dict[str, Tensor]:
    """read_ND of `pq` and `rq`: what their codes, of as many bits, tell of the vectors that they were trained on.

    Raises InputError where faiss is not installed, or entries are no power of two.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError("codes.controls needs faiss, which is not installed here: set codes.controls to false") from error
    bits = entries.bit_length() - 1
    if 2**bits != entries:
        raise InputError(f"codes.entries {entries} is no power of two: faiss has no control of as many bits; set codes.controls "
                         "to false")  # fmt: skip
    plain_ND = np.ascontiguousarray(emb_ND.float().cpu().numpy())
    # product quantisation cuts a vector into equal parts
    padded_ND = np.pad(plain_ND, ((0, 0), (0, -plain_ND.shape[1] % books)))
    made = {"pq": (faiss.ProductQuantizer(padded_ND.shape[1], books, bits), padded_ND),
            "rq": (faiss.ResidualQuantizer(plain_ND.shape[1], books, bits), plain_ND)}  # fmt: skip
    found = {}
    for name, (quantizer, vectors) in made.items():
        quantizer.train(vectors)
        read_ND = quantizer.decode(quantizer.compute_codes(vectors))[:, : plain_ND.shape[1]]
        found[name] = torch.from_numpy(read_ND).to(emb_ND.device)
    return found
