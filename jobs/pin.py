"""The registry, or the online store -> ids of the models, and the date, that all jobs of a night use.

The night asks once, at its start. If `embed`, `project` and `publish` each asked for the champion and another model were promoted
in between, they would mix two models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from jobs.engines import registry
from jobs.lake import partitions
from jobs.lake.tables import ITEMS, space_of
from jobs.run import InputError, Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which models and date the night uses."""

    run: Run
    which: Literal["champion", "serving"] = "champion"
    """`champion`: the models of the registry's champion, whose space the night brings online; `serving`: the models of the space
    that is online now."""
    newest: bool = False
    """Uses the newest snapshot of the lake if that is newer than ds. This is for a model that a person approved days after its
    training; a night that logs started works on their date. `serving` always uses the snapshot that is online."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the night gives to its other jobs."""

    ds: str
    recommender_id: str
    encoder_id: str
    space_id: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Finds the models and the date. Raises InputError where there is no champion yet, or nothing serves."""
    if config.which == "serving":
        result = serving(config.run)
    else:
        found = registry.resolve(config.run, "champion")
        ids = {name: found[name] for name in ("recommender_id", "encoder_id")}
        result = pinned(newest(config.run) if config.newest else config.run.ds, ids)
    log.info(
        "the night uses recommender %s and encoder %s, on the items of %s", result.recommender_id, result.encoder_id, result.ds
    )
    return result


def serving(run: Run) -> Result:
    """The models of what is online, and its date."""
    from feature_repo.reader import Reader
    from jobs.engines import online

    pointer = online.served(Reader.open(run.lake))
    ids = online.recommender_of(run.lake, pointer.space_id)
    if not ids["encoder_id"]:
        raise InputError(
            f"space {pointer.space_id} serves, but this lake has no recommender of that space: set run.lake to the lake that it "
            "was published from, or publish a space of this lake"
        )
    return pinned(pointer.ds, ids)


def newest(run: Run) -> str:
    """The date of the newest snapshot, or the run's own where that is newer."""
    found = partitions.newest(run.lake, ITEMS.name, "9999-12-31")
    return max(run.ds, found.removeprefix("ds=") if found else "")


def pinned(ds: str, ids: dict[str, str]) -> Result:
    """The Result for a recommender and its encoder."""
    space_id = space_of(ids["encoder_id"], ids["recommender_id"])
    return Result(
        ds=ds,
        recommender_id=ids["recommender_id"],
        encoder_id=ids["encoder_id"],
        space_id=space_id,
        inputs={"recommender": ids["recommender_id"], "encoder": ids["encoder_id"]},
        outputs={},
        rows={},
    )
