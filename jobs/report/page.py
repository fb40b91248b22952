"""The report's page: verdict, key figures and sections in one HTML file without network, for eyes, keyboard and screen reader.

What a section tells is made by `sections/NAME.py` and drawn by `templates/NAME.html.j2`, which escapes every text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.lake.tables import LEFT
from jobs.report import plots as plots
from jobs.report.costs import PER_THOUSAND, cost_figures, median_of, minutes
from jobs.report.facts import Facts
from jobs.report.sections import cost, drift, family, funnel, gates, jobs, maps, neighbours, origin, training, weak
from jobs.report.verdict import State, verdict
from jobs.report.words import duration, number

TEMPLATES = Path(__file__).with_name("templates")
SIGNS: dict[State, str] = {"good": "✓ Good", "look": "! Look at this", "bad": "✗ Failed"}
SECTIONS: tuple[tuple[str, str, Callable[[Facts], dict[str, Any]]], ...] = (
    ("jobs", "Jobs", jobs.section),
    ("funnel", "From records to vectors", funnel.section),
    ("gates", "Gates: champion and challenger", gates.section),
    ("weak", "Weak users", weak.section),
    ("family", "Bake-off and codes", family.section),
    ("maps", "Map of the embeddings", maps.section),
    ("neighbours", "Neighbours before and after", neighbours.section),
    ("training", "Training", training.section),
    ("drift", "Drift", drift.section),
    ("cost", "Throughput, cost and age", cost.section),
    ("origin", "Origin", origin.section),
)
"""(name, title, what it tells), in the order of the page."""


def page(facts: Facts) -> str:
    """Facts -> the whole page. Equal facts give equal bytes."""
    found = verdict(facts)
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            ds=facts.night.ds,
            verdict=found,
            sign=SIGNS[found.state],
            key_figures=key_figures(facts),
            sections=[{"name": name, "title": title, "body": drawn(name, tell, facts)} for name, title, tell in SECTIONS],
            theme=plots.THEME,
            categories=len(plots.PALETTE),
        )
    )


def drawn(name: str, tell: Callable[[Facts], dict[str, Any]], facts: Facts) -> Markup:
    """A section, or why it can't be drawn: a manifest of another shape must not cost the whole page."""
    try:
        return Markup(environment().get_template(f"{name}.html.j2").render(tell(facts)))
    except Exception as error:
        return Markup(environment().get_template("failed.html.j2").render(error=f"{type(error).__name__}: {error}"))


@cache
def environment() -> Environment:
    """Jinja2 with every text escaped; a name that a template does not know is an error."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters["counted"] = "{:,}".format
    found.globals["asset"] = asset
    # titles are read by people too, in the order in which they were given
    found.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    return found


def asset(name: str) -> Markup:
    """The page's style or script: no text of the data is in them."""
    return Markup((TEMPLATES / name).read_text())


def key_figures(facts: Facts) -> list[tuple[str, str]]:
    """(name, value) of the night's few numbers; a dash for what is not known."""
    night = facts.night
    seconds = minutes(night) or 0.0
    usual = median_of(minutes, facts.before)
    extract = night.result("extract")
    seen = sum(extract.get("seen", {}).values())
    refused = sum(count for why, count in extract.get("quarantined", {}).items() if not why.endswith(LEFT))
    per_thousand = cost_figures(facts.gpu_hour_price)[PER_THOUSAND](night)
    return [
        ("Items that serve", number(night.result("publish").get("items"))),
        ("Serving snapshot", facts.serving_ds or "–"),
        gain(facts),
        ("Refused records", f"{refused:,} of {seen:,}" if seen else "–"),
        ("Device cost per 1,000 items", number(per_thousand)),
        ("All jobs took", duration(60 * seconds) + (f" (usually {duration(60 * usual)})" if usual else "")),
    ]


def gain(facts: Facts) -> tuple[str, str]:
    """(name, value) of what the challenger gains overall: over the champion, else ID-only, else popularity."""
    differences = facts.night.result("evaluate").get("differences", [])
    compared = {row["against"]: row for row in differences if row["slice"] == "overall"}
    against = next((name for name in ("champion", "id_only", "popularity") if name in compared), "")
    row = compared.get(against, {})
    value = f"{row['value']:+.4f} ({number(row['low'])} to {number(row['high'])})" if row.get("value") is not None else "–"
    return f"NDCG@10 minus {against.replace('_', '-') or 'champion'}", value
