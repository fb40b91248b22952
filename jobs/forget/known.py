"""Whether an id is one at all: a slip of the keyboard must not be "forgotten", with proof, while the item stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.compute as pc

from feature_repo import spaces
from feature_repo.reader import settings
from feature_repo.stores import open_writer
from jobs.engines import online
from jobs.forget.names import Ids, batches, named
from jobs.forget.tables import TABLES
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.run import InputError


def refuse_unknown(lake: Path, home: Path, ids: Ids) -> None:
    """Raises InputError for an id that was never forgotten, stands in no table of the lake, whose files are in `home`, and in no
    space online."""
    unknown = set(ids) - tombstones(lake)
    for path in files(home):
        if not unknown:
            return
        unknown -= ids_in_file(path, frozenset(unknown))
    if unknown and (unknown := {item for item in unknown if not is_online(lake, item)}):
        raise InputError(
            f"forget: {sorted(unknown)[0]!r} is no item that the lake or the online store knows ({len(unknown)} of {len(ids)} "
            "ids are unknown): is it written right, without outer quotes? To keep an id away before it comes: "
            "--set forget.unknown=true"
        )


def files(lake: Path) -> Iterator[Path]:
    """Files of all tables that name items: first catalogues, the newest first, as they know most."""
    for name in TABLES:
        for partition in reversed(partitions.committed(lake, name)):
            here = partitions.folder(lake, name, partition)
            yield from (here / file for file in partitions.read_commit(lake, name, partition).files)


def ids_in_file(path: Path, ids: Ids) -> set[str]:
    """Which ids a file names."""
    if not any(pc.any(named(batch, ids)).as_py() for batch in batches(path)):
        return set()
    return {item for item in ids if any(pc.any(named(batch, frozenset({item}))).as_py() for batch in batches(path))}


def is_online(lake: Path, item: str) -> bool:
    """Whether a vector of an item is in any space, whether one serves or not."""
    with online.refusals():
        return bool(spaces.vectors_of(open_writer(settings(lake)), item))
