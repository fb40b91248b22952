"""The manifests of a run -> one HTML page with plots, drift against the nights before, and OpenLineage events."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.lake import artifacts, nights, partitions
from jobs.lake.nights import Night
from jobs.lake.partitions import digest_file
from jobs.lake.store import called
from jobs.report import drift, openlineage, tracking, views, weak
from jobs.report.drift import Bounds, Measure
from jobs.report.facts import Facts
from jobs.report.layers import Layer
from jobs.report.page import page
from jobs.report.spaces import Spaces, first_filled, serving, spaces_of
from jobs.report.verdict import Verdict, verdict
from jobs.report.views import Views
from jobs.run import InputError, Run

if TYPE_CHECKING:
    from openlineage.client.event_v2 import RunEvent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """How much is looked at."""

    run: Run
    history: int = 30
    """Nights before that are compared with."""
    map_items: int = 1_000
    """Items of the maps and of the vectors' measures, at most: a sample by content hash."""
    base_items: int = 500
    """Of these, how many the base LLM embeds for its map, where no encoder without LoRA has done it; 0 leaves the map out."""
    pool_items: int = 200_000
    """Items among which the examples' neighbours are looked for, at most."""
    examples: int = 2
    """Examples of each group: head, tail, cold."""
    neighbours: int = 5
    """Nearest items that the report shows of each example."""
    category: str = ""
    """Attribute whose first value colours the maps; empty takes the one with the fewest values."""
    bounds: Bounds = field(default_factory=Bounds)
    coverage_events: int = 5_000_000
    """Events looked at for the coverage of the logs, at most."""
    gpu_hour_price: float = 2.5
    """What an hour of the device costs."""
    openlineage_url: str = ""
    """Endpoint that takes the OpenLineage events too, for example `http://marquez:5000/api/v1/lineage`; empty: the file only.

    Its key, where it wants one, is that of the environment variable `OPENLINEAGE_API_KEY`.
    """
    namespace: str = "llmemb"
    """Namespace of the OpenLineage events."""

    def __post_init__(self) -> None:
        if min(self.history, self.base_items, self.examples, self.coverage_events) < 0:
            raise InputError("report: history, base_items, examples and coverage_events must be at least 0")
        if min(self.map_items, self.pool_items, self.neighbours) < 1:
            raise InputError("report: map_items, pool_items and neighbours must be at least 1")
        if self.openlineage_url:
            openlineage.check_endpoint(self.openlineage_url)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The page, and whether to worry."""

    path: str
    state: Literal["good", "look", "bad"]
    verdict: str
    """The line on top of the page."""
    points: tuple[str, ...]
    """What to look at."""
    measures: tuple[Measure, ...]
    drift: dict[str, float]
    """The measures' values: the history of later nights."""
    refresh_encoder: str
    """Why the texts have moved so far that `scft` is due; empty where they have not."""
    page_bytes: int
    events: int
    """OpenLineage events written."""
    sent: int
    """Of these, taken by the endpoint."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Writes `reports/ds=DATE/report.html` and `openlineage.jsonl`, whatever of the night is there.

    Raises InputError where no job has run for ds.
    """
    lake, ds = config.run.lake, config.run.ds
    night = nights.read_night(lake, ds)
    if not night.runs and not night.unreadable:
        raise InputError(
            f"no job has run for {ds} in the lake {called(lake)}: run `python -m jobs extract` first, or give another --ds"
        )
    facts, values = gather(config, night)
    found = openlineage.events(night, config.namespace)
    home = lake / "reports" / f"ds={ds}"
    html = page(facts)
    partitions.write_text(home / "report.html", html)
    partitions.write_text(home / "openlineage.jsonl", openlineage.lines(found))
    artifacts.put_folder(lake, home)
    told = verdict(facts)
    announce(told, home / "report.html", len(html.encode()))
    tracking.track(config.run, night, told.state, values, home)
    return Result(
        path=f"{called(lake)}/{home.relative_to(lake)}/report.html",
        state=told.state,
        verdict=told.line,
        points=told.points,
        measures=facts.measures,
        drift=values,
        refresh_encoder=drift.refresh_reason(facts.measures),
        page_bytes=len(html.encode()),
        events=len(found),
        sent=sent(config, found),
        inputs={run.name: str(run.manifest.get("recipe_sha256", "")) for run in night.runs},
        outputs={name: digest_file(home / name) for name in ("report.html", "openlineage.jsonl")},
        rows={},
    )


def gather(config: Config, night: Night) -> tuple[Facts, dict[str, float]]:
    """All that the page tells of, and the measures' values, which later nights compare with."""
    lake = config.run.lake
    before = tuple(nights.nights_before(lake, night.ds, config.history))
    spaces = spaces_of(lake, night, before)
    shown, layers, why = look(config, spaces)
    badly_served = weak.groups(lake, night)
    values = measure(config, night, spaces, layers, shown) | weak.measures(badly_served)
    trained_ds = nights.trained_on(lake, night.ds)
    recent = [past for past in before if past.ds >= trained_ds]
    serving_ds, space_id = serving([*before, night])
    facts = Facts(
        night=night,
        before=before,
        measures=drift.judge(values, drift.earlier(lake, before), config.bounds, drift.earlier(lake, recent)),
        views=shown,
        why_no_views=why,
        gpu_hour_price=config.gpu_hour_price,
        serving_ds=serving_ds,
        space_id=space_id,
        space_since=first_filled(lake, space_id),
        weak=badly_served,
    )
    return facts, values


def look(config: Config, spaces: Spaces) -> tuple[Views | None, list[Layer], str]:
    """Maps, neighbours and layers; or why there are none: the page is written all the same."""
    if not spaces.items:
        return None, [], "the lake has no items yet: extract has not ended well"
    try:
        found, layers = views.look(
            config.run, spaces, map_items=config.map_items, base_items=config.base_items, pool_items=config.pool_items,
            each=config.examples, count=config.neighbours, category=config.category,
        )  # fmt: skip
    except (InputError, OSError, ValueError) as error:
        log.warning("no maps: %s", error)
        return None, [], f"the lake's tables can't be read: {error}"
    return found, layers, ""


def measure(config: Config, night: Night, spaces: Spaces, layers: Sequence[Layer], shown: Views | None) -> dict[str, float]:
    """Name -> value of the night's measures."""
    covered = drift.covered_share(config.run.lake, config.run.ds, spaces, config.coverage_events)
    return drift.measured(night, shown.sample if shown else None, layers, spaces, covered)


def sent(config: Config, found: Sequence[RunEvent]) -> int:
    """Events that the endpoint took; one that is down costs the events there, not the report."""
    if not config.openlineage_url:
        return 0
    try:
        return openlineage.send(found, config.openlineage_url)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        log.warning("the OpenLineage endpoint did not take the events (%s): they are in openlineage.jsonl", error)
        return 0


def announce(told: Verdict, path: Path, size: int) -> None:
    """The verdict, what to look at and where the page lies, for a person."""
    log.info("%s: %s", told.state, told.line)
    for point in told.points:
        log.info("  %s", point)
    log.info("%s (%.1f MiB)", path, size / 2**20)
