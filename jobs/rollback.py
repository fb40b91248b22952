"""The pointer -> the space that served before: one write, no vector is touched. The champion follows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from feature_repo import offline, spaces
from feature_repo.reader import Pointer, Reader, Space, settings
from feature_repo.stores import Store, lease, open_writer
from jobs.engines import online, registry
from jobs.lake.items import tombstones
from jobs.lake.locks import alone
from jobs.run import InputError, Refused, Run, Unavailable

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What should serve again."""

    run: Run
    space: str = ""
    """The space to go back to; empty takes the one before, so that a second rollback undoes the first. Give its id where a
    run may be repeated: serving already, it stays."""
    lease_wait_s: float = 60.0
    """How long to wait for another writer of the store."""
    sample: int = 1_000
    """Items, spread over the space to go back to, that must still be there. Where the lake no longer has that snapshot, their
    number must be right."""
    demote: bool = True
    """Swaps the aliases champion and previous too, where they name what served and what serves again: else the next night would
    publish the same champion once more."""

    def __post_init__(self) -> None:
        """Raises InputError for a sample of nothing."""
        if self.sample < 1:
            raise InputError(f"rollback.sample is {self.sample}: at least 1 item of the space to go back to is looked at")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What serves now, and what served."""

    space_id: str
    recommender_id: str
    serves_ds: str
    """Date of the snapshot that serves now."""
    from_space_id: str
    sequence: int
    flip_ms: float
    """Time of the write and of reading it back."""
    champion: str
    """The recommender that nights follow from now on; empty without a registry, or where it could not be asked."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Lets the space before serve again.

    Raises InputError where nothing serves; Refused where there is no space before, or it lacks items; Unavailable where another
    writer is at work.
    """
    lake = config.run.lake
    reader, store = Reader.open(lake), open_writer(settings(lake))
    before = online.served(reader)
    with online.refusals(), lease(store, "rollback", config.lease_wait_s):
        if online.served(reader) != before:
            raise Unavailable("the pointer moved while rollback waited for its lease: look at what serves now, then run again")
        started = time.monotonic()
        after = before if config.space == before.space_id else back(config, store, reader, before)
        flip_ms = round((time.monotonic() - started) * 1000, 2)
    with online.offline_home(lake) as home:
        if home.is_dir():
            offline.write_pointer(home, after)
    champion = follow(config, before, after)
    log.info("space %s of %s serves again, %s no longer (%s ms)", after.space_id, after.ds, before.space_id, flip_ms)
    return Result(
        space_id=after.space_id,
        recommender_id=after.recommender_id,
        serves_ds=after.ds,
        from_space_id=before.space_id,
        sequence=after.sequence,
        flip_ms=flip_ms,
        champion=champion,
        inputs={"pointer": online.pointer_text(before)},
        outputs={"pointer": online.pointer_text(after)},
        rows={"serving_pointer": 1},
    )


def back(config: Config, store: Store, reader: Reader, before: Pointer) -> Pointer:
    """The pointer after its one write. Raises NotPublished, Refused for a space that is not the one before."""
    last = before.previous
    if last and config.space not in ("", last.space_id):
        raise Refused(f"rollback.space {config.space} is not the one before, {last.space_id}: publish it instead")
    sample = online.sample_ids(config.run.lake, last, config.sample) if last else []
    if last and not sample:
        refuse_fewer(store, last, len(tombstones(config.run.lake, last.ds)))
    return spaces.rollback(store, reader, sample)


def refuse_fewer(store: Store, space: Space, forgotten: int) -> None:
    """Raises Refused where the store holds fewer items of a space than were published, and than were forgotten since: the lake no
    longer names them."""
    held = store.spaces().get(space.space_id, 0)
    if held + forgotten < space.items:
        raise Refused(
            f"space {space.space_id} is no longer whole in the store: it holds {held:,} of {space.items:,} items, and the lake "
            f"no longer has the snapshot of {space.ds} to say which; publish it again"
        )


def follow(config: Config, before: Pointer, after: Pointer) -> str:
    """Moves the aliases after the pointer; returns the champion. What serves is right by then, so MLflow's failure only warns."""
    run = config.run
    try:
        with alone(run.lake, "promotion", config.lease_wait_s):
            champion, previous = registry.champion(run), registry.by_alias(run, "previous")
            if champion is None:
                return ""
            served, serves = (registry_name(run, pointer) for pointer in (before, after))
            if config.demote and previous and (champion["recommender_id"], previous["recommender_id"]) == (served, serves):
                registry.set_aliases(run, [("champion", previous["version"]), ("previous", champion["version"])])
                champion = previous
    except (InputError, Unavailable) as error:
        log.warning("the champion stays as it is, and the next night would publish it again: %s", error)
        return ""
    if champion["recommender_id"] != serves:
        told = champion["recommender_id"]
        log.warning("the champion is %s, not what serves: the next night publishes it. Pause that DAG, or promote", told)
    return champion["recommender_id"]


def registry_name(run: Run, pointer: Pointer) -> str:
    """The recommender that made a space."""
    return pointer.recommender_id or online.recommender_of(run.lake, pointer.space_id)["recommender_id"]
