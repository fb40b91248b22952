"""Which items have a row in which space of a Redis store, listed beside the rows: no question needs a scan of all keys.

Lists change in the transaction that changes the rows. One space's list lies in parts, so that none grows so long that Redis stops
to make it larger. A store of an older version is read through once, by the first writer that holds its lease.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from feature_repo import feature_definitions as views  # not its parts: `feast apply` would find them twice
from feature_repo.keys import key_texts, serialized
from feature_repo.leases import SCAN
from feature_repo.transport import entity_keys

PARTS = 64
Pairs = Iterable[tuple[str, str]]
"""(item id, space id)."""


class Roster:
    """The lists of one project."""

    def __init__(self, client: Any, project: str) -> None:
        self.client, self.project = client, project
        self.spaces_key, self.whole_key = f"{project}:spaces", f"{project}:spaces:whole"

    def key(self, space_id: str, part: int) -> str:
        """Of one part of a space's list."""
        return f"{self.project}:space:{space_id}:{part:02x}"

    def parts(self, pairs: Pairs) -> dict[str, list[str]]:
        """The lists that pairs belong to, with the ids for each."""
        found: dict[str, list[str]] = defaultdict(list)
        for item_id, space_id in pairs:
            found[self.key(space_id, zlib.crc32(item_id.encode()) % PARTS)].append(item_id)
        return found

    def add(self, pipe: Any, pairs: list[tuple[str, str]]) -> None:
        """Lists rows, in the transaction that writes them."""
        for key, ids in self.parts(pairs).items():
            pipe.sadd(key, *ids)
        for space_id in {space_id for _, space_id in pairs}:
            pipe.hset(self.spaces_key, space_id, 1)

    def strike(self, pipe: Any, pairs: Pairs) -> None:
        """Takes rows off the lists, in the transaction that deletes them."""
        for key, ids in self.parts(pairs).items():
            pipe.srem(key, *ids)

    @property
    def whole(self) -> bool:
        """Whether all rows of the store are listed."""
        return bool(self.client.exists(self.whole_key))

    def known(self) -> list[str]:
        """Spaces that have or had rows."""
        return sorted(name.decode() for name in self.client.hkeys(self.spaces_key))

    def counts(self) -> dict[str, int]:
        """Rows of each space that has any."""
        known = self.known()
        with self.client.pipeline(transaction=False) as pipe:
            for space_id in known:
                for part in range(PARTS):
                    pipe.scard(self.key(space_id, part))
            sizes = pipe.execute()
        counts = {space_id: sum(sizes[at * PARTS : (at + 1) * PARTS]) for at, space_id in enumerate(known)}
        return {space_id: count for space_id, count in counts.items() if count}

    def members(self, space_id: str) -> Iterator[list[str]]:
        """Ids of a space's items, in bounded lists."""
        for part in range(PARTS):
            cursor = 0
            while True:
                cursor, ids = self.client.sscan(self.key(space_id, part), cursor, count=SCAN)
                yield [item_id.decode() for item_id in ids]
                if not cursor:
                    break

    def keys_of(self, item_id: str) -> list[bytes]:
        """Serialized keys that an item's rows have in the spaces that are known, whether they are there or not."""
        known = self.known()
        return [serialized(key) for key in entity_keys({"item_id": [item_id] * len(known), "space_id": known})]


def pairs_of(rows: Iterable[Any]) -> list[tuple[str, str]]:
    """(item id, space id) of Feast's rows of `item_embedding`."""
    found = []
    for key, *_ in rows:
        values = dict(zip(key.join_keys, (value.string_val for value in key.entity_values), strict=True))
        found.append((values["item_id"], values["space_id"]))
    return found


def pairs_in(keys: Iterable[bytes]) -> list[tuple[str, str]]:
    """(item id, space id) of serialized keys of `item_embedding`."""
    return [(texts[0], texts[1]) for texts in (key_texts(views.item_embedding, key) for key in keys)]
