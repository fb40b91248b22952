"""The night in a line: whether to worry, and what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jobs.lake.nights import NIGHTLY, Night
from jobs.report.facts import Facts
from jobs.report.words import first_line

State = Literal["good", "look", "bad"]
POINTS = 12
"""Things to look at that are named; of a thousand failed shards the first will do."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The night in a line."""

    state: State
    line: str
    points: tuple[str, ...]
    """What to look at."""


def verdict(facts: Facts) -> Verdict:
    """Whether to worry, and why: a failed job is bad, a gate's refusal or an alarm is to be looked at."""
    bad, look = failures(facts.night), [*open_questions(facts.night), *alarms(facts)]
    state: State = "bad" if bad else "look" if look else "good"
    points = [*bad, *look]
    more = [f"and {len(points) - POINTS:,} more"] if len(points) > POINTS else []
    return Verdict(state=state, line=headline(facts, bad, look), points=(*points[:POINTS], *more))


def failures(night: Night) -> list[str]:
    """Jobs that failed, and manifests that can't be read."""
    failed = [f"{run.name} failed: {first_line(run.manifest.get('error'))}" for run in night.runs if run.status == "failed"]
    return failed + [f"the manifest {name} can't be read" for name in night.unreadable]


def open_questions(night: Night) -> list[str]:
    """What gates refused or could not tell, and jobs that have not run."""
    found = [
        f"{run.name} was refused by a gate: {first_line(run.manifest.get('error'))}"
        for run in night.runs
        if run.status == "refused"
    ]
    found += [
        f"{run.name} ended well, and did not when it was run again: {first_line(one.manifest.get('error'))}"
        for run in night.runs
        for one in run.earlier
        if run.status == "done" and one.status != "done" and one.began > run.began
    ]
    absent = [job for job in NIGHTLY if not night.all(job)]
    if absent:
        found.append(f"the night is unfinished: {', '.join(absent)} {'has' if len(absent) == 1 else 'have'} not run")
    if night.result("promote").get("decision") == "undecided":
        found.append("the challenger needs a person: a gate can't tell (run promote again with approved_by)")
    if night.result("evaluate").get("leaking"):
        found.append("a field of the prompt leaks popularity into the embeddings")
    return found + below_floors(night.result("evaluate"))


def alarms(facts: Facts) -> list[str]:
    """The measures that drifted, in one line; nothing where none did."""
    names = [measure.name for measure in facts.measures if measure.verdict == "alarm"]
    shown = f"{', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
    return [f"{len(names)} of {len(facts.measures)} measures drifted: {shown}"] if names else []


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
