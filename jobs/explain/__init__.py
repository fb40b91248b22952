"""An item -> where its online vector came from, link by link, digests verified against the bytes; and who its neighbours are."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jobs.explain.chain import chain_of, prompt
from jobs.explain.neighbours import nearest, titles, with_titles
from jobs.explain.records import find
from jobs.explain.result import Link, Neighbour, Result
from jobs.explain.tree import tree
from jobs.lake import partitions
from jobs.lake.items import tombstones
from jobs.run import InputError, Refused, Run

if TYPE_CHECKING:
    from feature_repo.reader import Answer, Pointer, Reader

__all__ = ["Config", "Link", "Neighbour", "Result", "run"]
log = logging.getLogger(__name__)
SHOWN = 8
"""Numbers of the vector that are shown."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is explained."""

    run: Run
    item: str | int
    """The item's id."""
    neighbours: int = 5
    """Nearest items shown, in the space that serves and in the one before."""
    url: str = ""
    """Reads through Feast's feature server, for example `http://localhost:6566`; empty reads the store itself."""


def run(config: Config) -> Result:
    """Walks from the online vector to the source snapshot.

    Raises InputError for an item that is not served, with the reason; Refused, naming the first broken link, where bytes are not
    those that were recorded.
    """
    from jobs.engines import online

    reader = open_reader(config)
    pointer = online.served(reader)
    result = answer(config, reader, pointer)
    for line in tree(result, pointer):
        log.info("%s", line)
    if broken := [link for link in result.links if link.verdict == "broken"]:
        first = broken[0]
        raise Refused(f"the chain of item {result.item_id!r} is broken at {first.step} {first.identity}: {first.text}")
    return result


def answer(config: Config, reader: Reader, pointer: Pointer) -> Result:
    """The chain, the text and the neighbours of an item. Raises InputError for an item that is not served."""
    from jobs.engines import online

    started = time.monotonic()
    lake, item_id = config.run.lake, str(config.item)
    read: Answer = reader.vectors([item_id])
    if not read.item_ids:
        raise InputError(why_absent(lake, item_id, pointer, deleted=bool(read.deleted)))
    made_by = online.recommender_of(lake, pointer.space_id)
    row, links = chain_of(lake, item_id, read, made_by)
    near, before = (nearest(lake, space, item_id, config.neighbours) for space in (pointer.space, pointer.previous))
    names = titles(lake, pointer.ds, [item_id, *(found for found, _ in [*near, *before])])
    return Result(
        item_id=item_id,
        title=names[item_id],
        space_id=pointer.space_id,
        recommender_id=made_by["recommender_id"] or pointer.recommender_id,
        encoder_id=made_by["encoder_id"],
        serves_ds=pointer.ds,
        links=tuple(links),
        unchecked=sum(link.verdict == "unknown" for link in links),
        text=prompt(lake, made_by["encoder_id"], row),
        vector=[round(float(value), 6) for value in read.vector_ND[0, :SHOWN]],
        norm=round(float(np.linalg.norm(read.vector_ND[0])), 6),
        neighbours=with_titles(near, names),
        neighbours_before=with_titles(before, names),
        kept_neighbours=len({found for found, _ in near} & {found for found, _ in before}),
        seconds=round(time.monotonic() - started, 3),
        inputs={link.identity: link.digest for link in links if link.digest},
        outputs={},
        rows={},
    )


def open_reader(config: Config) -> Reader:
    """Reads as a client does."""
    from feature_repo.reader import Reader

    return Reader.over_http(config.url) if config.url else Reader.open(config.run.lake)


def why_absent(lake: Path, item_id: str, pointer: Pointer, *, deleted: bool) -> str:
    """Why an item has no vector."""
    if deleted or item_id in tombstones(lake):
        return f"explain.item {item_id!r} was forgotten: nothing of it is served, and nothing is left to explain"
    partition = partitions.latest(lake, "items", "9999-12-31")
    if find(lake, "items", partition, "item_id", item_id):
        return f"explain.item {item_id!r} is in items/{partition} but not in what serves, which is of {pointer.ds}: publish first"
    return f"explain.item {item_id!r} is in neither the catalogue items/{partition} nor what serves: take one of its item_id"
