"""The maps of the embeddings, with what their search needs, and how pure they are."""

from __future__ import annotations

from typing import Any

from jobs.report import plots as plots
from jobs.report.blocks import Table
from jobs.report.facts import Facts
from jobs.report.sample import OTHERS
from jobs.report.views import Views
from jobs.report.words import percent


def section(facts: Facts) -> dict[str, Any]:
    """Points of each map, categories by colour, and the data of the page's script."""
    views = facts.views
    if views is None:
        return {"views": None, "why": facts.why_no_views}
    return {
        "views": views,
        "sampled": len(views.sample.item_ids),
        "colours": category_colours(views),
        "maps": [one_map(place, views) for place in range(len(views.maps))],
        "titles": titles_data(views),
        "shares": shares(views),
    }


def category_colours(views: Views) -> list[tuple[int, str]]:
    """(colour, category): the commonest in their order, then the rest where there is any."""
    rest = [(OTHERS, "other")] if OTHERS in views.groups and views.categories else []
    return [*enumerate(views.categories), *rest]


def one_map(place: int, views: Views) -> dict[str, Any]:
    """One map: its points as (x, y, colour), in the order in which the page's script knows its items."""
    found = views.maps[place]
    colours = [views.groups[item] for item in found.places]
    points = [(x, y, colour) for (x, y), colour in zip(plots.in_square(found.point_N2), colours, strict=True)]
    return {
        "name": found.name,
        "what": found.what,
        "points": points,
        "share": percent(found.purity) if found.purity is not None else "",
        "chance": percent(found.chance),
    }


def titles_data(views: Views) -> dict[str, Any]:
    """What the page's script needs: titles, groups, and which items each map shows; and the ids of all items named on the page.

    By these `forget` finds the pages that name an item.
    """
    near = {item for example in views.examples for found in example.columns.values() for item, _ in found}
    return {
        "titles": views.sample.titles,
        "groups": views.groups,
        "categories": views.categories,
        "maps": [found.places for found in views.maps],
        "named": sorted({*views.sample.item_ids, *near}),
    }


def shares(views: Views) -> Table:
    """How pure each map is, beside chance."""
    caption = f"Share of an item's ten nearest neighbours with its own “{views.attribute}”, among the items that all maps show"
    rows = [[found.name, f"{found.compared:,}", percent(found.purity), percent(found.chance)] for found in views.maps]
    return Table(caption=caption, head=["Embedding", "Items", "Share", "By chance"], rows=rows)
