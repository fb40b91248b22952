"""The sections of the report, each from the manifests, measures and views of a night. What is missing is told, never guessed."""

from __future__ import annotations

import datetime as dt
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from jobs.lake.lineage import JobRun, Night, as_number
from jobs.report import plots as plots
from jobs.report.drift import Measure
from jobs.report.html import ROWS, duration, figure, first_line, folded, join, missing, number, percent, said, short, table
from jobs.report.plots import Interval, Panel
from jobs.report.views import OTHERS, Views


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a page tells of."""

    night: Night
    before: tuple[Night, ...]
    """Earlier nights, oldest first."""
    measures: tuple[Measure, ...]
    views: Views | None
    why_no_views: str
    gpu_hour_price: float
    serving_ds: str
    """Date of the snapshot that serves, as the manifests tell; empty where nothing was published."""
    space_id: str = ""
    """Of the space that serves; empty where it is not known."""
    space_since: str = ""
    """Date of the first snapshot in that space; empty where the lake does not tell."""


# --------------------------------------------------------------------------------------------------------------- sections


def jobs_section(facts: Facts) -> Markup:
    """What ran, how it ended, and how long it took against the nights before."""
    if not facts.night.runs:
        return missing("No manifest of this night can be read.")
    groups = grouped(facts.night.runs)
    head = ["Job", "Ended", "Took", "Usually", "Device", "Rows"]
    parts = [table("Jobs of the night", head, [job_row(name, runs, facts.before) for name, runs in groups], numeric=False)]
    slow = [(name, spent) for name, runs in groups if (spent := seconds_of(runs))][:ROWS]
    if slow:
        longest = max(slow, key=lambda pair: pair[1])
        words = f"Seconds of each job, retries included; {longest[0]} took longest, {duration(longest[1])}."
        parts.append(figure(plots.bars("jobs", [name for name, _ in slow], [seconds for _, seconds in slow], "seconds"), words))
    return join(parts)


def grouped(runs: Sequence[JobRun]) -> list[tuple[str, list[JobRun]]]:
    """(name, runs): shards that ended well as one, so that many of them don't hide what came after; all others by themselves."""
    found: dict[str, list[JobRun]] = {}
    for run in runs:
        found.setdefault(run.job if run.status == "done" else f"{run.name} ({run.status})", []).append(run)
    return [(f"{some[0].job}, {len(some)} shards" if len(some) > 1 else some[0].name, some) for some in found.values()]


def seconds_of(runs: Iterable[JobRun]) -> float:
    """Seconds of runs, and of those of the same night that they followed."""
    return sum(one.seconds for run in runs for one in (*run.earlier, run))


def job_row(name: str, runs: Sequence[JobRun], before: Sequence[Night]) -> list[object]:
    """A job, or its shards, in the table of jobs."""
    counts: Counter[str] = Counter()
    for run in runs:
        counts.update({table: count for table, count in run.result.get("rows", {}).items() if isinstance(count, int)})
    first = runs[0]
    usual = median_of(lambda night: seconds_of(night.all(first.job)) if night.done(first.job) else None, before)
    again = sum(len(run.earlier) for run in runs)
    return [
        name,
        {"done": "✓ done", "refused": "! refused", "failed": "✗ failed"}.get(first.status, first.status),
        duration(seconds_of(runs)) + (f" in {again + len(runs)} runs" if again else ""),
        duration(usual) if usual else "–",
        first.result.get("device") or "–",
        ", ".join(f"{table} {count:,}" for table, count in counts.items()) or "–",
    ]


def funnel_section(facts: Facts) -> Markup:
    """From records seen to vectors served, and what was refused by reason."""
    night = facts.night
    extract, project, publish = (night.result(job) for job in ("extract", "project", "publish"))
    if not extract:
        return missing("extract did not end well on this night: nothing to count.")
    refused = extract.get("quarantined", {})
    of_items = sum(count for reason, count in refused.items() if reason.startswith("items:"))
    steps: list[tuple[str, float | None]] = [
        ("Item records seen", extract.get("seen", {}).get("items")),
        ("Refused, in quarantine", of_items),
        ("Items of the snapshot", extract.get("rows", {}).get("items")),
        ("New since the last snapshot", extract.get("new_items")),
        ("Text changed since", extract.get("changed_items")),
        (
            "Texts embedded this night",
            night.total("embed", "embedded") + night.total("embed", "resumed") if night.done("embed") else None,
        ),
        ("Vectors of the space", project.get("rows", {}).get("item_embeddings")),
        ("Vectors that serve", publish.get("items")),
    ]
    known = [(name, float(value)) for name, value in steps if value is not None]
    colours = [plots.BAD if name.startswith("Refused") else plots.GOOD for name, _ in known]
    words = "; ".join(f"{name.lower()} {value:,.0f}" for name, value in known)
    parts = [
        figure(
            plots.bars("funnel", [name for name, _ in known], [value for _, value in known], "items", colours), f"Items: {words}."
        )
    ]
    absent = [name.lower() for name, value in steps if value is None]
    if absent:
        parts.append(missing(f"Not known, as the job has not ended well: {', '.join(absent)}."))
    events = [
        ("Events seen", extract.get("seen", {}).get("interactions")),
        ("Events taken from the last snapshot", extract.get("carried")),
        ("Events kept", extract.get("rows", {}).get("interactions")),
        ("Events after this date, left for later", extract.get("later")),
        ("Users", extract.get("rows", {}).get("sequences")),
        ("Items left out because they were forgotten", extract.get("forgotten")),
    ]
    parts.append(table("Logs and users", ["What", "Count"], [[name, number(value)] for name, value in events]))
    rows = sorted(refused.items(), key=lambda pair: -pair[1])
    if rows:
        parts.append(table("Quarantine, by reason", ["Reason", "Records"], [[reason, f"{count:,}"] for reason, count in rows]))
    else:
        parts.append(said("Quarantine is empty: every record was good."))
    return join(parts)


def gates_section(facts: Facts) -> Markup:
    """The decision, differences with intervals by slice, and all models' values."""
    judged, promote = facts.night.result("evaluate"), facts.night.all("promote")
    parts: list[Markup] = []
    for run in promote:
        result = run.result
        if run.status == "done":
            by = f" by {result['approved_by']}" if result.get("approved_by") else ""
            against = f"against champion {result['champion_id']}" if result.get("champion_id") else "as the first champion"
            parts.append(said(f"Decision: {result.get('recommender_id')} is {result.get('decision')}{by}, {against}."))
            rows = [[reason["gate"], reason["verdict"], reason["text"]] for reason in result.get("reasons", [])]
            parts.append(table("Gates", ["Gate", "Verdict", "Figures"], rows, numeric=False))
        else:
            parts.append(said(f"promote {run.status}: {first_line(run.manifest.get('error'))}"))
    if not judged:
        return join([*parts, missing("Nothing was evaluated on this night: the champion stays.")])
    margin = promote[0].manifest.get("config", {}).get("margin") if promote else None
    parts += [*forests(judged, margin), *models_table(judged)]
    return join(parts)


def forests(judged: Mapping[str, Any], margin: float | None) -> list[Markup]:
    """A forest plot against the champion, or else against the floors overall; and the table of it."""
    rows = [row for row in judged.get("differences", []) if row.get("value") is not None]
    against = [row for row in rows if row["against"] == "champion"]
    overall = [row for row in rows if row["slice"] == "overall" and row["against"] != "champion"]
    id_only = [row for row in rows if row["against"] == "id_only" and row["slice"] != "overall"]
    parts = []
    for name, some, words in (
        (
            "champion",
            against,
            "Challenger less champion by slice, NDCG with 95 % intervals; dotted: the loss that counts as none.",
        ),
        ("floors", overall, "Challenger less every other model, overall, NDCG with 95 % intervals."),
        ("id-only", id_only, "Challenger less the ID-only model by slice, NDCG with 95 % intervals: what the texts are worth."),
    ):
        if some:
            intervals = [interval(row, margin if name == "champion" else None) for row in some]
            parts.append(figure(plots.forest(name, intervals, "difference in NDCG"), f"{words} {FOREST}"))
            cells = [
                [
                    row["against"] if name == "floors" else row["slice"],
                    *(number(row.get(key)) for key in ("value", "low", "high", "detectable", "n")),
                ]
                for row in some
            ]
            head = ["Model" if name == "floors" else "Slice", "Difference", "From", "To", "Could have shown", "Users"]
            parts.append(folded("These in figures", table(words.split(",")[0], head, cells)))
    if not against:
        parts.append(missing("There was no champion to compare with: the first night, or no registry."))
    return parts


FOREST = "Circle: surely no worse; diamond: can't tell; square: surely worse; cross: too few users for an interval."


def interval(row: Mapping[str, Any], margin: float | None) -> Interval:
    """A row of the forest plot."""
    low, high = row.get("low"), row.get("high")
    allowed = margin * (row.get("reference") or 0.0) if margin is not None else None
    floor = -(allowed or 0.0)
    found = (
        "undecided" if low is None or high is None else "passed" if low >= floor else "failed" if high < floor else "undecided"
    )
    name = row["against"] if row["slice"] == "overall" and row["against"] != "champion" else row["slice"]
    return Interval(label=f"{name} ({row.get('n', 0):,})", value=row["value"], low=low, high=high, margin=allowed, verdict=found)


MODELS = ("popularity", "repeat_markov_popularity", "id_only")
SLICES = ("overall", "cold", "tail", "head", "repeat", "new", "short", "long", "paper_tail")


def in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Names in a given order; others behind, by name."""
    return sorted(names, key=lambda name: (first.index(name) if name in first else len(first), name))


def models_table(judged: Mapping[str, Any]) -> list[Markup]:
    """Every model's NDCG in every slice, and its other metrics overall."""
    values = judged.get("values", {})
    if not values:
        return []
    # manifests are sorted by name; people read these in the order of the evaluation
    values = {model: values[model] for model in in_order(values, MODELS)}
    slices = in_order(next(iter(values.values())), SLICES)
    users = judged.get("users", {})
    metrics = sorted(next(iter(values[next(iter(values))].values())), key=lambda name: (name.startswith("sampled"), name))
    ndcg = next((name for name in metrics if name.startswith("ndcg")), metrics[0])
    rows = [[model, *(number(by_slice.get(name, {}).get(ndcg)) for name in slices)] for model, by_slice in values.items()]
    rows.insert(0, ["users", *(number(users.get(name)) for name in slices)])
    overall = [
        [model, *(number(by_slice.get("overall", {}).get(name)) for name in metrics)] for model, by_slice in values.items()
    ]
    return [
        table(f"{ndcg} of every model by slice (whole catalogue ranked)", ["Model", *slices], rows),
        table("All metrics overall; sampled ones are for comparison with papers only", ["Model", *metrics], overall),
    ]


def training_section(facts: Facts) -> Markup:
    """Curves of the trainings that the night rests on."""
    parts: list[Markup] = []
    scft = facts.night.result("scft")
    if scft:
        word = "was trained on this night" if scft.get("due") else f"is that of {scft.get('trained_ds')}, not due again"
        parts.append(said(f"SCFT: encoder {scft.get('encoder_id')} {word} ({scft.get('reason')})."))
        parts += scft_curves(scft)
    for job, words in (("pretrain", "The teacher"), ("rat", "RAT")):
        result = facts.night.result(job)
        if history := result.get("history"):
            epochs, best = list(range(1, len(history) + 1)), result.get("best_epoch")
            panels = [
                Panel(title="Training loss", across="epoch", lines=lines(epochs, history, ("loss",)), mark=best),
                Panel(title="Validation", across="epoch", lines=lines(epochs, history, ("ndcg", "recall")), mark=best),
            ]
            ndcg = number(result.get("validation_ndcg"))
            told = f"{words}: loss and validation by epoch; epoch {best} was kept, NDCG@10 {ndcg}."
            parts.append(figure(plots.curves(job, panels), told))
    return join(parts) if parts else missing("Nothing was trained on this night; new texts went through the champion.")


def lines(
    across: Sequence[float], history: Sequence[Mapping[str, float]], names: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """(x, y) of those figures that some step has."""
    found = {name: [(x, float(step[name])) for x, step in zip(across, history, strict=True) if name in step] for name in names}
    return {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in found.items() if pairs}


def scft_curves(scft: Mapping[str, Any]) -> list[Markup]:
    """Loss, and views found again, against the base model."""
    losses, history = scft.get("losses", []), scft.get("history", [])
    if not losses and len(history) < 2:
        return [missing("This encoder was not trained: it is the base model as it is.")]
    step = max(scft.get("steps", len(losses)), 1) / max(len(losses), 1)
    across = [float(entry.get("step", place)) for place, entry in enumerate(history)]
    best = scft.get("best_step")
    loss = {"loss": ([(place + 1) * step for place in range(len(losses))], losses)}
    found = lines(across, history, ("recall_1", "recall_10", "mrr"))
    panels = [
        Panel(title="Contrastive loss", across="step", lines=loss),
        Panel(title="Held-out views found", across="step", lines=found, mark=best),
    ]
    base, own = scft.get("base_figures", {}), scft.get("figures", {})
    rows = [[name, number(base.get(name)), number(own.get(name))] for name in own if name != "step"]
    words = f"SCFT: loss and retrieval of held-out views by step, from the base model at step 0 on; step {best} was kept."
    return [
        figure(plots.curves("scft", panels), words),
        table("The encoder against its base model", ["Figure", "Base", "After SCFT"], rows),
    ]


def maps_section(facts: Facts) -> Markup:
    """The maps of the embeddings, with a search, and how pure they are."""
    views = facts.views
    if views is None:
        return missing(f"No map: {facts.why_no_views}.")
    sampled = len(views.sample.item_ids)
    which = (
        f"all {sampled:,} items"
        if sampled >= views.sample.total
        else f"a sample of {sampled:,} of {views.sample.total:,} items, taken by content hash"
    )
    parts = [
        said(
            f"Each point is an item: {which}. Layout by t-SNE: near points are alike, distances between groups mean nothing. "
            + (
                f"Colour is the first value of “{views.attribute}”."
                if views.attribute
                else "No attribute sorts the items into few categories."
            )
        )
    ]
    parts += [missing(f"{name} is not shown: {why}.") for name, why in views.missing.items()]
    if not views.maps:
        return join(parts)
    parts.append(controls(views))
    parts.append(Markup('<div class="maps">{}</div>').format(join(one_map(place, views) for place in range(len(views.maps)))))
    parts.append(Markup('<script type="application/json" id="titles">{}</script>').format(Markup(safe_json(titles_data(views)))))
    rows = [[found.name, f"{found.compared:,}", percent(found.purity), percent(found.chance)] for found in views.maps]
    parts.append(
        table(
            f"Share of an item's ten nearest neighbours with its own “{views.attribute}”, among the items that all maps show",
            ["Embedding", "Items", "Share", "By chance"],
            rows,
        )
    )
    return join(parts)


def controls(views: Views) -> Markup:
    """Search and category filter of the maps."""
    names = [*views.categories, *(["other"] if OTHERS in views.groups and views.categories else [])]
    options = join(
        Markup('<option value="{}">{}</option>').format(
            place if name != "other" or place < len(views.categories) else OTHERS, name
        )
        for place, name in enumerate(names)
    )
    keys = join(
        Markup('<li><span class="key k{}" aria-hidden="true"></span>{}</li>').format(
            place if place < len(views.categories) else OTHERS, name
        )
        for place, name in enumerate(names)
    )
    return Markup(
        '<div class="controls"><label>Find a title <input type="search" id="find" autocomplete="off"></label>'
        '<label>Show only <select id="only"><option value="">all</option>{}</select></label>'
        '<output id="told" aria-live="polite">Point at an item, or move through a map with the arrow keys.</output></div>'
        '<ul class="keys" aria-label="Colours">{}</ul>'
    ).format(options, keys)


def one_map(place: int, views: Views) -> Markup:
    """One map."""
    found = views.maps[place]
    svg = plots.points(found.point_N2, np.asarray([views.groups[item] for item in found.places]))
    same = (
        f" {percent(found.purity)} of neighbours share a category, {percent(found.chance)} would by chance."
        if found.purity is not None
        else ""
    )
    return Markup(
        '<figure class="map"><h3>{}</h3><div tabindex="0" role="application" '
        'aria-label="Map of {} items: {}. Arrow keys move through them." data-map="{}">{}</div>'
        "<figcaption>{}.{}</figcaption></figure>"
    ).format(found.name, len(found.places), found.name, place, Markup(svg), found.what, same)


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


def safe_json(value: object) -> str:
    """JSON that can't end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def neighbours_section(facts: Facts) -> Markup:
    """Neighbours of some items under every embedding, and churn."""
    views = facts.views
    parts: list[Markup] = []
    if views is None or not views.examples:
        parts.append(missing("No examples: the night has no item_embeddings."))
    else:
        names = list(views.examples[0].columns)
        pool = (
            f"among all {views.pool:,} items"
            if views.pool >= views.sample.total
            else f"among a sample of {views.pool:,} of {views.sample.total:,} items"
        )
        parts.append(
            said(
                f"Examples are drawn by content hash, not picked; neighbours are looked for {pool} "
                "(the base LLM: among the items of its map)."
            )
        )
        rows = [
            [f"{found.title} [{found.item_id}]", found.group, *(listed(found.columns.get(name, [])) for name in names)]
            for found in views.examples
        ]
        parts.append(table("Nearest items before and after", ["Item", "Group", *names], rows, numeric=False))
    churn = facts.night.result("publish").get("churn") or {}
    if churn:
        kind = facts.night.result("publish").get("compatibility")
        rows = [[group, percent(share)] for group, share in churn.items()]
        parts.append(
            table(
                f"Neighbour churn against what served before ({kind}): share of the ten nearest that changed though no text did",
                ["Group", "Changed"],
                rows,
            )
        )
    else:
        parts.append(missing("No churn: nothing served before, or nothing was published on this night."))
    return join(parts)


def listed(near: Sequence[tuple[str, str]]) -> Markup | str:
    """Titles of a few items in a cell."""
    return Markup("<ol>{}</ol>").format(join(Markup("<li>{}</li>").format(title) for _, title in near)) if near else "–"


def drift_section(facts: Facts) -> Markup:
    """Measures against their history."""
    if not facts.measures:
        return missing("Nothing could be measured on this night.")
    order = {"alarm": 0, "steady": 1, "too few nights": 2}
    rows = [
        [
            found.name,
            number(found.value),
            number(found.median),
            number(found.allowed),
            found.nights,
            f"! {found.verdict}" if found.verdict == "alarm" else found.verdict,
        ]
        for found in sorted(facts.measures, key=lambda found: (order[found.verdict], found.name))
    ]
    return join(
        [
            said(
                "Bounds come from the history of each measure: its median, and robust deviations around it. "
                "Vectors are compared within one space only."
            ),
            table(
                "Measures of this night", ["Measure", "Tonight", "Median before", "Allowed distance", "Nights", "Verdict"], rows
            ),
        ]
    )


def cost_section(facts: Facts) -> Markup:
    """Throughput, GPU time and cost against the nights before, and the age of what serves."""
    nights = [*facts.before, facts.night]
    rows = [
        [name, number(value, 3), number(median_of(function, facts.before), 3)]
        for name, function in costs(facts)
        if (value := function(facts.night)) is not None or facts.before
    ]
    parts = [table("Throughput and cost", ["Figure", "Tonight", "Median before"], rows)]
    spent = since_promotion(facts)
    if spent is not None:
        parts.append(said(f"Since the promotion before, device time worth {spent:,.2f} was used: what the last promotion cost."))
    if facts.serving_ds:
        late = days_between(facts.serving_ds, facts.night.ds)
        behind = "this night's" if late == 0 else f"{late} day{'' if late == 1 else 's'} behind this night"
        parts.append(said(f"What serves is the snapshot of {facts.serving_ds}: {behind}."))
        if facts.space_since:
            old = days_between(facts.space_since, facts.night.ds)
            age = f"{old} day{'' if old == 1 else 's'} old" if old else "new this night"
            parts.append(said(f"It is in space {facts.space_id}, which is {age}: first filled with {facts.space_since}."))
    else:
        parts.append(missing("Nothing was published up to this night."))
    if len(nights) > 1:
        dates = [night.ds for night in nights]
        taken = [minutes(night) for night in nights]
        parts.append(
            figure(
                plots.over_nights("minutes", dates, {"all jobs": taken}, "minutes"),
                f"Minutes of all jobs over {len(nights)} nights.",
            )
        )
        share = {group: [as_share(night, group) for night in nights] for group in ("head", "tail", "cold")}
        if any(value is not None for values in share.values() for value in values):
            parts.append(
                figure(plots.over_nights("churn", dates, share, "share changed"), "Neighbour churn over the nights, by group.")
            )
    else:
        parts.append(missing("This is the first night: there is no history to compare with."))
    return join(parts)


def as_share(night: Night, group: str) -> float | None:
    """Churn of a group on a night."""
    value = (night.result("publish").get("churn") or {}).get(group)
    return float(value) if isinstance(value, int | float) else None


def minutes(night: Night) -> float | None:
    """Minutes of all jobs and their retries; None where nothing ran."""
    return sum(run.seconds for run in night.attempts()) / 60 or None


PER_THOUSAND = "Device cost per thousand items embedded"


def costs(facts: Facts) -> list[tuple[str, Callable[[Night], float | None]]]:
    """Figures of a night, each None where it is not known."""

    def speed(night: Night) -> float | None:
        return max((as_number(run.result.get("tokens_per_second")) for run in night.attempts("embed")), default=0.0) or None

    def gpu(night: Night) -> float:
        return sum(run.seconds for run in night.attempts() if run.on_gpu)

    def per_thousand(night: Night) -> float | None:
        embedded = night.total("embed", "embedded")
        seconds = sum(run.seconds for run in night.attempts("embed"))
        return seconds / 3600 * facts.gpu_hour_price / embedded * 1000 if embedded else None

    return [
        ("Embedding, tokens a second", speed),
        ("Texts embedded", lambda night: int(night.total("embed", "embedded")) if night.all("embed") else None),
        (PER_THOUSAND, per_thousand),
        ("GPU seconds of all jobs", gpu),
        ("Minutes of all jobs", lambda night: minutes(night) or 0.0),
        ("Vectors written online", lambda night: int(night.total("publish", "written")) if night.done("publish") else None),
        ("Read of up to 500 vectors, median ms", lambda night: night.result("lookup").get("read_ms_p50")),
    ]


def median_of(function: Callable[[Night], float | None], nights: Sequence[Night]) -> float | None:
    """Median over the nights that know the figure."""
    known = [value for night in nights if (value := function(night)) is not None]
    return statistics.median(known) if known else None


DEVICE_JOBS = ("scft", "embed", "pretrain", "rat", "evaluate")


def since_promotion(facts: Facts) -> float | None:
    """Price of the device time from the promotion before the last one to the last one; None without any."""
    nights = [*facts.before, facts.night]
    places = [place for place, night in enumerate(nights) if night.result("promote").get("decision") == "promoted"]
    if not places:
        return None
    start = places[-2] + 1 if len(places) > 1 else 0
    seconds = sum(run.seconds for night in nights[start : places[-1] + 1] for run in night.attempts() if run.job in DEVICE_JOBS)
    return seconds / 3600 * facts.gpu_hour_price


def days_between(before: str, after: str) -> int:
    """Whole days between two dates."""
    return (dt.date.fromisoformat(after) - dt.date.fromisoformat(before)).days


def origin_section(facts: Facts) -> Markup:
    """What was read and written, with digests; and how to ask on."""
    rows = []
    for run in facts.night.runs:
        for kind, things in (("read", run.result.get("inputs", {})), ("wrote", run.result.get("outputs", {}))):
            rows += [[run.name, kind, name, short(digest)] for name, digest in things.items() if digest]
    code = sorted({str(run.manifest.get("code_revision", "unknown")) for run in facts.night.runs})
    recipes = sorted({short(run.manifest.get("recipe_sha256")) for run in facts.night.runs})
    parts = [
        said(f"Code {', '.join(code) or 'unknown'}; recipe {', '.join(recipes) or 'unknown'}."),
        folded(f"All digests ({len(rows)})", digests(rows)),
        Markup(
            "<p>Where one vector came from: <code>python -m jobs explain --recipe FILE --ds {} --set explain.item=ID</code></p>"
        ).format(facts.night.ds),
    ]
    return join(parts)


def digests(rows: Sequence[Sequence[object]]) -> Markup:
    """Every digest."""
    return (
        table("What each job read and wrote", ["Job", "It", "What", "Digest"], rows, numeric=False)
        if rows
        else missing("None is recorded.")
    )
