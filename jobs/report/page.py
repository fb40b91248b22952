"""The report's page: verdict, key figures and sections in one HTML file without network, for eyes, keyboard and screen reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup

from jobs.lake.lineage import NIGHTLY
from jobs.lake.tables import LEFT
from jobs.report import plots as plots
from jobs.report import sections as sections
from jobs.report.html import duration, first_line, join, missing, number
from jobs.report.sections import Facts

State = Literal["good", "look", "bad"]
SIGNS: dict[State, str] = {"good": "✓ Good", "look": "! Look at this", "bad": "✗ Failed"}
POINTS = 12
"""Things to look at that are named; of a thousand failed shards the first will do."""
SECTIONS: tuple[tuple[str, str, Callable[[Facts], Markup]], ...] = (
    ("jobs", "Jobs", sections.jobs_section),
    ("funnel", "From records to vectors", sections.funnel_section),
    ("gates", "Gates: champion and challenger", sections.gates_section),
    ("maps", "Map of the embeddings", sections.maps_section),
    ("neighbours", "Neighbours before and after", sections.neighbours_section),
    ("training", "Training", sections.training_section),
    ("drift", "Drift", sections.drift_section),
    ("cost", "Throughput, cost and age", sections.cost_section),
    ("origin", "Origin", sections.origin_section),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The night in a line."""

    state: State
    line: str
    points: tuple[str, ...]
    """What to look at."""


# ---------------------------------------------------------------------------------------------------------------- verdict


def verdict(facts: Facts) -> Verdict:
    """Whether to worry, and why: a failed job is bad, a gate's refusal or an alarm is to be looked at."""
    night = facts.night
    bad = [f"{run.name} failed: {first_line(run.manifest.get('error'))}" for run in night.runs if run.status == "failed"]
    bad += [f"the manifest {name} can't be read" for name in night.unreadable]
    look = [
        f"{run.name} was refused by a gate: {first_line(run.manifest.get('error'))}"
        for run in night.runs
        if run.status == "refused"
    ]
    absent = [job for job in NIGHTLY if not night.all(job)]
    if absent:
        look.append(f"the night is unfinished: {', '.join(absent)} {'has' if len(absent) == 1 else 'have'} not run")
    promote = night.result("promote")
    if promote.get("decision") == "undecided":
        look.append("the challenger needs a person: a gate can't tell (run promote again with approved_by)")
    if night.result("evaluate").get("leaking"):
        look.append("a field of the prompt leaks popularity into the embeddings")
    look += below_floors(night.result("evaluate"))
    alarms = [measure.name for measure in facts.measures if measure.verdict == "alarm"]
    if alarms:
        look.append(
            f"{len(alarms)} of {len(facts.measures)} measures drifted: {', '.join(alarms[:4])}{' …' if len(alarms) > 4 else ''}"
        )
    state: State = "bad" if bad else "look" if look else "good"
    points = [*bad, *look]
    more = [f"and {len(points) - POINTS:,} more"] if len(points) > POINTS else []
    return Verdict(state=state, line=headline(facts, bad, look), points=(*points[:POINTS], *more))


def below_floors(judged: Mapping[str, Any]) -> list[str]:
    """Models other than the champion that the challenger is surely worse than, overall: it earns its GPU time by beating them."""
    return [
        f"the challenger is worse than {row['against']}: NDCG {row['value']:+.4f} (95 % {row['low']:+.4f} to {row['high']:+.4f})"
        for row in judged.get("differences", [])
        if row["slice"] == "overall" and row["against"] != "champion" and row["high"] is not None and row["high"] < 0
    ]


def headline(facts: Facts, bad: Sequence[str], look: Sequence[str]) -> str:
    """The one line on top."""
    night = facts.night
    published = night.result("publish")
    serves = f"; {published['items']:,} items of {night.ds} serve" if isinstance(published.get("items"), int) else ""
    if not published:
        serves = f"; the snapshot of {facts.serving_ds} goes on serving" if facts.serving_ds else "; nothing serves yet"
    done = sum(run.status == "done" for run in night.runs)
    decision = night.result("promote").get("decision")
    told = {"promoted": "; the challenger became champion", "undecided": "; the champion stays for now"}.get(str(decision), "")
    if bad:
        return f"{len(bad)} of {len(night.runs) + len(night.unreadable)} jobs failed{told}{serves}."
    if look:
        return (
            f"{done} of {len(night.runs)} jobs done, {len(look)} thing{'' if len(look) == 1 else 's'} to look at{told}{serves}."
        )
    return f"All {done} jobs done, nothing to worry about{told}{serves}."


# ------------------------------------------------------------------------------------------------------------------- page


def guarded(section: Callable[[Facts], Markup], facts: Facts) -> Markup:
    """A section, or why it can't be drawn: a manifest of another shape must not cost the whole page."""
    try:
        return section(facts)
    except Exception as error:
        return missing(f"This part can't be drawn: its manifest has another shape ({type(error).__name__}: {error}).")


def key_figures(facts: Facts) -> list[tuple[str, str]]:
    """The night in a few numbers; a dash for what is not known."""
    night = facts.night
    seconds = sections.minutes(night) or 0.0
    usual = sections.median_of(sections.minutes, facts.before)
    differences = night.result("evaluate").get("differences", [])
    compared = {row["against"]: row for row in differences if row["slice"] == "overall"}
    against = next((name for name in ("champion", "id_only", "popularity") if name in compared), "")
    row = compared.get(against, {})
    gain = f"{row['value']:+.4f} ({number(row['low'])} to {number(row['high'])})" if row.get("value") is not None else "–"
    extract = night.result("extract")
    seen = sum(extract.get("seen", {}).values())
    refused = sum(count for why, count in extract.get("quarantined", {}).items() if not why.endswith(LEFT))
    per_thousand = dict(sections.costs(facts))[sections.PER_THOUSAND](night)
    return [
        ("Items that serve", number(night.result("publish").get("items"))),
        ("Serving snapshot", facts.serving_ds or "–"),
        (f"NDCG@10 minus {against.replace('_', '-') or 'champion'}", gain),
        ("Refused records", f"{refused:,} of {seen:,}" if seen else "–"),
        ("Device cost per 1,000 items", number(per_thousand)),
        ("All jobs took", duration(60 * seconds) + (f" (usually {duration(60 * usual)})" if usual else "")),
    ]


def page(facts: Facts) -> str:
    """The whole page."""
    found = verdict(facts)
    figures = join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in key_figures(facts))
    points = Markup('<ul class="points">{}</ul>').format(join(Markup("<li>{}</li>").format(point) for point in found.points))
    nav = join(Markup('<li><a href="#{}">{}</a></li>').format(name, text) for name, text, _ in SECTIONS)
    parts = join(
        Markup('<section id="{}" aria-labelledby="{}-head"><h2 id="{}-head">{}</h2>{}</section>').format(
            name, name, name, text, guarded(section, facts)
        )
        for name, text, section in SECTIONS
    )
    title = f"Night of {facts.night.ds}"
    return str(
        Markup(PAGE).format(
            title=title, style=Markup(colours() + asset("css")), state=found.state, sign=SIGNS[found.state], line=found.line,
            points=points if found.points else "", figures=figures, nav=nav, sections=parts, script=Markup(asset("js")),
        )
    )  # fmt: skip


def asset(kind: str) -> str:
    """The page's style or script: no text of the data is in them."""
    return Path(__file__).with_name(f"page.{kind}").read_text()


def colours() -> str:
    """The pictures' colours on white and on a dark page, and a class for each colour of the maps."""
    light, dark = ("".join(f"--{name}: {pair[way]}; " for name, pair in plots.THEME.items()) for way in (0, 1))
    return f":root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n" + "".join(
        f".k{place} {{ fill: var(--k{place}); background: var(--k{place}); }}\n" for place in range(len(plots.PALETTE))
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{sign}: {title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{title}</h1>
<p class="verdict {state}"><strong>{sign}.</strong> {line}</p>
{points}
<dl>{figures}</dl>
<nav aria-label="Parts of the report"><ul>{nav}</ul></nav>
</header>
<main id="main" tabindex="-1">{sections}</main>
<footer><p>Made from the manifests of the night, without network. “–” stands for what is not known.</p></footer>
<script>{script}</script>
</body>
</html>
"""
