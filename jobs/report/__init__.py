"""The manifests of a run -> one HTML page with plots, drift against the nights before, and OpenLineage events."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from jobs.lake import lineage, manifests, partitions
from jobs.lake.lineage import Night
from jobs.lake.partitions import digest_file
from jobs.lake.tables import INTERACTIONS, ITEMS
from jobs.report import drift, views
from jobs.report.drift import Bounds, Measure
from jobs.report.page import page, verdict
from jobs.report.sections import Facts
from jobs.report.views import Layer, Spaces, Views
from jobs.run import InputError, Run, Unavailable

ENOUGH = 100
"""Texts embedded on a night, from which on their mean length is a measure."""


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
    category: str = ""
    """Attribute whose first value colours the maps; empty takes the one with the fewest values."""
    bounds: Bounds = field(default_factory=Bounds)
    coverage_events: int = 5_000_000
    """Events looked at for the coverage of the logs, at most."""
    gpu_hour_price: float = 2.5
    """What an hour of the device costs."""
    openlineage_url: str = ""
    """Endpoint that takes the OpenLineage events too, for example `http://marquez:5000/api/v1/lineage`; empty: the file only."""
    namespace: str = "llmemb"
    """Of the OpenLineage events."""

    def __post_init__(self) -> None:
        if min(self.history, self.base_items, self.examples, self.coverage_events) < 0:
            raise InputError("report: history, base_items, examples and coverage_events must be at least 0")
        if min(self.map_items, self.pool_items, self.neighbours) < 1:
            raise InputError("report: map_items, pool_items and neighbours must be at least 1")


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
    night = lineage.read_night(lake, ds)
    if not night.runs and not night.unreadable:
        raise InputError(f"no job has run for {ds} in the lake {lake}: run `python -m jobs extract` first, or give another --ds")
    before = tuple(lineage.nights_before(lake, ds, config.history))
    spaces = spaces_of(lake, night, before)
    views, layers, why = look(config, spaces)
    values = measure(config, night, spaces, layers, views)
    recent = [past for past in before if past.ds >= trained_on(lake, ds)]
    measures = drift.judge(values, earlier(lake, before), config.bounds, earlier(lake, recent))
    serving_ds, space_id = serving([*before, night])
    facts = Facts(
        night=night,
        before=before,
        measures=measures,
        views=views,
        why_no_views=why,
        gpu_hour_price=config.gpu_hour_price,
        serving_ds=serving_ds,
        space_id=space_id,
        space_since=since(lake, space_id),
    )
    html = page(facts)
    found = list(lineage.events(night, config.namespace))
    home = lake / "reports" / f"ds={ds}"
    write_text(home / "report.html", html)
    write_text(home / "openlineage.jsonl", "".join(f"{json.dumps(event, sort_keys=True)}\n" for event in found))
    told = verdict(facts)
    say(f"{told.state}: {told.line}")
    for point in told.points:
        say(f"  {point}")
    say(f"{home / 'report.html'} ({len(html.encode()) / 2**20:.1f} MiB)")
    result = Result(
        path=str(home / "report.html"),
        state=told.state,
        verdict=told.line,
        points=told.points,
        measures=measures,
        drift=values,
        refresh_encoder=drift.refresh_reason(measures),
        page_bytes=len(html.encode()),
        events=len(found),
        sent=sent(config, found),
        inputs={run.name: str(run.manifest.get("recipe_sha256", "")) for run in night.runs},
        outputs={name: digest_file(home / name) for name in ("report.html", "openlineage.jsonl")},
        rows={},
    )
    log(config, result, night)
    return result


# ------------------------------------------------------------------------------------------------------------- the spaces


def spaces_of(lake: Path, night: Night, before: Sequence[Night]) -> Spaces:
    """What the night's vectors are: of its `project`, else of the last one before. Texts are empty where there is none."""
    made = [(one.ds, one.result("project")) for one in [*before, night] if one.result("project")]
    made = [(ds, result) for ds, result in made if partitions.committed(lake, "item_embeddings", partition(result, ds))]
    ds, project = made[-1] if made else ("", {})
    trained = night.result("embed") or night.result("scft")
    dates = [name for name in partitions.committed(lake, ITEMS.name) if name <= f"ds={night.ds}"]
    return Spaces(
        items=dates[-1] if dates else "",
        encoder_id=str(project.get("encoder_id") or trained.get("encoder_id", "")),
        served=partition(project, ds) if project else "",
        before=space_before(lake, night, made),
    )


def space_before(lake: Path, night: Night, made: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Partition of the space that another one of the night took over from; empty where none did, or it is gone."""
    if not made:
        return ""
    own = made[-1][1].get("space_id")
    older = [partition(result, ds) for ds, result in made if result.get("space_id") != own]
    replaced = str(night.result("publish").get("previous_space_id") or "")
    if replaced and replaced != own:
        older = partitions.committed(lake, "item_embeddings", f"space={replaced}") or older
    return older[-1] if older else ""


def partition(project: Mapping[str, Any], ds: str) -> str:
    """Partition of `item_embeddings` that a `project` wrote."""
    return f"space={project.get('space_id')}/ds={ds}"


def serving(nights: Sequence[Night]) -> tuple[str, str]:
    """(date of the snapshot, space) that serve after these nights, as their manifests tell; empty where nothing was published."""
    ds, space_id = "", ""
    for night in nights:
        if night.done("publish"):
            ds, space_id = night.ds, str(night.result("publish").get("space_id") or "")
        if back := night.result("rollback"):
            ds, space_id = str(back.get("serves_ds") or ds), str(back.get("space_id") or space_id)
    return ds, space_id


def since(lake: Path, space_id: str) -> str:
    """Date of the first snapshot that a space was filled with; empty where the lake no longer tells."""
    dates = partitions.committed(lake, "item_embeddings", f"space={space_id}") if space_id else []
    return dates[0].partition("/ds=")[2] if dates else ""


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
        say(f"no maps: {error}")
        return None, [], f"the lake's tables can't be read: {error}"
    return found, layers, ""


# ------------------------------------------------------------------------------------------------------------------ drift


def measure(config: Config, night: Night, spaces: Spaces, layers: Sequence[Layer], views: Views | None) -> dict[str, float]:
    """Measures of the night; names of vectors' measures carry their space or encoder, so that only like is compared."""
    values = drift.of_extract(night.result("extract"))
    # of a handful of new texts the mean says nothing, and it must not make the encoder due: text.characters is of them all
    if (texts := night.total("embed", "embedded")) >= ENOUGH:
        values["embedded.tokens"] = night.total("embed", "tokens") / texts
    if views is not None:
        values |= drift.of_texts([sum(len(name) + len(value) for name, value in pairs) for pairs in views.sample.attributes])
    kinds = {
        "After SCFT": f"llm {spaces.encoder_id}",
        "Served": f"served {spaces.served.partition('/')[0].removeprefix('space=')}",
    }
    for layer in layers:
        if layer.name in kinds:
            values |= drift.of_vectors(kinds[layer.name], np.stack(list(layer.vectors.values())))
    covered = coverage(config, spaces)
    if covered is not None:
        values["coverage of the logs"] = covered
    return {name: round(value, 6) for name, value in values.items()}


def coverage(config: Config, spaces: Spaces) -> float | None:
    """Share of the logs' events whose item has a vector; None without logs or vectors."""
    lake = config.run.lake
    try:
        newest = partitions.latest(lake, INTERACTIONS.name, config.run.ds)
        if not spaces.served or not config.coverage_events:
            return None
        ids = views.ids_of(lake, spaces.served)
        return drift.coverage(lake, newest, pa.array(ids, pa.string()), config.coverage_events)
    except (InputError, OSError, ValueError):
        return None


def earlier(lake: Path, before: Sequence[Night]) -> list[dict[str, float]]:
    """Measures of earlier nights, from the manifests of their reports."""
    found = []
    for night in before:
        path = manifests.path_of(lake, night.ds, "report")
        try:
            values = json.loads(path.read_text())["result"]["drift"]
            found.append({str(name): float(value) for name, value in values.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def trained_on(lake: Path, ds: str) -> str:
    """Date of the newest training of an encoder at or before `ds`; "" where none is on record."""
    found = ""
    for path in sorted((lake / "manifests").glob("ds=*/scft.json")):
        date = path.parent.name.removeprefix("ds=")
        try:
            made = json.loads(path.read_text())
            if date <= ds and made["status"] == "done" and made["result"]["due"]:
                found = date
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


# ----------------------------------------------------------------------------------------------------------------- output


def write_text(path: Path, text: str) -> None:
    """Replaces a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    aside.write_text(text)
    aside.replace(path)


def sent(config: Config, found: Sequence[Mapping[str, Any]]) -> int:
    """Events that the endpoint took; one that is down costs the events there, not the report."""
    if not config.openlineage_url:
        return 0
    try:
        return lineage.send(found, config.openlineage_url)
    except (OSError, ValueError) as error:
        say(f"the OpenLineage endpoint did not take the events ({error}): they are in openlineage.jsonl")
        return 0


def log(config: Config, result: Result, night: Night) -> None:
    """The page, the measures and the night's data sets with their digests as a run of MLflow, where there is one."""
    if not config.run.tracking_uri:
        return
    from jobs.engines import registry

    try:
        with registry.connected(config.run) as client:
            import mlflow

            tags = {"job": "report", "ds": night.ds, "state": result.state}
            name = f"report {night.ds}"
            with mlflow.start_run(experiment_id=registry.experiment(client, config.run), run_name=name, tags=tags):
                mlflow.log_metrics({metric(name): value for name, value in result.drift.items()})
                registry.log_inputs(written(night))
                mlflow.log_artifact(result.path)
                mlflow.log_artifact(str(Path(result.path).with_name("openlineage.jsonl")))
    except (InputError, Unavailable) as error:
        say(f"the page is written, but not logged: {error}")


def metric(name: str) -> str:
    """A measure's name in the letters that MLflow takes."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-. /") else "_" for letter in name)


def written(night: Night) -> dict[str, str]:
    """Everything that the night's jobs wrote, with digests."""
    return {name: str(digest) for run in night.runs for name, digest in run.result.get("outputs", {}).items() if digest}


def say(line: str) -> None:
    """One line on standard error."""
    print(f"report: {line}", file=sys.stderr, flush=True)
