"""The parts of a fused recommender as models of their own: each alone, and each sum from the first part on."""

from __future__ import annotations

from models.behaviour.fused import FusedRecommender


def part_spans(recommender: FusedRecommender) -> dict[str, tuple[int, int]]:
    """Columns (first, after the last) of `only_NAME` for each part, and of `up_to_NAME` for other sums than one part or all."""
    found: dict[str, tuple[int, int]] = {}
    for number, part in enumerate(recommender.parts):
        found[f"only_{part.name}"] = (part.start, part.stop)
        if 0 < number < len(recommender.parts) - 1:
            found[f"up_to_{part.name}"] = (0, part.stop)
    return found
