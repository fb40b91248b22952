"""The model card of a promoted recommender: what it is, what it read, how it was judged, and what it must not be used for.

Made of manifests and artifacts alone, so that the card says what was, not what was meant. `promote` keeps it with the version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.lake import artifacts, manifests
from jobs.run import InputError


def card(lake: Path, ds: str, decision: Mapping[str, Any], judged: Mapping[str, Any]) -> str:
    """Markdown for the recommender of a decision (`promote`'s Result) on an evaluation (`evaluate`'s Result).

    What is not recorded in the lake is said to be unknown.
    """
    recommender_id, encoder_id = str(decision["recommender_id"]), str(decision["encoder_id"])
    recommender = artifacts.description(lake, "recommender", recommender_id)
    encoder = artifacts.description(lake, "encoder", encoder_id)
    extract, scft, rat = (manifest(lake, ds, job) for job in ("extract", "scft", "rat"))
    lines = [
        f"# Recommender {recommender_id}",
        "",
        f"Decision of {ds}: **{decision['decision']}**"
        + (f", approved by {decision['approved_by']}" if decision.get("approved_by") else "")
        + (f", in place of {decision['champion_id']}." if decision.get("champion_id") else ", as the first champion."),
        *section("What it is", what_it_is(recommender, encoder, encoder_id, decision)),
        *section("What it was made from", made_from(extract, encoder, rat)),
        *section("How it was trained", trained(encoder, scft, rat, recommender)),
        *section("How it was judged", judged_lines(decision, judged)),
        *section("Limits", limits(judged, encoder)),
        *section("Origin", origin(extract, scft, rat, judged)),
    ]
    return "\n".join(lines) + "\n"


def manifest(lake: Path, ds: str, job: str) -> dict[str, Any]:
    """The newest good manifest of a job; empty where there is none."""
    try:
        return manifests.read(lake, ds, job)
    except InputError:
        return {}


def section(title: str, lines: Sequence[str] | Iterator[str]) -> list[str]:
    """A part of the card."""
    return ["", f"## {title}", "", *lines]


def entry(values: Mapping[str, Any], *path: str) -> Any:
    """A value by its path, `unknown` where it isn't recorded."""
    found: Any = values
    for name in path:
        if not isinstance(found, Mapping) or name not in found:
            return "unknown"
        found = found[name]
    return found


def what_it_is(
    recommender: Mapping[str, Any], encoder: Mapping[str, Any], encoder_id: str, decision: Mapping[str, Any]
) -> Iterator[str]:
    """Kind, parts and use."""
    backbone = f"{entry(recommender, 'backbone', 'name')}, width {entry(recommender, 'width')}"
    yield f"A sequential recommender ({backbone}) over vectors that an LLM makes of items' texts (LLMEmb: SCFT, then RAT)."
    space_id = decision.get("space_id", "unknown")
    yield f"It reads encoder {encoder_id} ({entry(encoder, 'base')}); together they make space {space_id}."
    if "rotation" in recommender:
        turned = {name: entry(recommender, "rotation", name) for name in ("to", "residual", "cosine")}
        yield f"Turned, which changes no ranking, towards the space of recommender {turned['to']}: residual " \
              f"{turned['residual']}, mean cosine {turned['cosine']}."  # fmt: skip
    yield "Meant for the next items of a user in the catalogue it was trained on. Item vectors of other spaces do not fit it."


def made_from(extract: Mapping[str, Any], encoder: Mapping[str, Any], rat: Mapping[str, Any]) -> Iterator[str]:
    """The snapshot and the fields that the LLM may read."""
    yield (
        f"Snapshot of {entry(extract, 'ds')}: {entry(extract, 'result', 'rows', 'items')} items, "
        f"{entry(extract, 'result', 'rows', 'interactions')} events, {entry(extract, 'result', 'rows', 'sequences')} users; "
        f"{entry(rat, 'result', 'rows', 'train_events')} events trained."
    )
    cuts = entry(extract, "result", "cuts")
    if isinstance(cuts, Mapping) and cuts:
        yield f"Validation begins at {entry(cuts, 'valid')}, test at {entry(cuts, 'test')}; nothing after a cut was trained on."
    allow = entry(encoder, "policy", "allow")
    fields = ", ".join(allow) if isinstance(allow, list) and allow else "every attribute of the table"
    yield f"The LLM reads: {fields}. Refused, as they tell popularity of the whole period: {refused(encoder)}."


def refused(encoder: Mapping[str, Any]) -> str:
    """Fields that the policy blocks and does not admit."""
    block, admit = entry(encoder, "policy", "block"), entry(encoder, "policy", "admit")
    if not isinstance(block, list):
        return "unknown"
    left = [name for name in block if name not in (admit if isinstance(admit, list) else [])]
    return ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "") if left else "none"


BESIDE_BASE = {
    "better": "better than its base model",
    "no different": "no differently from its base model, which would do as well",
    "base": "as its base model, which it is",
    "unknown": "beside its base model nobody knows how",
}
"""What the verdict of `scft` means to a person who approves."""


def trained(
    encoder: Mapping[str, Any], scft: Mapping[str, Any], rat: Mapping[str, Any], recommender: Mapping[str, Any]
) -> Iterator[str]:
    """Settings and figures of the trainings."""
    lora, suffix, way = (entry(encoder, name) for name in ("lora", "suffix_tokens", "attention"))
    learned = f"LoRA r {lora['r']}" if isinstance(lora, Mapping) else "none, the base model as it is"
    if isinstance(suffix, int):
        learned = f"{suffix} learned suffix tokens"
    elif way == "both":
        learned = f"{learned if isinstance(lora, Mapping) else 'none'}, attention both ways"
    yield f"SCFT: {learned}, best step " \
          f"{entry(scft, 'result', 'best_step')} of {entry(scft, 'result', 'steps')}."  # fmt: skip
    worth = entry(scft, "result", "worth")
    if isinstance(worth, Mapping) and worth:
        yield f"Without any training on top, the encoder ranks {BESIDE_BASE.get(str(worth.get('verdict')), 'unknown')} " \
              f"({worth.get('why')})."  # fmt: skip
    yield f"RAT: {entry(rat, 'config', 'training', 'loss')} loss, best epoch {entry(rat, 'result', 'best_epoch')}, validation " \
          f"NDCG@10 {figure(entry(rat, 'result', 'validation_ndcg'))}; whitening keeps " \
          f"{figure(entry(recommender, 'explained_variance'))} of the variance."  # fmt: skip


def judged_lines(decision: Mapping[str, Any], judged: Mapping[str, Any]) -> Iterator[str]:
    """The gates, and the comparison as a table."""
    for reason in decision.get("reasons", ()):
        yield f"- {reason['gate']}: {reason['verdict']} ({reason['text']})"
    rows = [row for row in judged.get("differences", ()) if row["value"] is not None]
    if rows:
        yield ""
        yield "| against | slice | difference in NDCG | 95 % | users |"
        yield "|---|---|---|---|---|"
    for row in rows:
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if row["low"] is not None else "too few users to tell"
        yield f"| {row['against']} | {row['slice']} | {row['value']:+.4f} | {interval} | {row['n']} |"


def limits(judged: Mapping[str, Any], encoder: Mapping[str, Any]) -> Iterator[str]:
    """What the evaluation could not show."""
    small = sorted({row["slice"] for row in judged.get("differences", ()) if row["low"] is None})
    if small:
        yield f"- Not judged, too few users: {', '.join(small)}."
    below = [row["against"] for row in judged.get("differences", ()) if row["slice"] == "overall" and (row["high"] or 0) < 0]
    if below:
        yield f"- Worse than {', '.join(below)} overall."
    leak = judged.get("leak") or {}
    if leak:
        yield f"- Raw embeddings foretell log test popularity with R2 {figure(leak.get('r2'))}" \
              f"{': a field leaks' if judged.get('leaking') else ''}."  # fmt: skip
    yield f"- The LLM ({entry(encoder, 'base')}) brings its own biases and languages; its licence holds for what is made with it."
    yield "- Judged on past logs, which were made under another recommender: an online test is still needed."


def origin(*manifests: Mapping[str, Any]) -> Iterator[str]:
    """Digests of what it stands on."""
    *runs, judged = manifests
    for run in runs:
        for name, digest in run.get("result", {}).get("outputs", {}).items():
            yield f"- {run['job']} of {run['ds']}, code {run.get('code_revision', 'unknown')}: {name} `{digest}`"
    for name, digest in judged.get("outputs", {}).items():
        yield f"- evaluate: {name} `{digest}`"


def figure(value: object) -> str:
    """A figure with four digits; other things as they are."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
