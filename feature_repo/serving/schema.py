"""Bodies of requests, with their limits and examples, as OpenAPI tells them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LONGEST_ID = 512
LONGEST_HISTORY = 10_000
MOST = 1_000
Id = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
Name = Annotated[str, Field(max_length=LONGEST_ID)]
Texts = Annotated[list[Annotated[str, Field(max_length=4_096)]], Field(min_length=1, max_length=100)]
Filters = Annotated[dict[Name, Texts], Field(max_length=8)]
Body = ConfigDict(extra="forbid", strict=True)


class Recommend(BaseModel):
    """For whom, how many, and which."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"user_id": "459", "k": 10},
                {"history": ["50", "181", "258"], "k": 5, "filters": {"genres": ["Comedy", "Drama"]}, "explain": True},
            ]
        },
    )
    user_id: Id | None = Field(None, description="a user whose history was pushed to Feast's `user_history`")
    history: list[Id] | None = Field(
        None, max_length=LONGEST_HISTORY, description="or the history itself, oldest first; the newest are read, none is kept"
    )
    k: int = Field(10, ge=1, description="items to answer")
    exclude_seen: bool = Field(True, description="leaves out items of the history")
    exclude: list[Id] = Field(default_factory=list, max_length=LONGEST_HISTORY, description="more items to leave out")
    filters: Filters = Field(
        default_factory=dict,
        description="attribute -> values, of which an item must have one, for every attribute; of an attribute that is a list "
        "(`genres`: Action, Comedy) each of its values counts",
        examples=[{"genres": ["Comedy", "Drama"], "release_year": ["1995"]}],
    )
    explain: bool = Field(False, description="tells what each part of the recommender brought to a score")
    attributes: list[Name] = Field(
        default_factory=list, max_length=32, description="attributes to answer beside each item, for example `title`"
    )

    @model_validator(mode="after")
    def one_of_both(self) -> Recommend:
        """Either a user or a history."""
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or history")
        return self


class Similar(BaseModel):
    """Neighbours of which items, and how many."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"item_ids": ["50"], "k": 10, "filters": {"genres": ["Comedy"]}}]},
    )
    item_ids: list[Id] = Field(min_length=1, max_length=100)
    k: int = Field(10, ge=1)
    filters: Filters = Field(default_factory=dict, description="as in /recommend")
    attributes: list[Name] = Field(default_factory=list, max_length=32, description="as in /recommend")


class Vectors(BaseModel):
    """Vectors of which items, and how they are written."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"item_ids": ["50", "181"]}]})
    item_ids: list[Id] = Field(min_length=1, max_length=MOST)
    encoding: Literal["base64", "list"] = Field(
        "base64", description="base64 of little-endian float32 numbers; `list` is for eyes: at most 20 items"
    )
    attributes: list[Name] = Field(default_factory=list, max_length=32, description="as in /recommend")

    @model_validator(mode="after")
    def lists_are_short(self) -> Vectors:
        """Numbers as text take a hundred times as long."""
        if self.encoding == "list" and len(self.item_ids) > 20:
            raise ValueError('encoding "list" is for at most 20 items: take "base64"')
        return self


SPACE: dict[str, Any] = {
    "space_id": "ab12cd34ef56ab12",
    "recommender_id": "12ab34cd56ef12ab",
    "ds": "1998-04-22",
    "sequence": 7,
    "age_s": 3600.0,
    "fallback": None,
}
RECOMMENDED = {
    "items": [{"item_id": "181", "score": 3.21, "parts": {"collaborative": 2.2, "text": 1.01}}],
    "history_items": 118,
    **SPACE,
}
NEIGHBOURS = {"neighbours": {"50": [{"item_id": "181", "score": 5.1}]}, "missing": [], **SPACE}
VECTORS = {"item_ids": ["50"], "vectors": ["AACAPwAAAAA="], "width": 2, "missing": ["999"], "deleted": [], **SPACE}
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"description": "no token, or a wrong one"},
    408: {"description": "the request came too slowly"},
    413: {"description": "the body is too large"},
    415: {"description": "the body is not sent as application/json"},
    422: {"description": "the body is not what it should be: `error` says what"},
    503: {"description": "nothing is served yet, or too much is asked at once: ask again after Retry-After seconds"},
}


def answers(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's responses of an endpoint."""
    return {200: {"description": "the answer", "content": {"application/json": {"example": example}}}, **REFUSALS}
