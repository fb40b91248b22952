"""Old snapshots, embeddings, codes, what arrived for them, checkpoints and Feast's offline rows: what may go, and what never may.

Never: the newest partition of a table; what a space that is online, or an alias of the registry (champion, previous, challenger,
reference) is made of; the snapshots of the newest training, evaluation and encoder; the first and the newest date of a space that
stays, for reports and `explain`. A date is old by its name and by when it was written: what a backfill has just filled stays.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from feature_repo.reader import Space, offline_folder
from jobs.engines import registry
from jobs.engines.online import recommender_of
from jobs.lake import arrivals, manifests
from jobs.lake.listing import Home, Place
from jobs.lake.locks import alone
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, space_of
from jobs.run import InputError, Run, Unavailable

SNAPSHOTS = (ITEMS.name, INTERACTIONS.name, SEQUENCES.name, QUARANTINE.name)
OFFLINE = ("item_embedding", "item_codes", "item_attributes", "user_history")
DATED = re.compile(r"(?:(?P<space>[^/]+)-)?(?P<ds>\d{4}-\d{2}-\d{2})")
DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Old:
    """What may go."""

    place: Place
    name: str
    """The file or folder, as the place calls it."""
    home: Home
    called: str
    """The same for people: below the lake, or `feast_offline/TABLE/FILE`."""


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
    for alias in registry.ALIASES:
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


def old_snapshots(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """Snapshots that nobody needs."""
    for table in SNAPSHOTS:
        homes = lake_homes(run, table, "ds=")
        dates = sorted(date_of(name) for name, home in homes.items() if home.is_committed)
        stay = {max((date for date in dates if date <= wanted), default="") for wanted in needs.dates} | set(dates[-1:])
        for name, home in homes.items():
            if date_of(name) not in stay and is_old(run, home, date_of(name), days):
                yield old(run, name, home)


def old_vectors(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """Vectors of spaces and dates that nobody needs."""
    homes, dates = lake_homes(run, "item_embeddings", "ds="), dict[str, list[str]]()
    for name in [name for name, home in homes.items() if home.is_committed]:
        dates.setdefault(space_in(name), []).append(date_of(name))
    stay = {space: {min(every), max(every), *needs.dates} for space, every in dates.items() if space in needs.spaces}
    for name, home in homes.items():
        if date_of(name) not in stay.get(space_in(name), ()) and is_old(run, home, date_of(name), days):
            yield old(run, name, home)


def old_codes(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """Codes of items of dates that nobody needs. The newest ones of each books stay: new items are coded beside them."""
    homes, newest_of = lake_homes(run, "item_codes", "ds="), dict[str, str]()
    for name in [name for name, home in homes.items() if home.is_committed]:
        books = name.partition("/ds=")[0]
        newest_of[books] = max(date_of(name), newest_of.get(books, ""))
    for name, home in homes.items():
        stays = date_of(name) in {newest_of.get(name.partition("/ds=")[0]), *needs.dates}
        if not stays and is_old(run, home, date_of(name), days):
            yield old(run, name, home)


def old_embeddings(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """`llm_embeddings` of encoders that nobody needs; none where not all needs are known."""
    for name, home in lake_homes(run, "llm_embeddings", "encoder=").items() if needs.encoders_known else ():
        if name.partition("encoder=")[2] not in needs.encoders and home.untouched_s >= days * DAY:
            yield old(run, name, home)


def old_arrivals(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """What arrived for a snapshot that nobody needs: items, their embeddings, their vectors."""
    for table in arrivals.TABLES:
        for name, home in lake_homes(run, table, "ds=").items():
            stays = date_of(name) in needs.dates and (table != arrivals.VECTORS or space_in(name) in needs.spaces)
            if not stays and is_old(run, home, date_of(name), days):
                yield old(run, name, home)


def old_checkpoints(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """Checkpoints of trainings that were killed and not resumed for so long; they lie on this machine, wherever the lake is.

    A checkpoint is found again by its date, settings and inputs alone: where these have changed nobody resumes it, and its own
    training, which removes it at its end, never runs again.
    """
    place = Place(run.lake)
    for key, file in place.files("checkpoints").items():
        if key.count("/") == 1 and file.age_s >= days * DAY:
            yield Old(place=place, name=key, home=Home({key: file}), called=key)


def old_rows(run: Run, needs: Needed, days: int) -> Iterator[Old]:
    """Files of Feast's offline tables that nobody needs; what served when, and tombstones, stay for good."""
    place = Place.at(offline_folder(run.lake))
    for table in OFFLINE:
        files = {key: file for key, file in place.files(table).items() if key.endswith(".parquet")}
        dated = [(found, key) for key in files if (found := DATED.fullmatch(Path(key).stem))]
        newest_of = {found["space"]: found["ds"] for found, _ in dated}
        for found, key in dated:
            live = found["space"] is None or found["space"] in needs.spaces
            stays = live and found["ds"] in {newest_of[found["space"]], *needs.dates}
            if not stays and is_old(run, home := Home({key: files[key]}), found["ds"], days):
                yield Old(place=place, name=key, home=home, called=f"feast_offline/{key}")


def lake_homes(run: Run, table: str, last: str) -> dict[str, Home]:
    """What lies in a table's folder of the lake, by its folders `last…`."""
    return Place.of(run.lake).homes(table, last)


def old(run: Run, name: str, home: Home) -> Old:
    """A folder of the lake that may go."""
    return Old(place=Place.of(run.lake), name=name, home=home, called=name)


def date_of(name: str) -> str:
    """DATE of `…/ds=DATE`."""
    return name.rpartition("ds=")[2]


def space_in(name: str) -> str:
    """ID of `…/space=ID/…`."""
    return name.partition("space=")[2].partition("/")[0]


def is_old(run: Run, home: Home, ds: str, days: int) -> bool:
    """Whether a date lies so many days before ds, and was written as long ago."""
    return ds < f"{dt.date.fromisoformat(run.ds) - dt.timedelta(days=days)}" and home.age_s >= days * DAY


def remove(lake: Path, one: Old) -> bool:
    """Removes it; returns whether it went. A snapshot that an `extract` of its date is at stays, and so does what was written
    since it was listed: by then a backfill may have filled that date."""
    dated = "ds=" in one.name
    try:
        with alone(lake, f"extract {date_of(one.name)}", 0) if dated else contextlib.nullcontext():
            if not one.place.home(one.name).is_still(one.home):
                return False
            one.place.remove(one.name, list(one.home.files))
    except Unavailable:
        return False
    return True
