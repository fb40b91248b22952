"""The parts of a fused recommender as models of their own: each alone, and each sum from the first part on."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from models.behaviour.fused import FusedRecommender
from models.judge.evaluation import Cases, Ranks, vector_ranks


def part_ranks(recommender: FusedRecommender, table_VD: Tensor, cases: Cases) -> Iterator[tuple[str, Ranks]]:
    """(name, ranks): `only_NAME` for each part, `up_to_NAME` for the sums that are neither one part nor all."""
    for number, part in enumerate(recommender.parts):
        yield f"only_{part.name}", columns_ranked(recommender, table_VD, cases, part.start, part.stop)
        if 0 < number < len(recommender.parts) - 1:
            yield f"up_to_{part.name}", columns_ranked(recommender, table_VD, cases, 0, part.stop)


def columns_ranked(recommender: FusedRecommender, table_VD: Tensor, cases: Cases, start: int, stop: int) -> Ranks:
    """Ranks by some columns of the vectors alone."""

    def encode(emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        return recommender.encode_some(emb_BLD, valid_BL, start, stop)

    return vector_ranks(cases, table_VD, encode, recommender.backbone.max_len)
