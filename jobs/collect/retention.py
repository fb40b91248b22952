"""Old snapshots, embeddings, what arrived for them, checkpoints and Feast's offline rows: what may go, and what never may.

Never: the newest partition of a table; what a space that is online, or the champion, the previous and the reference of the
registry are made of; the snapshots of the newest training, evaluation and encoder; the first and the newest date of a space that
stays, for reports and `explain`. A date is old by its name and by when it was written: what a backfill has just filled stays.
"""

from __future__ import annotations

import datetime as dt
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from feature_repo.reader import Space, offline_folder
from jobs.engines import registry
from jobs.engines.online import recommender_of
from jobs.lake import arrivals, manifests, partitions
from jobs.lake.locks import alone
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, space_of
from jobs.run import InputError, Run, Unavailable

SNAPSHOTS = (ITEMS.name, INTERACTIONS.name, SEQUENCES.name, QUARANTINE.name)
OFFLINE = ("item_embedding", "item_codes", "item_attributes", "user_history")
DATED = re.compile(r"(?:(?P<space>[^/]+)-)?(?P<ds>\d{4}-\d{2}-\d{2})")
ALIASES = ("champion", "previous", "reference")
DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Needed:
    """What must stay."""

    spaces: frozenset[str]
    encoders: frozenset[str]
    dates: frozenset[str]
    """Dates whose snapshot, or the newest before, somebody works on."""
    encoders_known: bool
    """Whether there is a registry, and the lake tells the encoder of every space that stays; else all encoders stay."""


def needed(run: Run, kept: Mapping[str, Space], online: Collection[str]) -> Needed:
    """What live and waiting spaces, aliases and the newest runs need. Raises Unavailable where the registry is away."""
    found_spaces, encoders, dates = {*kept, *online}, set[str](), {space.ds for space in kept.values()}
    for alias in ALIASES:
        if made := registry.by_alias(run, alias):
            found_spaces.add(space_of(made["encoder_id"], made["recommender_id"]))
            encoders.add(made["encoder_id"])
            dates.add(made["ds"])
    for job in ("scft", "pretrain", "rat", "evaluate", "project"):
        for ds, result in newest(run, job):
            dates |= {ds, str(result.get("snapshot", "")).removeprefix("ds=")}
            encoders.add(str(result.get("encoder_id", "")))
            found_spaces.add(str(result.get("space_id", "")))
    made_by = {space: recommender_of(run.lake, space)["encoder_id"] for space in {*kept, *online}}
    encoders |= set(made_by.values())
    return Needed(
        spaces=frozenset(found_spaces - {""}), encoders=frozenset(encoders - {""}), dates=frozenset(dates - {""}),
        encoders_known=bool(run.tracking_uri) and all(made_by.values()),
    )  # fmt: skip


def newest(run: Run, job: str) -> Iterator[tuple[str, dict[str, object]]]:
    """(ds, Result) of the newest run of a job, if there is one."""
    try:
        manifest = manifests.read(run.lake, "9999-12-31", job)
    except InputError:
        return
    yield str(manifest["ds"]), manifest["result"]


def old_snapshots(run: Run, needs: Needed, days: int) -> Iterator[Path]:
    """Folders of snapshots that nobody needs."""
    for name in SNAPSHOTS:
        dates = sorted(partition.removeprefix("ds=") for partition in partitions.committed(run.lake, name))
        stay = {max((date for date in dates if date <= wanted), default="") for wanted in needs.dates} | set(dates[-1:])
        for home in sorted((run.lake / name).glob("ds=*")):
            ds = home.name.removeprefix("ds=")
            if ds not in stay and is_old(run, home, ds, days):
                yield home


def old_vectors(run: Run, needs: Needed, days: int) -> Iterator[Path]:
    """Folders of `item_embeddings` that nobody needs."""
    for space in sorted((run.lake / "item_embeddings").glob("space=*")):
        homes = sorted(space.glob("ds=*"))
        dates = [home.name.removeprefix("ds=") for home in homes]
        stay = set[str]()
        if space.name.removeprefix("space=") in needs.spaces:
            stay = {*dates[:1], *dates[-1:], *needs.dates}
        yield from (home for home, ds in zip(homes, dates, strict=True) if ds not in stay and is_old(run, home, ds, days))


def old_embeddings(run: Run, needs: Needed, days: int) -> Iterator[Path]:
    """Folders of `llm_embeddings` of encoders that nobody needs; none where not all needs are known."""
    for home in sorted((run.lake / "llm_embeddings").glob("encoder=*")) if needs.encoders_known else ():
        written = max((path.stat().st_mtime for path in [home, *home.rglob("*")]), default=0)
        if home.name.removeprefix("encoder=") not in needs.encoders and time.time() - written >= days * DAY:
            yield home


def old_arrivals(run: Run, needs: Needed, days: int) -> Iterator[Path]:
    """Folders of what arrived for a snapshot that nobody needs: items, their embeddings, their vectors."""
    for name in arrivals.TABLES:
        for home in sorted((run.lake / name).glob("**/ds=*")):
            ds, space = home.name.removeprefix("ds="), home.parent.name.removeprefix("space=")
            stays = ds in needs.dates and (name != arrivals.VECTORS or space in needs.spaces)
            if not stays and is_old(run, home, ds, days):
                yield home


def old_checkpoints(run: Run, needs: Needed, days: int) -> Iterator[Path]:
    """Checkpoints of trainings that were killed and not resumed for so long.

    A checkpoint is found again by its date, settings and inputs alone: where these have changed nobody resumes it, and its own
    training, which removes it at its end, never runs again.
    """
    for path in sorted((run.lake / "checkpoints").glob("*")):
        if path.is_file() and time.time() - path.stat().st_mtime >= days * DAY:
            yield path


def old_rows(run: Run, needs: Needed, days: int) -> Iterator[Path]:
    """Files of Feast's offline tables that nobody needs; what served when, and tombstones, stay for good."""
    home = Path(offline_folder(run.lake))
    for name in OFFLINE:
        files = [(found, path) for path in sorted((home / name).glob("*.parquet")) if (found := DATED.fullmatch(path.stem))]
        newest_of = {found["space"]: found["ds"] for found, _ in files}
        for found, path in files:
            live = found["space"] is None or found["space"] in needs.spaces
            stays = live and found["ds"] in {newest_of[found["space"]], *needs.dates}
            if not stays and is_old(run, path, found["ds"], days):
                yield path


def is_old(run: Run, path: Path, ds: str, days: int) -> bool:
    """Whether a date lies so many days before ds, and was written as long ago."""
    last = dt.date.fromisoformat(run.ds) - dt.timedelta(days=days)
    commits = [commit.stat().st_mtime for commit in path.rglob(partitions.COMMIT)]
    written = max(commits, default=path.stat().st_mtime)
    return ds < f"{last}" and time.time() - written >= days * DAY


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(one.stat().st_size for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file())


def remove(lake: Path, path: Path) -> bool:
    """Removes a file, or a folder: first the commits that name its files, so that no reader sees half of it.

    A snapshot that an `extract` of its date is at stays; returns whether it went.
    """
    if path.is_file():
        path.unlink()
        return True
    try:
        with alone(lake, f"extract {path.name.removeprefix('ds=')}", 0):
            for commit in sorted(path.rglob(partitions.COMMIT)):
                commit.unlink()
                partitions.sync(commit.parent)
            shutil.rmtree(path)
    except Unavailable:
        return False
    return True
