"""The evaluation -> aliases champion and previous, or a refusal that says why; each decision is a record in MLflow."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jobs import contracts, model_card, registry
from jobs.contracts import InputError, Refused, Run

Verdict = Literal["passed", "failed", "undecided"]
CODE = Path(__file__).with_name("pyfunc.py")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a challenger must show."""

    run: Run
    slices: tuple[str, ...] = ("overall", "tail", "cold", "short")
    """Slices of the evaluation in which NDCG must not be worse than the champion's."""
    margin: float = 0.02
    """Loss that still counts as none, as a share of the champion's NDCG in the slice."""
    floors: tuple[str, ...] = ("popularity",)
    """Models of the evaluation that any challenger must beat overall."""
    approved_by: str = ""
    """Who takes an undecided challenger upon themselves: their name, kept with the decision; empty leaves it undecided. Does
    not overrule a gate that failed."""

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise InputError(f"promote.margin {self.margin} is below 0: it is the share of NDCG that may be lost")
        if not self.floors and not self.slices:
            raise InputError("promote.slices and promote.floors are both empty: nothing would be judged")


@dataclass(frozen=True, kw_only=True)
class Reason:
    """One gate's verdict and the figures behind it."""

    gate: str
    verdict: Verdict
    text: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """The decision; a refusal is no result, it ends the job with status 3."""

    decision: Literal["promoted", "undecided"]
    """`undecided` leaves the champion as it is and waits for a person: run again with `approved_by`."""
    recommender_id: str
    encoder_id: str
    space_id: str
    champion_id: str
    """Against whom it was judged; empty on the first night."""
    reasons: tuple[Reason, ...]
    approved_by: str
    version: str
    """Of `llmemb-recommender`."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Judges the newest evaluation and moves the aliases, champion last: a kill before leaves the old one.

    What is champion already stays so, and nothing is recorded again.

    Raises InputError without a registry or an evaluation, or for one made against another champion; Refused with the figures.
    """
    if not config.run.tracking_uri:
        raise InputError("promote needs the registry: give run.tracking_uri in the recipe")
    judged = contracts.read_manifest(config.run.lake, config.run.ds, "evaluate")["result"]
    champion = registry.champion(config.run)
    challenger_id = str(judged["recommender_id"])
    serving = champion["recommender_id"] if champion else ""
    if serving not in (judged["champion_id"], challenger_id):
        raise InputError(f"the evaluation compared with {judged['champion_id'] or 'no champion'}, but {serving or 'none'} is "
                         "champion now: run evaluate again")  # fmt: skip
    reasons = gates(config, judged)
    if champion and serving == challenger_id:
        decision, version = "promoted", champion["version"]
    else:
        decision = decided(reasons, config.approved_by)
        version = recorded(config, judged, reasons, decision)
    tell(challenger_id, decision, reasons, config.approved_by)
    if decision == "refused":
        raise Refused("; ".join(f"{reason.gate}: {reason.text}" for reason in reasons if reason.verdict == "failed"))
    if decision == "promoted" and serving != challenger_id:
        before = [("previous", champion["version"])] if champion else []
        registry.set_aliases(config.run, [*before, ("challenger", None), ("champion", version)])
    result = Result(
        decision="promoted" if decision == "promoted" else "undecided",
        recommender_id=challenger_id,
        encoder_id=judged["encoder_id"],
        space_id=contracts.space_id(judged["encoder_id"], challenger_id),
        champion_id=judged["champion_id"],
        reasons=reasons,
        approved_by=config.approved_by,
        version=version,
        inputs={"metrics": judged["outputs"]["metrics"], "recommender": challenger_id, "champion": judged["champion_id"]},
        outputs={"champion": challenger_id} if decision == "promoted" else {},
        rows={},
    )
    if decision == "promoted" and serving != challenger_id:
        card = model_card.card(config.run.lake, config.run.ds, contracts.as_json(result), judged)
        registry.describe(config.run, version, card)
    return result


# ------------------------------------------------------------------------------------------------------------------ gates


def gates(config: Config, judged: dict[str, Any]) -> tuple[Reason, ...]:
    """All gates' verdicts: floors overall, no loss to the champion in each slice, no leak of popularity.

    Raises InputError for a floor or slice that the evaluation lacks.
    """
    rows = {(row["against"], row["slice"]): row for row in judged["differences"]}
    reasons = [beats(floor, at(rows, floor, "overall")) for floor in config.floors]
    if judged["champion_id"]:
        reasons += [not_worse(name, at(rows, "champion", name), config.margin) for name in config.slices]
    if judged["leaking"]:
        text = (
            f"raw embeddings foretell test popularity with R2 {judged['leak']['r2']:.3f}: find the field of the prompt that leaks"
        )
        reasons.append(Reason(gate="no leak", verdict="undecided", text=text))
    return tuple(reasons)


def at(rows: dict[tuple[str, str], dict[str, Any]], against: str, slice_: str) -> dict[str, Any]:
    """The comparison with a model in a slice."""
    if (against, slice_) not in rows:
        known = sorted({model for model, _ in rows}), sorted({name for _, name in rows})
        raise InputError(f"the evaluation has no comparison with {against} on {slice_}: models {known[0]}, slices {known[1]}")
    return rows[against, slice_]


def beats(floor: str, row: dict[str, Any]) -> Reason:
    """A floor is beaten when the whole interval of the difference is above zero."""
    if row["low"] is None:
        verdict: Verdict = "undecided"
    elif row["low"] > 0:
        verdict = "passed"
    else:
        verdict = "failed" if row["value"] <= 0 else "undecided"
    return Reason(gate=f"above {floor}", verdict=verdict, text=figures(row))


def not_worse(slice_: str, row: dict[str, Any], margin: float) -> Reason:
    """Non-inferiority: the interval's lower end must not lie further below zero than the margin.

    An interval wholly below the margin fails; one that reaches over it can't tell, and neither can a slice without one.
    """
    gate = f"not worse on {slice_}"
    if row["low"] is None:
        return Reason(gate=gate, verdict="undecided", text=f"too few users to tell ({row['n']})")
    allowed = margin * row["reference"]
    text = f"{figures(row)}, allowed loss {allowed:.4f}"
    if row["low"] >= -allowed:
        return Reason(gate=gate, verdict="passed", text=text)
    if row["high"] < -allowed:
        return Reason(gate=gate, verdict="failed", text=text)
    why = "borderline" if row["detectable"] and row["detectable"] <= allowed else "the slice could not have shown that loss"
    return Reason(gate=gate, verdict="undecided", text=f"{text}: {why}")


def figures(row: dict[str, Any]) -> str:
    """A difference in words."""
    if row["low"] is None:
        return f"too few users to tell ({row['n']})"
    shown = f", could have shown {row['detectable']:.4f}" if row["detectable"] else ""
    return (f"NDCG {row['value']:+.4f} (95 % {row['low']:+.4f} to {row['high']:+.4f}) beside {row['reference']:.4f}, "
            f"{row['n']} users{shown}")  # fmt: skip


def decided(reasons: tuple[Reason, ...], approved_by: str) -> Literal["promoted", "refused", "undecided"]:
    """One failed gate refuses; one that can't tell needs a person."""
    verdicts = {reason.verdict for reason in reasons}
    if "failed" in verdicts:
        return "refused"
    return "undecided" if "undecided" in verdicts and not approved_by else "promoted"


# ----------------------------------------------------------------------------------------------------------------- record


def recorded(config: Config, judged: dict[str, Any], reasons: tuple[Reason, ...], decision: str) -> str:
    """Records the decision with its reasons and the table it rests on; gives the challenger's version.

    Until it is promoted it bears the alias `challenger`.
    """
    artifact = registry.fetch(config.run, "recommender", judged["recommender_id"])
    ids = {name: str(judged[name]) for name in ("recommender_id", "encoder_id", "champion_id")}
    version = registry.log_run(
        config.run,
        "promote",
        {**ids, **contracts.as_json(config)},
        {},
        artifact,
        registry.RECOMMENDER,
        CODE,
        tags={**ids, "decision": decision, "approved_by": config.approved_by},
        documents={"decision": {**ids, "decision": decision, "reasons": reasons, "approved_by": config.approved_by,
                                "differences": judged["differences"], "values": judged["values"]}},
    )  # fmt: skip
    assert version is not None
    if decision != "promoted":
        registry.set_aliases(config.run, [("challenger", version)])
    return version


def tell(challenger_id: str, decision: str, reasons: tuple[Reason, ...], approved_by: str) -> None:
    """The decision, for a person, on standard error."""
    by = f" by {approved_by}" if approved_by and decision == "promoted" else ""
    print(f"promote: {challenger_id} is {decision}{by}", file=sys.stderr)
    for reason in reasons:
        print(f"  {reason.verdict:<10} {reason.gate:<24} {reason.text}", file=sys.stderr, flush=True)
