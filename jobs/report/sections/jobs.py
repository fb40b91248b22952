"""What ran, how it ended, and how long it took against the nights before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from jobs.lake.nights import JobRun, Night
from jobs.report import plots as plots
from jobs.report.blocks import ROWS, Figure, Table
from jobs.report.costs import median_of, seconds_of
from jobs.report.facts import Facts
from jobs.report.words import duration

SIGNS = {"done": "✓ done", "refused": "! refused", "failed": "✗ failed"}


def section(facts: Facts) -> dict[str, Any]:
    """The table of jobs, and a picture of their seconds."""
    groups = grouped(facts.night.runs)
    head = ["Job", "Ended", "Took", "Usually", "Device", "Rows"]
    rows = [job_row(name, runs, facts.before) for name, runs in groups]
    return {
        "jobs": Table(caption="Jobs of the night", head=head, rows=rows, numeric=False) if groups else None,
        "times": times(groups),
    }


def grouped(runs: Sequence[JobRun]) -> list[tuple[str, list[JobRun]]]:
    """(name, runs): shards that ended well as one, so that many of them don't hide what came after; all others by themselves."""
    found: dict[str, list[JobRun]] = {}
    for run in runs:
        found.setdefault(run.job if run.status == "done" else f"{run.name} ({run.status})", []).append(run)
    return [(f"{some[0].job}, {len(some)} shards" if len(some) > 1 else some[0].name, some) for some in found.values()]


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
        SIGNS.get(first.status, first.status),
        duration(seconds_of(runs)) + (f" in {again + len(runs)} runs" if again else ""),
        duration(usual) if usual else "–",
        first.result.get("device") or "–",
        ", ".join(f"{table} {count:,}" for table, count in counts.items()) or "–",
    ]


def times(groups: Sequence[tuple[str, Sequence[JobRun]]]) -> Figure | None:
    """Seconds of each job as bars; None where none took any."""
    known = [(name, spent) for name, runs in groups if (spent := seconds_of(runs))][:ROWS]
    if not known:
        return None
    longest, most = max(known, key=lambda pair: pair[1])
    picture = plots.bars("jobs", [name for name, _ in known], [seconds for _, seconds in known], "seconds")
    words = f"Seconds of each job, retries included; {longest} took longest, {duration(most)}."
    return Figure(picture=picture, words=words)
