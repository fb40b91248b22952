"""What Feast knows: entities, feature views and services. `feast apply` imports this file; nothing happens at import.

| feature view      | one row per    | written by             |
|-------------------|----------------|------------------------|
| `item_embedding`  | (item, space)  | `publish`              |
| `serving_pointer` | catalogue      | `publish`, `rollback`  |
| `item_tombstone`  | forgotten item | `forget`               |
| `item_attributes` | item           | `publish`              |
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
    user_history: FeatureView
    user_history_push: PushSource
    srs_serving: FeatureService
    srs_user: FeatureService
    may_read: Permission
    may_push: Permission


def define(offline: str) -> Definitions:
    """The objects, with their offline tables in Parquet folders below `offline`."""
    item, space, catalogue, user = (
        Entity(name=name, join_keys=[key], value_type=ValueType.STRING, description=description)
        for name, key, description in (
            ("item", "item_id", "An item of the catalogue"),
            ("space", "space_id", "One (encoder, whitening, recommender): vectors of two spaces can't be compared"),
            ("catalogue", "catalogue", f"Key of the pointer; always {CATALOGUE!r}"),
            ("user", "user_id", "A user of the SRS"),
        )
    )

    def source(name: str) -> FileSource:
        return FileSource(name=f"{name}_files", path=f"{offline}/{name}", timestamp_field="event_timestamp")

    def view(name: str, entities: list[Entity], fields: list[Field], batch: FileSource | PushSource) -> FeatureView:
        keys = [Field(name=entity.join_key, dtype=String) for entity in entities]
        return FeatureView(name=name, entities=entities, schema=[*keys, *fields], source=batch, ttl=None)

    embedding = view(
        "item_embedding",
        [item, space],
        [
            Field(name="vector", dtype=Array(Float32), description="codec float32"),
            Field(name="vector_f16", dtype=Bytes, description="codec float16: little-endian half floats"),
        ],
        source("item_embedding"),
    )
    pointer = view(
        "serving_pointer",
        [catalogue],
        [
            Field(name="space_id", dtype=String, description="the space that serves"),
            Field(name="recommender_id", dtype=String, description="the recommender whose user vectors fit it"),
            Field(name="ds", dtype=String, description="date of the snapshot that it serves"),
            Field(name="width", dtype=Int64),
            Field(name="codec", dtype=String, description="float32 or float16: which field of item_embedding to read"),
            Field(name="items", dtype=Int64, description="how many items it has"),
            Field(name="sequence", dtype=Int64, description="how many times the pointer was written"),
            Field(name="previous", dtype=String, description="the same of the space before, as JSON, for rollback"),
            Field(name="index", dtype=String, description="digest of the space's index"),
            Field(name="withheld", dtype=String, description="ids forgotten since that index was built, as JSON"),
        ],
        source("serving_pointer"),
    )
    tombstone = view("item_tombstone", [item], [Field(name="forgotten_at", dtype=UnixTimestamp)], source("item_tombstone"))
    attributes = view(
        "item_attributes",
        [item],
        [
            Field(name="names", dtype=Array(String)),
            Field(name="values", dtype=Array(String)),
            Field(name="content_hash", dtype=String),
        ],
        source("item_attributes"),
    )
    history_push = PushSource(name="user_history_push", batch_source=source("user_history"))
    history = view(
        "user_history",
        [user],
        [
            Field(name="item_ids", dtype=Array(String), description="oldest first"),
            Field(name="timestamps", dtype=Array(Int64), description="unix seconds"),
        ],
        history_push,
    )
    return Definitions(
        item=item,
        space=space,
        catalogue=catalogue,
        user=user,
        item_embedding=embedding,
        serving_pointer=pointer,
        item_tombstone=tombstone,
        item_attributes=attributes,
        user_history=history,
        user_history_push=history_push,
        srs_serving=FeatureService(name="srs_serving", features=[embedding, attributes]),
        srs_user=FeatureService(name="srs_user", features=[history]),
        may_read=Permission(
            name="may_read",
            types=[FeatureView, FeatureService],
            policy=RoleBasedPolicy(roles=[READS, PUSHES]),
            actions=[AuthzedAction.DESCRIBE, AuthzedAction.READ_ONLINE, AuthzedAction.READ_OFFLINE],
        ),
        may_push=Permission(
            name="may_push",
            types=[FeatureView],
            name_patterns=["^user_history$"],
            policy=RoleBasedPolicy(roles=[PUSHES]),
            actions=[AuthzedAction.WRITE_ONLINE],
        ),
    )


(
    item,
    space,
    catalogue,
    user,
    item_embedding,
    serving_pointer,
    item_tombstone,
    item_attributes,
    user_history,
    user_history_push,
    srs_serving,
    srs_user,
    may_read,
    may_push,
) = define(os.environ.get("LLMEMB_OFFLINE", "offline"))
