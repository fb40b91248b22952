"""Curves of the trainings that the night rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.report import plots as plots
from jobs.report.blocks import Figure, Table
from jobs.report.facts import Facts
from jobs.report.plots import Panel
from jobs.report.words import number

TRAININGS = {"pretrain": "The teacher", "rat": "RAT"}
REFITS = {"": "The llmemb part", "teacher_": "The teacher"}
"""How the losses of a refit are called, and whose they are."""


def section(facts: Facts) -> dict[str, Any]:
    """SCFT's curves and its table against the base model, the curves of the teacher and of RAT, and a refit's beside them."""
    scft = facts.night.result("scft")
    results = {job: facts.night.named(job) for job in TRAININGS}
    refit = facts.night.named("rat-refit")
    return {
        "scft": {key: scft.get(key) for key in ("encoder_id", "due", "trained_ds", "reason")} if scft else None,
        "curves": scft_curves(scft) if scft else None,
        "base": against_base(scft),
        "parts": parts_table(results["rat"]),
        "epochs": [epoch_curves(job, result) for job, result in results.items() if result.get("history")],
        "refit": refit.get("note", ""),
        "refitted": refit_curves(refit),
        "refit_losses": refit_losses(refit),
    }


def scft_curves(scft: Mapping[str, Any]) -> Figure | None:
    """Loss, and held-out views found again; None for an encoder that was not trained."""
    losses, history = scft.get("losses", []), scft.get("history", [])
    if not losses and len(history) < 2:
        return None
    step = max(scft.get("steps", len(losses)), 1) / max(len(losses), 1)
    across = [float(entry.get("step", place)) for place, entry in enumerate(history)]
    best = scft.get("best_step")
    loss = {"loss": ([(place + 1) * step for place in range(len(losses))], losses)}
    found = lines(across, history, ("recall_1", "recall_10", "mrr"))
    panels = [
        Panel(title="Contrastive loss", across="step", lines=loss),
        Panel(title="Held-out views found", across="step", lines=found, mark=best),
    ]
    words = f"SCFT: loss and retrieval of held-out views by step, from the base model at step 0 on; step {best} was kept."
    return Figure(picture=plots.curves("scft", panels), words=words)


def against_base(scft: Mapping[str, Any]) -> Table:
    """The figures of an encoder beside those of its base model."""
    base, own = scft.get("base_figures", {}), scft.get("figures", {})
    rows = [[name, number(base.get(name)), number(own.get(name))] for name in own if name != "step"]
    worth = table_of(scft, "worth")
    told, plain = (table_of(table_of(worth, "ndcg"), name) for name in ("new", "base"))
    rows += [[f"NDCG@10 without any training, {name}", number(plain.get(name)), number(value)] for name, value in told.items()]
    said = f"; ranking without any training it is: {worth.get('verdict')} ({worth.get('why')})" if worth else ""
    return Table(caption=f"The encoder against its base model{said}", head=["Figure", "Base", "After SCFT"], rows=rows)


def parts_table(rat: Mapping[str, Any]) -> Table | None:
    """The parts of the recommender: columns, weight, and the goal of the search for each alone; None where it is one part."""
    fused = rat.get("fused")
    weights, widths, alone, gains = (table_of(fused, name) for name in ("weights", "widths", "alone", "gains"))
    if len(weights) < 2:
        return None
    rows = [[str(name), number(widths.get(name, 0)), number(weight), number(alone.get(name))] for name, weight in weights.items()]
    told = (
        "; NDCG@10 added on validation: " + ", ".join(f"{name} {number(gain)}" for name, gain in gains.items()) if gains else ""
    )
    caption = f"The parts of the recommender, weights in standard deviations of their scores{told}"
    return Table(caption=caption, head=["Part", "Columns", "Weight", "Alone, on validation"], rows=rows)


def table_of(found: object, name: str) -> Mapping[str, Any]:
    """A mapping inside a mapping; empty where a manifest of another version has something else there."""
    inner = found.get(name) if isinstance(found, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def epoch_curves(job: str, result: Mapping[str, Any]) -> Figure:
    """Loss and validation of a training by epoch."""
    history, best = result["history"], result.get("best_epoch")
    epochs = list(range(1, len(history) + 1))
    panels = [
        Panel(title="Training loss", across="epoch", lines=lines(epochs, history, ("loss",)), mark=best),
        Panel(title="Validation", across="epoch", lines=lines(epochs, history, ("ndcg", "recall")), mark=best),
    ]
    ndcg = number(result.get("validation_ndcg"))
    words = f"{TRAININGS[job]}: loss and validation by epoch; epoch {best} was kept, NDCG@10 {ndcg}."
    return Figure(picture=plots.curves(job, panels), words=words)


def refit_curves(refit: Mapping[str, Any]) -> Figure | None:
    """Losses of the training on all events by epoch, beside those of the training that the gates judged; None without any."""
    history = refit.get("history", [])
    epochs = list(range(1, len(history) + 1))
    panels = []
    for name, whose in REFITS.items():
        found = lines(epochs, history, (f"{name}gated", f"{name}all"))
        named = {{f"{name}gated": "judged", f"{name}all": "all events"}[key]: points for key, points in found.items()}
        if named:
            panels.append(Panel(title=f"{whose}: training loss", across="epoch", lines=named))
    if not panels:
        return None
    ratio = number(refit.get("loss_ratio"))
    words = f"Trained again on all events: loss by epoch beside the judged training's; at the last epoch {ratio} times as high."
    return Figure(picture=plots.curves("refit", panels), words=words)


def refit_losses(refit: Mapping[str, Any]) -> Table | None:
    """The last losses of both trainings, at the same epoch; None without any."""
    rows = []
    for name, whose in REFITS.items():
        both = [
            (at, step) for at, step in enumerate(refit.get("history", []), 1) if {f"{name}gated", f"{name}all"} <= step.keys()
        ]
        for at, step in both[-1:]:
            judged, everything = step[f"{name}gated"], step[f"{name}all"]
            rows.append([whose, str(at), number(judged), number(everything), number(everything / judged if judged else None)])
    if not rows:
        return None
    caption = "The training on all events against the judged one; there are no events left to judge it by"
    return Table(caption=caption, head=["Training", "Epoch", "Loss, judged", "Loss, all events", "Ratio"], rows=rows)


def lines(
    across: Sequence[float], history: Sequence[Mapping[str, float]], names: Sequence[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> (x, y), of those figures that some step has."""
    found = {name: [(x, float(step[name])) for x, step in zip(across, history, strict=True) if name in step] for name in names}
    return {name: ([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in found.items() if pairs}
