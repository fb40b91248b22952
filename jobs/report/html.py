"""Pieces of the report's HTML: tables, figures, told gaps. Every text goes through `Markup.format`, which escapes it.

A title with a script tag stays text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

ROWS = 30
"""Rows of a table that are shown; the rest is counted."""


def join(parts: Iterable[Markup | str]) -> Markup:
    """Pieces one after the other; plain texts are escaped."""
    return Markup("").join(parts)


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], numeric: bool = True) -> Markup:
    """A table with a caption and heads for its columns and rows, scrollable by itself on a narrow screen."""
    shown = rows[:ROWS]
    more = f" The first {ROWS} of {len(rows):,} rows." if len(rows) > ROWS else ""
    body = join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(row[0], join(Markup("<td>{}</td>").format(cell) for cell in row[1:]))
        for row in shown
    )
    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="{}"><table{}><caption><span>{}{}</span></caption>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(
        caption, Markup(' class="numbers"') if numeric else "", caption, more,
        join(Markup('<th scope="col">{}</th>').format(cell) for cell in head), body,
    )  # fmt: skip


def figure(svg: str, words: str) -> Markup:
    """A picture and what it shows in words, which is also what a screen reader says."""
    return Markup('<figure><div class="chart">{}</div><figcaption>{}</figcaption></figure>').format(Markup(svg), words)


def folded(summary: str, part: Markup) -> Markup:
    """A part that is there for whoever opens it."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, part)


def said(text: str) -> Markup:
    """A paragraph."""
    return Markup("<p>{}</p>").format(text)


def missing(text: str) -> Markup:
    """A part that is not there, told."""
    return Markup('<p class="missing">{}</p>').format(text)


def number(value: object, digits: int = 4) -> str:
    """A figure for a table; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        return "–" if value is None or value == "" else str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and value == int(value)):
        return f"{value:,.0f}"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}"


def short(identity: object) -> str:
    """The first digits of a digest."""
    text = str(identity or "")
    return f"{text[:12]}…" if len(text) > 24 else text or "–"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def first_line(text: object) -> str:
    """A message, short enough for a line."""
    line = " ".join(str(text or "no message").split())
    return line if len(line) <= 300 else f"{line[:299]}…"


def percent(share: float | None) -> str:
    """A share."""
    return "–" if share is None else f"{share:.1%}"
