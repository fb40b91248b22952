"""The gates: what an evaluation's outcomes say of a challenger, in figures that a person can follow.

Three kinds: no loss beyond a margin to the champion, none beyond a wider one to the fixed reference, in each slice; and floors,
which are to be beaten overall. A slice that can't tell is undecided and says how many users it would take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jobs.lake.outcomes import Outcomes
from jobs.run import InputError
from models.judge.gates import RARE, Comparison, Verdict, by_user, compare

Kind = Literal["floor", "champion", "reference", "other"]


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One gate's verdict and the figures behind it."""

    gate: str
    verdict: Verdict
    text: str
    kind: Kind = "other"
    """What it compares with; a person may overrule a floor."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What counts as a loss, and how much it takes to tell."""

    margins: Mapping[str, float]
    reference_times: float
    floors: tuple[str, ...]
    min_users: int
    heaviest: int


def compare_slice(outcomes: Outcomes, against: str, slice_: str, margin: float, rules: Rules) -> Comparison:
    """The challenger beside a model in a slice. Raises InputError for one that was not evaluated."""
    if against not in outcomes.models or slice_ not in outcomes.slices:
        raise InputError(
            f"the evaluation has no comparison with {against} on {slice_}: models {outcomes.models}, slices {outcomes.slices}"
        )
    inside_C = outcomes.slices_SC[outcomes.slices.index(slice_)]
    user_C, users = outcomes.user_C[inside_C], int(outcomes.user_C.max(initial=-1)) + 1
    challenger_U, other_U = (
        by_user(outcomes.ndcg_KC[outcomes.models.index(name), inside_C], user_C, users) for name in ("llmemb", against)
    )
    cases_U = np.bincount(user_C, minlength=users)
    return compare(challenger_U, other_U, cases_U, margin=margin, min_users=rules.min_users, heaviest=rules.heaviest)


def gates(rules: Rules, judged: Mapping[str, Any], outcomes: Outcomes) -> Iterator[Reason]:
    """All gates' verdicts. Raises InputError for a floor or slice that the evaluation lacks."""
    for floor in rules.floors:
        yield beats(floor, compare_slice(outcomes, floor, "overall", 0.0, rules))
    if judged["champion_id"]:
        for slice_, margin in rules.margins.items():
            yield not_worse("champion", slice_, margin, compare_slice(outcomes, "champion", slice_, margin, rules))
    # where the champion is the reference, the wider margin could not refuse what the narrow one lets pass
    if rules.reference_times and judged["reference_id"] not in ("", judged["champion_id"]):
        for slice_, margin in rules.margins.items():
            wide = min(margin * rules.reference_times, 1.0)
            yield not_worse("reference", slice_, wide, compare_slice(outcomes, "reference", slice_, wide, rules))
    if judged["leaking"]:
        text = f"raw embeddings foretell test popularity with R2 {judged['leak']['r2']:.3f}: find the prompt's field that leaks"
        yield Reason(gate="no leak", verdict="undecided", text=text)


def beats(floor: str, found: Comparison) -> Reason:
    """A floor is beaten when a gain is shown; no gain at all fails."""
    verdict = found.verdict
    if verdict == "undecided" and found.kept <= 1 and not math.isnan(found.low):
        verdict = "failed"
    return Reason(gate=f"above {floor}", verdict=verdict, text=figures(found), kind="floor")


def not_worse(against: Literal["champion", "reference"], slice_: str, margin: float, found: Comparison) -> Reason:
    """Non-inferiority: passes where a loss of more than the margin is refuted, fails where it is shown."""
    gate = f"not worse on {slice_}" if against == "champion" else f"no drift on {slice_}"
    text = f"{figures(found)}; may lose {margin:.3g}"
    if found.verdict == "undecided":
        text = f"{text}: {wanted(found, margin)}"
    return Reason(gate=gate, verdict=found.verdict, text=text, kind=against)


def wanted(found: Comparison, margin: float) -> str:
    """What it would take to decide."""
    least = math.ceil(RARE / margin) if margin else math.inf
    if math.isnan(found.needed):
        return "no hit to compare by"
    if found.hits < least and found.needed <= found.users:
        return f"{found.hits:.0f} hits can't tell, {least:,} could"
    if math.isinf(found.needed):
        return "an equal one never passes where nothing may be lost"
    return f"for an equal challenger to pass takes about {found.needed:,.0f} users"


def figures(found: Comparison) -> str:
    """A comparison in words."""
    counted = f"{found.users:,} users, {found.cases:,} events, {found.differing:,} users differ"
    if math.isnan(found.low):
        return f"too little to tell ({counted})"
    return f"keeps {share(found.kept)} of NDCG (96 % {share(found.low)} to {share(found.high)}), {counted}"


def share(value: float) -> str:
    """A share with three digits, words where there was nothing to keep."""
    return "any" if math.isinf(value) else f"{value:.3f}"
