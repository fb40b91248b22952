"""One thing that `check` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """`ok`, `look` (works, but may not be meant) or `wrong` (a job would fail)."""

    level: Literal["ok", "look", "wrong"]
    what: str
    text: str


def failure(what: str, error: Exception) -> Finding:
    """A check that failed is a finding too."""
    if isinstance(error, KeyError):
        return Finding("wrong", what, f"the recipe has no key {error}: add it")
    return Finding("wrong", what, " ".join(str(error).split())[:800])
