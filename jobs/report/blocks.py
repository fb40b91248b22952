"""What the report's templates draw: tables and figures. Every text is escaped by the template; a picture is markup already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

ROWS = 30
"""Rows of a table that are shown; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a caption and heads for its columns; the first cell of a row is the row's head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    """A cell that is a tuple becomes a numbered list."""
    numeric: bool = True
    """Cells are figures, aligned at their right."""

    @property
    def shown(self) -> Sequence[Sequence[object]]:
        """The rows that the page holds."""
        return self.rows[:ROWS]

    @property
    def cut(self) -> str:
        """What the caption says of the rows that are left out; empty where all are shown."""
        return f" The first {ROWS} of {len(self.rows):,} rows." if len(self.rows) > ROWS else ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture, and in words what it shows: a screen reader says the words."""

    picture: Markup
    words: str
