"""The parts of a fused recommender as models of their own: each alone, and each sum from the first part on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from models.behaviour.fused import FusedRecommender
from models.judge.evaluation import Cases, Ranks, vector_ranks


def part_rankers(recommender: FusedRecommender, table_VD: Tensor) -> Iterator[tuple[str, Callable[[Cases], Ranks]]]:
    """(name, ranker): `only_NAME` for each part, `up_to_NAME` for the sums that are neither one part nor all."""
    for number, part in enumerate(recommender.parts):
        yield f"only_{part.name}", partial(columns_ranked, recommender, table_VD, part.start, part.stop)
        if 0 < number < len(recommender.parts) - 1:
            yield f"up_to_{part.name}", partial(columns_ranked, recommender, table_VD, 0, part.stop)


def columns_ranked(recommender: FusedRecommender, table_VD: Tensor, start: int, stop: int, cases: Cases) -> Ranks:
    """Ranks by some columns of the vectors alone."""

    def encode(emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        return recommender.encode_some(emb_BLD, valid_BL, start, stop)

    return vector_ranks(cases, table_VD, encode, recommender.backbone.max_len)
