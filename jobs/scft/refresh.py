"""Whether an encoder is due: none yet, another recipe, too old, or too many new texts."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from pathlib import Path
from typing import Any

from jobs.lake import artifacts, manifests, partitions
from jobs.lake.tables import ITEMS
from jobs.run import InputError, as_json
from jobs.scft.config import Config


def due(config: Config, snapshot: str) -> tuple[str, dict[str, Any] | None]:
    """Why an encoder is to be trained, and None; or why not, and the result of the run that trained the one in use."""
    lake, ds = config.run.lake, config.run.ds
    try:
        previous: dict[str, Any] = manifests.read(lake, ds, "scft")["result"]
        artifacts.find(lake, "encoder", previous["encoder_id"])
        changed = changed_share(lake, previous["snapshot"], snapshot)
    except InputError:
        return "there is no encoder, or the items that it was trained on are gone", None
    age = (dt.date.fromisoformat(ds) - dt.date.fromisoformat(previous["trained_ds"])).days
    if previous["recipe_digest"] != recipe_digest(config):
        return "the recipe has changed", None
    if age >= config.max_age_days:
        return f"the encoder is {age} days old (max_age_days is {config.max_age_days})", None
    if changed > config.refresh_share:
        return f"{changed:.1%} of the items are new or changed (refresh_share is {config.refresh_share:.1%})", None
    if drifted := drift_since(lake, ds, previous["trained_ds"]):
        return drifted, None
    return f"the encoder is {age} days old and {changed:.1%} of the items are new or changed since", previous


def drift_since(lake: Path, ds: str, trained_ds: str) -> str:
    """Why the newest report since the training asks for a new encoder: texts or neighbours drifted; empty where it doesn't."""
    try:
        newest = manifests.read(lake, ds, "report")
    except InputError:
        return ""
    return str(newest["result"].get("refresh_encoder", "")) if newest["ds"] > trained_ds else ""


def changed_share(lake: Path, before: str, now: str) -> float:
    """Share of the texts of a snapshot that another did not have. Raises InputError where one is gone."""
    old, new = (
        partitions.scan(lake, ITEMS, partition, columns=("content_hash",)) for partition in (before, now)
    )  # fmt: skip
    known = {text for batch in old for text in batch["content_hash"].to_pylist()}
    texts = {text for batch in new for text in batch["content_hash"].to_pylist()}
    return len(texts - known) / max(len(texts), 1)


def recipe_digest(config: Config) -> str:
    """Digest of the settings that shape an encoder; when it is due and on what it runs is not among them."""
    apart = ("run", "refresh_share", "max_age_days", "validation")
    shaping = {name: value for name, value in as_json(config).items() if name not in apart}
    return hashlib.sha256(json.dumps([shaping, config.run.seed], sort_keys=True).encode()).hexdigest()[:16]
