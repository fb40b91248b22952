"""What Feast knows: entities, feature views and services. `feast apply` imports this file; nothing happens at import.

| feature view      | one row per    | written by             |
|-------------------|----------------|------------------------|
| `item_embedding`  | (item, space)  | `publish`              |
| `serving_pointer` | catalogue      | `publish`, `rollback`, `forget` |
| `item_tombstone`  | forgotten item | `forget`               |
| `item_attributes` | item           | `publish`              |
| `item_codes`      | (item, space)  | `codes`                |
| `user_history`    | user           | pushed by the SRS team |

Feast does not enforce a time to live online, so none is set: the reader tells ages.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.permissions.action import AuthzedAction
from feast.permissions.permission import Permission
from feast.permissions.policy import RoleBasedPolicy
from feast.types import Array, Bytes, Float32, Int64, String, UnixTimestamp

PROJECT = "llmemb"
CATALOGUE = "items"
"""The pointer's only key: one catalogue is served."""
READS, PUSHES = "llmemb-reader", "llmemb-srs"
"""Roles that a feature server with authentication asks of its callers: see LLMEMB_FEAST_AUTH. None of them moves the pointer."""


class View(NamedTuple):
    """A feature view in words: its entities and fields, what it is, who writes it."""

    entities: tuple[str, ...]
    fields: tuple[Field, ...]
    description: str
    written_by: str


TAGS = {"system": "llmemb"}
OWNER = "llmemb"
"""Who owns all objects where LLMEMB_OWNER names nobody: as in Airflow."""
ENTITIES = (
    ("item", "item_id", "An item of the catalogue"),
    ("space", "space_id", "One (encoder, whitening, recommender): vectors of two spaces can't be compared"),
    ("catalogue", "catalogue", f"Key of the pointer; always {CATALOGUE!r}"),
    ("user", "user_id", "A user of the SRS"),
)
"""Name, key, description."""
VIEWS = {
    "item_embedding": View(
        ("item", "space"),
        (
            Field(name="vector", dtype=Array(Float32), description="codec float32"),
            Field(name="vector_f16", dtype=Bytes, description="codec float16: little-endian half floats"),
        ),
        "An item's vector in a space",
        "publish",
    ),
    "serving_pointer": View(
        ("catalogue",),
        (
            Field(name="space_id", dtype=String, description="the space that serves"),
            Field(name="recommender_id", dtype=String, description="the recommender whose user vectors fit it"),
            Field(name="ds", dtype=String, description="date of the snapshot that it serves"),
            Field(name="width", dtype=Int64, description="numbers of a vector"),
            Field(name="codec", dtype=String, description="float32 or float16: which field of item_embedding to read"),
            Field(name="items", dtype=Int64, description="how many items it has"),
            Field(name="sequence", dtype=Int64, description="how many times the pointer was written"),
            Field(name="previous", dtype=String, description="the same of the space before, as JSON, for rollback"),
            Field(name="index", dtype=String, description="digest of the space's index"),
            Field(name="withheld", dtype=String, description="ids forgotten since that index was built, as JSON"),
        ),
        "The space that serves: one row, read once a request",
        "publish, rollback, forget",
    ),
    "item_tombstone": View(
        ("item",),
        (Field(name="forgotten_at", dtype=UnixTimestamp, description="when it was forgotten"),),
        "An item that was forgotten on purpose: drop it from caches",
        "forget",
    ),
    "item_attributes": View(
        ("item",),
        (
            Field(name="names", dtype=Array(String), description="names of the attributes, in their order"),
            Field(name="values", dtype=Array(String), description="values[n] belongs to names[n]"),
            Field(name="content_hash", dtype=String, description="digest of names and values"),
        ),
        "What the LLM read of an item",
        "publish",
    ),
    "item_codes": View(
        ("item", "space"),
        (
            Field(name="codes", dtype=Array(Int64), description="one whole number a book"),
            Field(name="number", dtype=Int64, description="tells items of the same codes apart: 0, 1, …"),
            Field(name="books_id", dtype=String, description="version of the books: codes of two can't be compared"),
        ),
        "An item's vector in a space as a few whole numbers, for consumers that take no floats",
        "codes",
    ),
    "user_history": View(
        ("user",),
        (
            Field(name="item_ids", dtype=Array(String), description="oldest first"),
            Field(name="timestamps", dtype=Array(Int64), description="unix seconds"),
        ),
        "A user's newest items",
        "pushed by the SRS team",
    ),
}


class Definitions(NamedTuple):
    """All objects of the feature repository."""

    item: Entity
    space: Entity
    catalogue: Entity
    user: Entity
    item_embedding: FeatureView
    serving_pointer: FeatureView
    item_tombstone: FeatureView
    item_attributes: FeatureView
    item_codes: FeatureView
    user_history: FeatureView
    user_history_push: PushSource
    srs_serving: FeatureService
    srs_user: FeatureService
    may_read: Permission
    may_push: Permission


def define(offline: str) -> Definitions:
    """The objects, their offline tables in Parquet folders below `offline`. LLMEMB_OWNER, a team or an address, owns them."""
    owner = os.environ.get("LLMEMB_OWNER") or OWNER
    entities = Entities(*(made_entity(*words, owner) for words in ENTITIES))
    named = {name: made_view(name, entities, offline, owner) for name in VIEWS if name != "user_history"}
    push = PushSource(
        name="user_history_push", batch_source=source(offline, "user_history", owner), owner=owner, tags=TAGS,
        description="Where the SRS team pushes a user's newest history: the whole list, oldest first",
    )  # fmt: skip
    named["user_history"] = made_view("user_history", entities, offline, owner, push)
    return Definitions(**entities._asdict(), **named, user_history_push=push, **services(named, owner), **permissions())


# ---------------------------------------------------------------------------------------------------------- how they are made


class Entities(NamedTuple):
    """What rows are about."""

    item: Entity
    space: Entity
    catalogue: Entity
    user: Entity


def made_entity(name: str, key: str, description: str, owner: str) -> Entity:
    """An entity whose key is a text."""
    return Entity(name=name, join_keys=[key], value_type=ValueType.STRING, description=description, owner=owner, tags=TAGS)


def source(offline: str, name: str, owner: str) -> FileSource:
    """The Parquet folder behind a view."""
    return FileSource(
        name=f"{name}_files", path=f"{offline}/{name}", timestamp_field="event_timestamp", owner=owner, tags=TAGS,
        s3_endpoint_override=os.environ.get("AWS_ENDPOINT_URL") if offline.startswith("s3://") else None,
        description=f"What {name} was at each moment, for get_historical_features",
    )  # fmt: skip


def made_view(name: str, entities: Entities, offline: str, owner: str, push: PushSource | None = None) -> FeatureView:
    """A view over its folder, or over a push source."""
    known = VIEWS[name]
    used = [getattr(entities, entity) for entity in known.entities]
    keys = [Field(name=entity.join_key, dtype=String) for entity in used]
    return FeatureView(
        name=name, entities=used, schema=[*keys, *known.fields], source=push or source(offline, name, owner), ttl=None,
        description=known.description, owner=owner, tags=TAGS | {"written_by": known.written_by},
    )  # fmt: skip


def services(views: dict[str, FeatureView], owner: str) -> dict[str, FeatureService]:
    """What an SRS asks for by one name."""
    about_items = "Vector and attributes of items of one space: give item_id and the space_id of serving_pointer"
    return {
        "srs_serving": FeatureService(
            name="srs_serving", features=[views["item_embedding"], views["item_attributes"]], owner=owner, tags=TAGS,
            description=about_items,
        ),
        "srs_user": FeatureService(
            name="srs_user", features=[views["user_history"]], owner=owner, tags=TAGS, description="A user's newest history"
        ),
    }  # fmt: skip


def permissions() -> dict[str, Permission]:
    """Who may read, and who may push histories. Nobody may move the pointer through a feature server."""
    reading = [AuthzedAction.DESCRIBE, AuthzedAction.READ_ONLINE, AuthzedAction.READ_OFFLINE]
    return {
        "may_read": Permission(
            name="may_read", types=[FeatureView, FeatureService], policy=RoleBasedPolicy(roles=[READS, PUSHES]), actions=reading,
            tags=TAGS,
        ),
        "may_push": Permission(
            name="may_push", types=[FeatureView], name_patterns=["^user_history$"], policy=RoleBasedPolicy(roles=[PUSHES]),
            actions=[AuthzedAction.WRITE_ONLINE], tags=TAGS,
        ),
    }  # fmt: skip


(
    item,
    space,
    catalogue,
    user,
    item_embedding,
    serving_pointer,
    item_tombstone,
    item_attributes,
    item_codes,
    user_history,
    user_history_push,
    srs_serving,
    srs_user,
    may_read,
    may_push,
) = define(os.environ.get("LLMEMB_OFFLINE", "offline"))
