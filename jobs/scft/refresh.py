"""Whether an encoder is due: none yet, another recipe, too old, or too many new texts."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.lake import artifacts, manifests, partitions
from jobs.lake.nights import trained_on
from jobs.lake.tables import ITEMS
from jobs.run import InputError, Run, as_json
from jobs.scft.config import Config
from models.text.base_model import EMBEDDED, base_folder, base_sha256

PROMPTS = ("policy.", "pooling", "layers", "attention", "max_tokens")
"""Settings that shape the embeddings of a base model as it is."""
APART = ("base", "gates.", "validation", "accept", "worth_items", "refresh_share", "max_age_days", "training.tokens",
         "training.compile")  # fmt: skip
"""Settings that shape no weights, and the base's place."""
TAUGHT, READ = ("cluster_weight", "teacher_weight", "user_weight"), ("user_weight", "title_weight")
BESIDE = {
    "teacher": TAUGHT, "clusters": ("cluster_weight", "user_weight"), "cold_share": ("pair_share", *TAUGHT, *READ),
    "training.pair_support": ("pair_share",), "training.popularity": ("pair_share",),
    "training.user_share": READ, "training.user_titles": READ,
}  # fmt: skip
"""Settings that shape weights only where one of these is weighed."""


def due(config: Config, snapshot: str) -> tuple[str, dict[str, Any] | None]:
    """Why an encoder is to be trained, and None; or why not, and the result of the run that trained the one in use.

    In use is the newest encoder that the recipe's settings shaped, though others were trained since: as an experiment, or before
    the recipe went back to what it was.
    """
    lake, ds = config.run.lake, config.run.ds
    known = trainings(lake, ds)
    if (newest := next(known, None)) is None:
        return "there is no encoder, or the items that it was trained on are gone", None
    wanted, base = recipe_digest(config), base_identity(config.base)
    # of older ones no more is read than it takes: a lake has one for every night
    previous = next((one.result for one in itertools.chain([newest], known) if one.shape == wanted and base in one.bases), None)
    if previous is None:
        return "the recipe has changed", None
    age = (dt.date.fromisoformat(ds) - dt.date.fromisoformat(previous["trained_ds"])).days
    changed = changed_share(lake, previous["snapshot"], snapshot)
    same = previous.get("worth", {}).get("verdict") == "no different"
    if age >= config.max_age_days and not (same and config.max_age_days):
        return f"the encoder is {age} days old (max_age_days is {config.max_age_days})", None
    if changed > config.refresh_share:
        return f"{changed:.1%} of the items are new or changed (refresh_share is {config.refresh_share:.1%})", None
    if drifted := drift_since(lake, ds, previous["trained_ds"]):
        return drifted, None
    kept = ", and no better than its base: age alone trains none again" if same and age >= config.max_age_days else ""
    return f"the encoder is {age} days old and {changed:.1%} of the items are new or changed since{kept}", previous


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run that came to an encoder which is still there, with the snapshot that it was trained on."""

    shape: str
    """Digest of the settings that shaped its weights."""
    bases: frozenset[str]
    """Identities of its base model."""
    result: dict[str, Any]


def trainings(lake: Path, ds: str) -> Iterator[Training]:
    """Those up to `ds`, newest first. The settings that a manifest tells of count, not the digest written then."""
    for path in manifests.history(lake, "scft", ds):
        made = manifests.parsed(path)
        result, settings = made.get("result"), made.get("config")
        if made.get("status") != "done" or not isinstance(result, dict) or not isinstance(settings, dict):
            continue
        try:
            artifacts.find(lake, "encoder", result["encoder_id"])
            partitions.read_commit(lake, ITEMS.name, result["snapshot"])
        except (InputError, KeyError):
            continue
        bases = frozenset((str(result.get("inputs", {}).get("base", "")), str(settings.get("base", Config.base))))
        yield Training(shape=shape_digest(settings), bases=bases, result=result)


def drift_since(lake: Path, ds: str, trained_ds: str) -> str:
    """Why the newest report since the training asks for a new encoder: texts or neighbours drifted; empty where it doesn't.

    A training that the gates refused since answers it too.
    """
    try:
        newest = manifests.read(lake, ds, "report")
    except InputError:
        return ""
    reason = str(newest["result"].get("refresh_encoder", ""))
    # the history of trainings is read where there is a reason alone
    return reason if reason and newest["ds"] > max(trained_ds, trained_on(lake, ds)) else ""


def changed_share(lake: Path, before: str, now: str) -> float:
    """Share of the texts of a snapshot that another did not have. Raises InputError where one is gone."""
    old, new = (
        partitions.scan(lake, ITEMS, partition, columns=("content_hash",)) for partition in (before, now)
    )  # fmt: skip
    known = {text for batch in old for text in batch["content_hash"].to_pylist()}
    texts = {text for batch in new for text in batch["content_hash"].to_pylist()}
    return len(texts - known) / max(len(texts), 1)


def recipe_digest(config: Config) -> str:
    """Digest of a recipe's settings that shape an encoder's weights; the base model's bytes are compared beside it."""
    return shape_digest(as_json(config))


def base_identity(base: str) -> str:
    """The hash of a base model's weights, so that a folder that moved is the same model and one that was changed is another.

    A name of the hub is its own identity: to ask whether an encoder is due should load nothing.
    """
    return base_sha256(base_folder(base)) if base == EMBEDDED or Path(base).is_dir() else base


def shape_digest(settings: Mapping[str, Any]) -> str:
    """Digest of those settings (a Config as JSON) that shape an encoder.

    Left out are where the base lies, on what it runs and how fast, when it is due and what it is judged by; and values that are
    the defaults, so that a setting which a later version adds changes no digest. Where nothing is trained, only prompts count.
    """
    usual = dict(flat(as_json(Config(run=Run(ds="1970-01-01", lake=Path())))))
    given = {**usual, **dict(flat(settings))}
    apart = (*APART, *(name for name, weights in BESIDE.items() if not any(given[f"training.{weight}"] for weight in weights)))
    if given["suffix_tokens"]:
        apart = (*apart, "lora.")
    shaping = {
        name: value
        for name, value in given.items()
        if (name.startswith(PROMPTS) or given["training.steps"])
        and not name.startswith(apart)
        and (name not in usual or value != usual[name])
    }
    if not given["training.steps"]:
        shaping["training.steps"] = 0
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as (dotted name, value); of the run only its seed."""
    for name, value in settings.items():
        if name == "run":
            yield "seed", value.get("seed", Run.seed)
        elif isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
