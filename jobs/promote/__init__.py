"""The evaluation -> aliases champion and previous, or a refusal that says why; each decision is a record in MLflow."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.engines import registry
from jobs.lake import artifacts, manifests
from jobs.lake.locks import alone
from jobs.lake.outcomes import read_outcomes
from jobs.lake.tables import space_of
from jobs.promote import model_card
from jobs.promote.judging import Reason, Rules, gates
from jobs.run import InputError, Refused, Run, as_json

log = logging.getLogger(__name__)

Decision = Literal["promoted", "refused", "undecided", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a challenger must show."""

    run: Run
    margins: dict[str, float] = field(default_factory=lambda: {"overall": 0.02, "tail": 0.05, "cold": 0.1, "short": 0.03})
    """Slices of the evaluation in which a challenger must not be worse than the champion, and the loss that still counts as none,
    as a share of the champion's NDCG: wider where users are fewer. docs/gates.md says how many users each takes."""
    reference_times: float = 2.0
    """The same against the fixed reference (the first champion, until a person names another), with margins so many times as
    wide: small losses of many nights can't add up to more. 0 leaves it out."""
    min_users: int = 30
    """A slice of fewer users is undecided."""
    heaviest: int = 10
    """A user with more held-out events in a slice weighs as much as one with so many; 0 sets no bound."""
    floors: tuple[str, ...] = ("popularity",)
    """Models of the evaluation that any challenger must beat overall. Where it doesn't, a person is asked."""
    always_ask: bool = False
    """A person says yes to every promotion, also where all gates passed: nothing becomes champion by itself."""
    approved_by: str = ""
    """Who takes an undecided challenger upon themselves: their name, kept with the decision; empty leaves it undecided. Does
    not overrule a gate that failed."""
    overruled_by: str = ""
    """Who lets out a challenger that doesn't beat a floor: their name, kept with the decision. A loss to the champion or to the
    reference stays refused."""
    reference_by: str = ""
    """Who makes this challenger the fixed reference, once it is promoted: their name, kept with the decision."""
    rejected_by: str = ""
    """Who turns an undecided challenger down: their name, kept with the decision."""
    wait_s: float = 60.0
    """How long to wait for another promotion or rollback."""

    def __post_init__(self) -> None:
        if self.approved_by and self.rejected_by:
            raise InputError("promote.approved_by and promote.rejected_by are both given: leave one empty")
        for slice_, margin in self.margins.items():
            if not 0 <= margin < 1:
                raise InputError(
                    f"promote.margins.{slice_} is {margin}, it is the share of NDCG that may be lost: from 0 to below 1"
                )
        if 0 != self.reference_times < 1 or min(self.min_users, self.heaviest) < 0:
            raise InputError("promote.reference_times must be 0 or at least 1, min_users and heaviest at least 0")
        if not self.floors and not self.margins:
            raise InputError("promote.margins and promote.floors are both empty: nothing would be judged")

    @property
    def rules(self) -> Rules:
        """What the gates go by."""
        names = ("margins", "reference_times", "floors", "min_users", "heaviest")
        return Rules(**{name: getattr(self, name) for name in names})


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
    reference_id: str
    """The fixed reference that it was judged against; empty where there was none yet."""
    reasons: tuple[Reason, ...]
    approved_by: str
    overruled_by: str
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
    judged = evaluation(config.run)
    champion = registry.champion(config.run)
    challenger_id = str(judged["recommender_id"])
    serving = registry.judged_id(champion) if champion else ""
    outcomes = read_outcomes(artifacts.find(config.run.lake, "outcomes", judged["outcomes_id"]))
    reasons = tuple(gates(config.rules, judged, outcomes))
    decision: Decision
    if champion and serving == challenger_id:
        decision, version = "promoted", champion["version"]
    else:
        reasons += objections(config, judged, champion) + persons_yes(config)
        decision = decided(reasons, config)
        version = recorded(config, judged, reasons, decision)
        # the registry has no compare-and-set: who moved the alias without our lock is found by looking again
        late = objections(config, judged, registry.champion(config.run)) if decision == "promoted" else ()
        if late := tuple(reason for reason in late if reason.verdict == "failed"):
            reasons, decision = reasons + late, "refused"
            recorded(config, judged, reasons, decision)
    log_decision(challenger_id, decision, reasons, config)
    if decision == "refused":
        raise Refused("; ".join(f"{reason.gate}: {reason.text}" for reason in reasons if reason.verdict == "failed"))
    if decision == "promoted" and serving != challenger_id:
        registry.set_aliases(config.run, [*alias_moves(config, champion, version), ("challenger", None), ("champion", version)])
    result = result_of(config, judged, reasons, decision, version)
    if decision == "promoted" and serving != challenger_id:
        card = model_card.card(config.run.lake, config.run.ds, as_json(result), judged)
        registry.describe(config.run, version, card)
    return result


def result_of(
    config: Config, judged: dict[str, Any], reasons: tuple[Reason, ...], decision: Literal["promoted", "undecided", "rejected"],
    version: str,
) -> Result:  # fmt: skip
    """The decision as it is kept."""
    challenger_id = str(judged["recommender_id"])
    return Result(
        decision=decision,
        recommender_id=challenger_id,
        encoder_id=judged["encoder_id"],
        space_id=space_of(judged["encoder_id"], challenger_id),
        champion_id=judged["champion_id"],
        reference_id=judged["reference_id"],
        reasons=reasons,
        approved_by=config.approved_by,
        overruled_by=config.overruled_by,
        rejected_by=config.rejected_by,
        version=version,
        inputs=read(judged),
        outputs={"champion": challenger_id} if decision == "promoted" else {},
        rows={},
    )


# ------------------------------------------------------------------------------------------------------------------ gates


def evaluation(run: Run) -> dict[str, Any]:
    """The Result of `evaluate` of this date. Raises InputError where there is none, or only one of another date."""
    made = manifests.read(run.lake, run.ds, "evaluate", run.variant)
    if made["ds"] != run.ds:
        raise InputError(
            f"the newest evaluation is of {made['ds']}, not of {run.ds}: run evaluate for {run.ds}, or promote with "
            f"--ds {made['ds']}"
        )
    judged: dict[str, Any] = made["result"]
    if "outcomes_id" not in judged:
        raise InputError(f"the evaluation of {run.ds} was made before gates read every event: run evaluate again")
    return judged


def alias_moves(config: Config, champion: dict[str, str] | None, version: str) -> list[tuple[str, str | None]]:
    """Aliases that a promotion moves beside champion and challenger: `previous`, and the reference where it is new."""
    found: list[tuple[str, str | None]] = [("previous", champion["version"])] if champion else []
    if config.reference_by:
        return [*found, ("reference", version)]
    if registry.by_alias(config.run, "reference") is None:  # of a registry that is older than references, its champion
        return [*found, ("reference", champion["version"] if champion else version)]
    return found


def objections(config: Config, judged: dict[str, Any], champion: dict[str, str] | None) -> tuple[Reason, ...]:
    """What speaks against a promotion whatever the figures: the champion is another, newer, or not to be found."""
    against, serving = judged["champion_id"], registry.judged_id(champion) if champion else ""
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


def persons_yes(config: Config) -> tuple[Reason, ...]:
    """What is left to a person whatever the gates say."""
    text = "promote.always_ask is on: a person says yes to every promotion"
    return (Reason(gate="a person's yes", verdict="undecided", text=text),) if config.always_ask else ()


def decided(reasons: tuple[Reason, ...], config: Config) -> Decision:
    """A failed gate refuses, but a floor alone does not: that, and a gate that can't tell, needs a person."""
    failed = {reason.kind == "floor" for reason in reasons if reason.verdict == "failed"}
    if False in failed:
        return "refused"
    if config.rejected_by:
        return "rejected"
    if failed and not config.overruled_by:
        return "undecided"
    waiting = any(reason.verdict == "undecided" for reason in reasons)
    return "undecided" if waiting and not config.approved_by else "promoted"


# ----------------------------------------------------------------------------------------------------------------- record


def recorded(config: Config, judged: dict[str, Any], reasons: tuple[Reason, ...], decision: Decision) -> str:
    """Records the decision with its reasons and the table it rests on; gives the challenger's version.

    Until it is promoted it bears the alias `challenger`.
    """
    artifact = registry.fetch(config.run, "recommender", judged["recommender_id"])
    ids = {name: str(judged[name]) for name in ("recommender_id", "encoder_id", "champion_id", "reference_id")}
    people = {name: getattr(config, name) for name in ("approved_by", "overruled_by", "rejected_by", "reference_by")}
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
    ids = {"recommender": judged["recommender_id"], "champion": judged["champion_id"], "reference": judged["reference_id"]}
    return {"metrics": judged["outputs"]["metrics"], "outcomes": judged["outcomes_id"], **ids}


def log_decision(challenger_id: str, decision: Decision, reasons: tuple[Reason, ...], config: Config) -> None:
    """The decision, for a person."""
    yes = " and ".join(dict.fromkeys(name for name in (config.approved_by, config.overruled_by) if name))
    who = {"promoted": yes, "rejected": config.rejected_by}.get(decision)
    by = f" by {who}" if who else ""
    log.info("%s is %s%s", challenger_id, decision, by)
    for reason in reasons:
        log.info("  %-10s %-24s %s", reason.verdict, reason.gate, reason.text)
