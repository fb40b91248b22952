"""All that a report shows of the vectors: sample, maps and neighbours, of the layers that are there."""

from __future__ import annotations

from dataclasses import dataclass, field

from jobs.report.layers import Layer, layers_of
from jobs.report.maps import Map, maps_of
from jobs.report.neighbours import Example, examples_of
from jobs.report.sample import Sample, categories_of, draw_sample
from jobs.report.spaces import Spaces
from jobs.run import Run


@dataclass(frozen=True, kw_only=True)
class Views:
    """All that is shown of the vectors."""

    sample: Sample
    attribute: str
    """Whose values are the categories; empty where none fits."""
    categories: list[str]
    """In the order of their colours."""
    groups: list[int]
    maps: tuple[Map, ...]
    examples: tuple[Example, ...]
    pool: int
    """Items among which neighbours were looked for."""
    missing: dict[str, str] = field(default_factory=dict)
    """Layers that are not shown, and why."""


def look(
    run: Run, spaces: Spaces, *, map_items: int, base_items: int, pool_items: int, each: int, count: int, category: str
) -> tuple[Views, list[Layer]]:
    """Sample, maps and examples, and the layers for whoever measures them. Raises InputError where there are no items."""
    sample = draw_sample(run.lake, spaces.items, map_items)
    attribute, categories, group_N = categories_of(sample, category)
    layers, missing = layers_of(run, spaces, sample, base_items)
    examples = examples_of(run, spaces, sample, layers, pool_items, each, count)
    views = Views(
        sample=sample,
        attribute=attribute,
        categories=categories,
        groups=group_N,
        maps=maps_of(layers, sample, group_N, run.seed),
        examples=examples,
        pool=min(sample.total, pool_items),
        missing=missing,
    )
    return views, layers
