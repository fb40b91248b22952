"""A floor that an LLM must beat: TF-IDF of the items' texts, whitened, read by a fading mean of the history. Nothing is trained.

It is level with embeddings of a small LLM on some catalogues: what the LLM is worth is the difference (BENCHMARKS.md).

Shapes: N items, K width, V items + 1 (row 0 is padding).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.recommender import FadingMean
from models.behaviour.whitening import fit_whitening
from models.judge.evaluation import Cases, Ranks, vector_ranks

WIDTH = 512
"""Directions kept, at most; also at most an eighth of the items: whitened to more, all texts lie equally far apart."""
LEAST = 64
"""Items below which there is no such floor."""
SAMPLE = 50_000
"""Texts that words and directions are learned from, at most."""
FADE, NEWEST = 0.7, 20


def tfidf_table(texts: Sequence[str], seed: int = 0) -> Tensor | None:
    """One text an item -> table_VD of length one, row 0 zero. None for fewer than LEAST items or texts without two words."""
    if len(texts) < LEAST:
        return None
    # sklearn takes a second to load
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    some = np.random.default_rng(seed).permutation(len(texts))[:SAMPLE]
    words = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+", min_df=2)
    try:
        words.fit([texts[row] for row in some])
    except ValueError:  # no word stands in two texts
        return None
    found = words.transform(texts)
    width = min(WIDTH, len(texts) // 8, found.shape[1] - 1)
    if width < 1:
        return None
    reduced = TruncatedSVD(width, random_state=seed, n_iter=2).fit(found[some])
    emb_NK = torch.from_numpy(reduced.transform(found)).float()
    return F.pad(F.normalize(fit_whitening(emb_NK, width)(emb_NK), dim=1), (0, 0, 1, 0))


def text_ranks(cases: Cases, table_VD: Tensor) -> Ranks:
    """Ranks of the cases by that table."""
    reads = FadingMean(FADE, NEWEST).to(table_VD.device)
    return vector_ranks(cases, table_VD, lambda emb_BLD, valid_BL: reads(emb_BLD, valid_BL)[:, -1], NEWEST)
