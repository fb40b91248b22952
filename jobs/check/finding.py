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
