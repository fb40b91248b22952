"""The registry, or the online store -> which models and date a night goes by, asked once: its other jobs are told.

Where `embed`, `project` and `publish` each asked for the champion, a promotion in between would mix two of them.
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
    """What the night goes by."""

    run: Run
    which: Literal["champion", "serving"] = "champion"
    """`champion`: of the registry, whose space the night brings online; `serving`: of the space that is online."""
    newest: bool = False
    """Works on the newest snapshot of the lake, where that is newer than ds: for a promotion that a person approved days
    after its training. `serving` always works on the snapshot that is online."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the other jobs of the night are called with."""

    ds: str
    recommender_id: str
    encoder_id: str
    space_id: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Asks once. Raises InputError where there is no champion yet, or nothing serves."""
    if config.which == "serving":
        result = serving(config.run)
    else:
        found = registry.resolve(config.run, "champion")
        ids = {name: found[name] for name in ("recommender_id", "encoder_id")}
        result = pinned(newest(config.run) if config.newest else config.run.ds, ids)
    log.info("recommender %s, encoder %s, %s", result.recommender_id, result.encoder_id, result.ds)
    return result


def serving(run: Run) -> Result:
    """The models of what is online, and its date."""
    from feature_repo.reader import Reader
    from jobs.engines import online

    pointer = online.served(Reader.open(run.lake))
    ids = online.recommender_of(run.lake, pointer.space_id)
    if not ids["encoder_id"]:
        raise InputError(
            f"no recommender of the lake makes the space that serves, {pointer.space_id}: publish a space of this lake"
        )
    return pinned(pointer.ds, ids)


def newest(run: Run) -> str:
    """The date of the newest snapshot, or the run's own where that is newer."""
    dates = [name.removeprefix("ds=") for name in partitions.committed(run.lake, ITEMS.name)]
    return max([run.ds, *dates])


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
