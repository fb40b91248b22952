"""Feast's serialized entity keys: made, read, and how those of a view begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from feast import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key, serialize_entity_key_prefix

STRING = (2).to_bytes(4, "little")
"""How Feast marks a text inside an entity key."""


def key_prefix(view: FeatureView, *texts: str) -> bytes:
    """How serialized keys of a view begin, whose first join keys (in alphabetical order) have these values."""
    parts = [serialize_entity_key_prefix(sorted(view.join_keys))]
    return b"".join([*parts, *(key_text(text) for text in texts)])


def key_text(text: str) -> bytes:
    """One value as it stands in a serialized key."""
    raw = text.encode()
    return STRING + len(raw).to_bytes(4, "little") + raw


def key_texts(view: FeatureView, key: bytes) -> list[str]:
    """The values of a serialized key, in the alphabetical order of the join keys."""
    at, texts = len(key_prefix(view)), []
    while at < len(key):
        size = int.from_bytes(key[at + 4 : at + 8], "little")
        texts.append(key[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return texts


def serialized(entity_key: Any) -> bytes:
    """Feast's serialized form of an entity key."""
    return bytes(serialize_entity_key(entity_key, entity_key_serialization_version=3))


def pages(after: Callable[[bytes], list[bytes]], start: bytes) -> Iterator[list[bytes]]:
    """Keys that begin with `start`, in bounded lists; `after` gives the next ones in order, none where there are no more."""
    last = start[:-1]
    while found := after(last):
        last = found[-1]
        yield [key for key in found if key.startswith(start)]
        if last > start and not last.startswith(start):
            return
