"""Artifacts and the gate: the recommender, the encoder, and the promotion that let the recommender out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.explain.records import first_changed, origin, written_by
from jobs.explain.result import Link, Verdict
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.partitions import digest_folder
from jobs.run import InputError

if TYPE_CHECKING:
    from feature_repo.reader import Pointer


def recommender_link(lake: Path, identity: str, pointer: Pointer) -> Link:
    """The recommender of the space."""
    text = ""
    if known := artifacts.description(lake, "recommender", identity):
        backbone = known.get("backbone", {})
        made = f"{backbone.get('name', 'SRS')} of width {backbone.get('width', pointer.width)}"
        if parts := known.get("parts"):
            made = "parts " + ", ".join(f"{part['name']} ({part['backbone']['width']} wide)" for part in parts)
        text = f"{made}; the encoder and it make the space"
        if turned := known.get("rotation"):
            text += f"; turned towards that of {turned['to']}, residual {turned['residual']}"
        if judged := known.get("gated_id"):
            text += f"; trained on all events after {judged}, the same on a split, was judged"
    return artifact_link(lake, "recommender", identity, ("rat", "rat-refit"), text, 2)


def encoder_link(lake: Path, identity: str) -> Link:
    """The encoder of the space."""
    known, text = encoder_card(lake, identity), ""
    if known:
        lora = f"LoRA r {known['lora']['r']}" if known.get("lora") else "no LoRA (zero-shot)"
        if known.get("suffix_tokens"):
            lora = f"{known['suffix_tokens']} learned suffix tokens"
        text = f"{known['base']} ({known['base_sha256'][:12]}), {lora}, pooling {known['pooling']}, width {known['width']}"
    return artifact_link(lake, "encoder", identity, ("scft",), text, 3)


def encoder_card(lake: Path, identity: str) -> dict[str, Any]:
    """What an encoder says of itself; empty where it is gone."""
    return artifacts.description(lake, "encoder", identity)


def artifact_link(lake: Path, kind: str, identity: str, jobs: Sequence[str], text: str, depth: int) -> Link:
    """An artifact, whose id is the digest of its bytes."""
    path = artifacts.brought(lake, kind, identity)
    if not identity or not path.is_dir():
        gone = "not in the lake: it can be fetched from the model registry"
        return Link(step=kind, identity=identity or "unknown", digest="", verdict="unknown", text=gone, depth=depth)
    digest = digest_folder(path)
    manifest = origin(lake, jobs, identity)
    by = f"{written_by(manifest)}, {text}" if manifest else text
    same = digest.startswith(identity)
    text = by if same else f"its bytes are {digest[:16]}: remove it and fetch it from the registry, or train again"
    verdict: Verdict = "verified" if same else "broken"
    return Link(step=kind, identity=identity, digest=digest, verdict=verdict, text=text, depth=depth)


def gate_link(lake: Path, recommender_id: str) -> Link:
    """The promotion of a recommender: the decision, and whether the metrics it rests on are still those bytes."""
    unknown = Link(
        step="gate", identity=recommender_id or "unknown", digest="", verdict="unknown", depth=3,
        text="no promotion is recorded: published by hand, or not under this lake",
    )  # fmt: skip
    manifest = promotion_of(lake, judged_id(lake, recommender_id))
    if manifest is None:
        return unknown
    text, partition = decision(manifest), f"ds={manifest['ds']}"
    wanted = manifest["result"]["inputs"].get("metrics", "")
    try:
        same = partitions.read_commit(lake, "metrics", partition).digest == wanted
        changed = first_changed(lake, "metrics", partition)
    except (InputError, OSError):
        return replace(unknown, text=f"{text}; the metrics it rests on are gone")
    if not same:
        return replace(unknown, text=f"{text}; the metrics were written again since")
    if changed:
        text += "; the metrics it rests on are not the bytes that were committed: run evaluate again"
    return replace(
        unknown, identity=f"metrics/{partition}", digest=wanted, verdict="broken" if changed else "verified", text=text
    )


def judged_id(lake: Path, recommender_id: str) -> str:
    """The recommender that gates judged: of one trained on all events after that, the one it came from."""
    return str(artifacts.description(lake, "recommender", recommender_id).get("gated_id") or recommender_id)


def promotion_of(lake: Path, recommender_id: str) -> dict[str, Any] | None:
    """The newest manifest of `promote` about a recommender."""
    for path in manifests.history(lake, "promote"):
        manifest = manifests.parsed(path)
        if manifest.get("result", {}).get("recommender_id") == recommender_id:
            return manifest
    return None


def decision(manifest: dict[str, Any]) -> str:
    """What a promotion decided, in words."""
    result = manifest["result"]
    reasons = result.get("reasons", [])
    passed = sum(reason["verdict"] == "passed" for reason in reasons)
    by = f", approved by {result['approved_by']}" if result.get("approved_by") else ""
    return f"{result['decision']} on {manifest['ds']}{by}: {passed} of {len(reasons)} gates passed, version {result['version']}"
