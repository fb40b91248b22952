"""The evaluation -> aliases champion and previous, or a refusal that says why; each decision is a record in MLflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from jobs.engines import registry
from jobs.lake import manifests
from jobs.lake.locks import alone
from jobs.lake.tables import space_of
from jobs.promote import model_card
from jobs.run import InputError, Refused, Run, as_json

log = logging.getLogger(__name__)

Verdict = Literal["passed", "failed", "undecided"]
Decision = Literal["promoted", "refused", "undecided", "rejected"]


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
    rejected_by: str = ""
    """Who turns an undecided challenger down: their name, kept with the decision."""
    wait_s: float = 60.0
    """How long to wait for another promotion or rollback."""

    def __post_init__(self) -> None:
        if self.approved_by and self.rejected_by:
            raise InputError("promote.approved_by and promote.rejected_by are both given: leave one empty")
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

    decision: Literal["promoted", "undecided", "rejected"]
    """`undecided` leaves the champion as it is and waits for a person: run again with `approved_by` or `rejected_by`."""
    recommender_id: str
    encoder_id: str
    space_id: str
    champion_id: str
    """Against whom it was judged; empty on the first night."""
    reasons: tuple[Reason, ...]
    approved_by: str
    rejected_by: str
    version: str
    """Of `llmemb-recommender`."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Judges the newest evaluation and moves the aliases, champion last: a kill before leaves the old one.

    What is champion already stays so, and nothing is recorded again. Of two at once one goes first, and the other one's
    evaluation is then of yesterday.

    Raises InputError without a registry or an evaluation; Refused with the figures, with the champion that came in between, or
    with who is at it for too long.
    """
    if not config.run.tracking_uri:
        raise InputError("promote needs the registry: give run.tracking_uri in the recipe")
    with alone(config.run.lake, "promotion", config.wait_s):
        return decide(config)


def decide(config: Config) -> Result:
    """The decision, taken and carried out. Raises InputError, Refused."""
    judged = manifests.read(config.run.lake, config.run.ds, "evaluate")["result"]
    champion = registry.champion(config.run)
    challenger_id = str(judged["recommender_id"])
    serving = champion["recommender_id"] if champion else ""
    reasons = gates(config, judged)
    decision: Decision
    if champion and serving == challenger_id:
        decision, version = "promoted", champion["version"]
    else:
        reasons += standing(config, judged, champion)
        decision = decided(reasons, config)
        version = recorded(config, judged, reasons, decision)
        # the registry has no compare-and-set: who moved the alias without our lock is found by looking again
        late = standing(config, judged, registry.champion(config.run)) if decision == "promoted" else ()
        if late := tuple(reason for reason in late if reason.verdict == "failed"):
            reasons, decision = reasons + late, "refused"
            recorded(config, judged, reasons, decision)
    tell(challenger_id, decision, reasons, config)
    if decision == "refused":
        raise Refused("; ".join(f"{reason.gate}: {reason.text}" for reason in reasons if reason.verdict == "failed"))
    if decision == "promoted" and serving != challenger_id:
        before = [("previous", champion["version"])] if champion else []
        registry.set_aliases(config.run, [*before, ("challenger", None), ("champion", version)])
    result = Result(
        decision=decision,
        recommender_id=challenger_id,
        encoder_id=judged["encoder_id"],
        space_id=space_of(judged["encoder_id"], challenger_id),
        champion_id=judged["champion_id"],
        reasons=reasons,
        approved_by=config.approved_by,
        rejected_by=config.rejected_by,
        version=version,
        inputs=read(judged),
        outputs={"champion": challenger_id} if decision == "promoted" else {},
        rows={},
    )
    if decision == "promoted" and serving != challenger_id:
        card = model_card.card(config.run.lake, config.run.ds, as_json(result), judged)
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


def standing(config: Config, judged: dict[str, Any], champion: dict[str, str] | None) -> tuple[Reason, ...]:
    """What speaks against a promotion whatever the figures: the champion is another, newer, or not to be found."""
    against, serving = judged["champion_id"], champion["recommender_id"] if champion else ""
    reasons = []
    if serving != against:
        known = against or "no champion", serving or "none"
        text = f"the evaluation compared with {known[0]}, but {known[1]} is champion now: run evaluate again"
        reasons.append(Reason(gate="same champion", verdict="failed", text=text))
    elif champion and config.run.ds < champion["ds"]:
        text = f"the champion was trained on {champion['ds']}, {config.run.ds} is older: a backfill does not turn it back"
        reasons.append(Reason(gate="no older snapshot", verdict="failed", text=text))
    elif not champion and (before := registry.promoted_last(config.run)) not in ("", judged["recommender_id"]):
        text = f"no alias names a champion, yet {before} was promoted once: set the alias again, or let a person decide without"
        reasons.append(Reason(gate="champion known", verdict="undecided", text=text))
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


def decided(reasons: tuple[Reason, ...], config: Config) -> Decision:
    """One failed gate refuses; one that can't tell needs a person."""
    verdicts = {reason.verdict for reason in reasons}
    if "failed" in verdicts:
        return "refused"
    if config.rejected_by:
        return "rejected"
    return "undecided" if "undecided" in verdicts and not config.approved_by else "promoted"


# ----------------------------------------------------------------------------------------------------------------- record


def recorded(config: Config, judged: dict[str, Any], reasons: tuple[Reason, ...], decision: Decision) -> str:
    """Records the decision with its reasons and the table it rests on; gives the challenger's version.

    Until it is promoted it bears the alias `challenger`.
    """
    artifact = registry.fetch(config.run, "recommender", judged["recommender_id"])
    ids = {name: str(judged[name]) for name in ("recommender_id", "encoder_id", "champion_id")}
    people = {"approved_by": config.approved_by, "rejected_by": config.rejected_by}
    version = registry.log_run(
        config.run,
        "promote",
        {**ids, **as_json(config)},
        {},
        artifact,
        registry.RECOMMENDER,
        registry.RECOMMENDER_CODE,
        inputs=read(judged),
        tags={**ids, "decision": decision, **people},
        documents={"decision": {**ids, "decision": decision, "reasons": reasons, **people,
                                "differences": judged["differences"], "values": judged["values"]}},
    )  # fmt: skip
    assert version is not None
    if decision != "promoted":
        registry.set_aliases(config.run, [("challenger", version)])
    return version


def read(judged: dict[str, Any]) -> dict[str, str]:
    """What a decision rests on."""
    ids = {"recommender": judged["recommender_id"], "champion": judged["champion_id"]}
    return {"metrics": judged["outputs"]["metrics"], **ids}


def tell(challenger_id: str, decision: Decision, reasons: tuple[Reason, ...], config: Config) -> None:
    """The decision, for a person."""
    who = {"promoted": config.approved_by, "rejected": config.rejected_by}.get(decision)
    by = f" by {who}" if who else ""
    log.info("%s is %s%s", challenger_id, decision, by)
    for reason in reasons:
        log.info("  %-10s %-24s %s", reason.verdict, reason.gate, reason.text)
