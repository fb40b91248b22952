"""Embeddings laid out in two dimensions, and how pure their neighbourhoods are.

Shapes: N items sampled, S of them that all maps show, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jobs.report.layers import Layer, Matrix
from jobs.report.sample import OTHERS, Sample

PURITY_NEIGHBOURS = 10
"""Neighbours in which a map's purity is measured."""


@dataclass(frozen=True, kw_only=True)
class Map:
    """A layer laid out in two dimensions."""

    name: str
    what: str
    places: list[int]
    """Which items of the sample it shows, in the order of its points."""
    point_N2: Matrix
    purity: float | None
    """Share of an item's nearest neighbours, among the items of all maps, that have its category; none without categories."""
    chance: float | None
    """The same for neighbours drawn at random."""
    compared: int
    """Items that all maps show: among more of them neighbours are nearer, so shares are compared on these."""


def maps_of(layers: Sequence[Layer], sample: Sample, group_N: Sequence[int], seed: int) -> tuple[Map, ...]:
    """Maps of the layers; each begins where the one before ended, so that an item stays about where it was."""
    shared = [place for place, item_id in enumerate(sample.item_ids) if all(item_id in layer.vectors for layer in layers)]
    group_S = np.asarray([group_N[place] for place in shared], np.int64)
    maps: list[Map] = []
    before: dict[int, Matrix] = {}
    for layer in layers:
        places = [place for place, item_id in enumerate(sample.item_ids) if item_id in layer.vectors]
        if not places:
            continue
        vector_ND = np.stack([layer.vectors[sample.item_ids[place]] for place in places])
        known = bool(before) and all(place in before for place in places)
        point_N2 = layout(vector_ND, np.stack([before[place] for place in places]) if known else None, seed)
        shared_SD = np.stack([layer.vectors[sample.item_ids[place]] for place in shared]) if shared else vector_ND[:0]
        same, chance = purity(shared_SD, group_S)
        maps.append(
            Map(
                name=layer.name,
                what=layer.what,
                places=places,
                point_N2=point_N2,
                purity=same,
                chance=chance,
                compared=len(shared),
            )
        )
        before = dict(zip(places, point_N2, strict=True))
    return tuple(maps)


def layout(vector_ND: Matrix, start_N2: Matrix | None, seed: int) -> Matrix:
    """point_N2 by t-SNE (van der Maaten and Hinton 2008) from `start_N2` or the principal components; those for a few items."""
    unit_ND = centred_directions(vector_ND)
    left_NN, value_N, _ = np.linalg.svd(unit_ND, full_matrices=False)
    scores_ND = (left_NN * value_N)[:, :50].astype(np.float32)
    start_N2 = np.pad(scores_ND[:, :2], ((0, 0), (0, max(0, 2 - scores_ND.shape[1])))) if start_N2 is None else start_N2
    if len(vector_ND) < 10 or not np.ptp(scores_ND) > 1e-6:
        return start_N2
    from sklearn.manifold import TSNE

    start_N2 = start_N2 / max(float(start_N2[:, 0].std()), 1e-9) * 1e-4
    # from four neighbours up to the usual thirty
    perplexity = min(30.0, max(2.0, len(vector_ND) / 4))
    return np.asarray(TSNE(init=start_N2, perplexity=perplexity, random_state=seed).fit_transform(scores_ND), np.float32)


def purity(vector_ND: Matrix, group_N: npt.NDArray[np.int64]) -> tuple[float | None, float | None]:
    """(share of nearest neighbours of an item's own category, the same by chance), over items whose category has a colour."""
    named_N = group_N != OTHERS
    if len(set(group_N[named_N].tolist())) < 2 or len(vector_ND) < 3:
        return None, None
    unit_ND = centred_directions(vector_ND)
    score_NN = unit_ND @ unit_ND.T
    np.fill_diagonal(score_NN, -np.inf)
    near_NK = np.argsort(-score_NN, axis=1, kind="stable")[:, : min(PURITY_NEIGHBOURS, len(vector_ND) - 1)]
    same_NK = group_N[near_NK] == group_N[:, None]
    counts = np.bincount(group_N, minlength=OTHERS + 1)
    chance_N = (counts[group_N] - 1) / (len(group_N) - 1)
    return float(same_NK[named_N].mean()), float(chance_N[named_N].mean())


def centred_directions(vector_ND: Matrix) -> Matrix:
    """Centred and of length one: LLM embeddings share a large common part that would hide all else."""
    centred_ND = vector_ND - vector_ND.mean(0)
    return np.asarray(centred_ND / np.maximum(np.linalg.norm(centred_ND, axis=1, keepdims=True), 1e-12), np.float32)
