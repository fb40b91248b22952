"""The report's pictures as SVG, by matplotlib: text stays text, equal figures give equal bytes, no id stands twice in a page.

Shapes: N points.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure

INK, QUIET, GRID = "#1b1b1f", "#5a5f69", "#d9dce1"
GOOD, BAD, OPEN = "#1f6feb", "#b3261e", "#8a5a00"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#3f9fd8", "#7a3ea8", "#6b6b6b")
"""Told apart by the colour-blind (after Okabe and Ito 2008, darkened to stand out on white); the last is for the rest."""
DARK = ("#56b4e9", "#ff9248", "#2fd0a0", "#f0a3cc", "#e0c04a", "#8ecbff", "#c79bf2", "#a6a6a6")
"""The same, lightened to stand out on a dark page."""
THEME = {
    "ink": (INK, "#e8e8ec"),
    "faint": (QUIET, "#a9b0bb"),
    "grid": (GRID, "#3a3f48"),
    "better": (GOOD, "#6aa8ff"),
    "worse": (BAD, "#ff8a80"),
    "open": (OPEN, "#e3b341"),
    **{f"k{place}": pair for place, pair in enumerate(zip(PALETTE, DARK, strict=True))},
}
"""Names of the pictures' colours in the page's style, on white and on a dark page."""
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmemb",
    # a $ in an attribute's name is no formula
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
FEW = 3
"""Lines whose names find room inside a chart."""
WIDTH = 6.0
"""Inches of a picture: on a phone, where it shrinks to the screen, its letters can still be read."""


@contextmanager
def drawing(name: str, height: float, width: float = WIDTH) -> Iterator[tuple[Any, list[Markup]]]:
    """(axes, list that receives the SVG) of a figure whose ids all begin with `name`."""
    received: list[Markup] = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.subplots(), received
        stream = io.StringIO()
        figure.savefig(
            stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    received.append(embedded(stream.getvalue(), name))


def embedded(svg: str, name: str) -> Markup:
    """An SVG document -> an element of a page: scaled and coloured by the page, ids its own, hidden from screen readers.

    The figure around it says in words what it shows. matplotlib has escaped the texts in it.
    """
    svg = svg[svg.index("<svg") :]
    # a style of the picture would hold for the whole page
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"^<svg([^>]*?) width=\"[^\"]*\"", r"<svg\1", svg)
    svg = re.sub(r"^<svg([^>]*?) height=\"[^\"]*\"", r"<svg\1", svg)
    for colour, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{colour})")
    return Markup(svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1))


# ------------------------------------------------------------------------------------------------------------------ kinds


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A row of a forest plot; `low` and `high` are none where the slice is too small for an interval."""

    label: str
    value: float
    low: float | None
    high: float | None
    margin: float | None
    """Below zero, this much is no loss; none for a floor, which must be beaten."""
    verdict: str


def forest(name: str, rows: Sequence[Interval], label: str) -> Markup:
    """Differences with their intervals, zero and the allowed loss marked."""
    with drawing(name, 0.9 + 0.34 * len(rows)) as (axis, out):
        for place, row in enumerate(reversed(rows)):
            colour, marker = {"passed": (GOOD, "o"), "failed": (BAD, "s")}.get(row.verdict, (OPEN, "D"))
            if row.low is not None and row.high is not None:
                axis.plot([row.low, row.high], [place, place], color=colour, linewidth=2.4, solid_capstyle="butt")
            axis.plot([row.value], [place], marker=marker if row.low is not None else "x", color=colour, markersize=7)
            if row.margin is not None:
                axis.plot([-row.margin] * 2, [place - 0.35, place + 0.35], color=BAD, linewidth=1.4, linestyle=":")
        axis.axvline(0, color=INK, linewidth=1)
        axis.set_yticks(range(len(rows)), [row.label for row in reversed(rows)])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=4)
        axis.grid(axis="y", visible=False)
    return out[0]


def bars(name: str, labels: Sequence[str], values: Sequence[float], label: str, colours: Sequence[str] | None = None) -> Markup:
    """Horizontal bars with their figures beside them."""
    with drawing(name, 0.8 + 0.34 * len(labels)) as (axis, out):
        places = range(len(labels))
        drawn = axis.barh(places, values, color=list(colours or [GOOD] * len(labels)), height=0.62)
        axis.bar_label(drawn, [f"{value:,.1f}".removesuffix(".0") for value in values], padding=4, color=INK)
        axis.set_yticks(places, labels)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.margins(x=0.2)
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.10g}")
        axis.grid(axis="y", visible=False)
    return out[0]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One axis of a line chart."""

    title: str
    across: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Name -> (x, y)."""
    mark: float | None = None
    """An x that was chosen, for example the best epoch."""


def curves(name: str, panels: Sequence[Panel]) -> Markup:
    """Line charts, which the page puts side by side where there is room; lines differ in dash as well as in colour."""
    return Markup().join(curve(f"{name}{place}", panel) for place, panel in enumerate(panels))


def curve(name: str, panel: Panel) -> Markup:
    """One line chart."""
    with drawing(name, 3.4 if len(panel.lines) <= FEW else 4.0, 5.0) as (axis, out):
        for number, (label, (x, y)) in enumerate(panel.lines.items()):
            dash = ("-", "--", ":", "-.")[number % 4]
            point = "o" if len(x) < 25 else None
            axis.plot(x, y, dash, color=PALETTE[number % 7], label=label, marker=point, markersize=4, linewidth=1.8)
        if panel.mark is not None:
            axis.axvline(panel.mark, color=QUIET, linewidth=1, linestyle=(0, (2, 3)))
        axis.set_title(panel.title, fontsize=12, loc="left")
        axis.set_xlabel(panel.across)
        if len(panel.lines) > FEW:
            axis.figure.legend(fontsize=11, loc="outside lower center", ncols=3)
        elif len(panel.lines) > 1:
            axis.legend(fontsize=11)
    return out[0]


def over_nights(name: str, dates: Sequence[str], lines: Mapping[str, Sequence[float | None]], label: str) -> Markup:
    """A measure over the nights; nights without it leave a gap."""
    with drawing(name, 2.8) as (axis, out):
        for number, (title, values) in enumerate(lines.items()):
            y = [np.nan if value is None else value for value in values]
            axis.plot(range(len(dates)), y, ("-", "--", ":", "-.")[number % 4], marker="o", markersize=4,
                      color=PALETTE[number % 7], label=title)  # fmt: skip
        step = -(-len(dates) // 4)  # more of them would run into each other
        axis.set_xticks(range(0, len(dates), step), dates[::step])
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        if len(lines) > 1:
            axis.legend(fontsize=11, ncols=min(len(lines), 4))
    return out[0]


def in_square(point_N2: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """point_N2 -> (x, y) of a map's points in a square of 600, in their order: the page finds titles by a point's place."""
    low_2, high_2 = (point_N2.min(0), point_N2.max(0)) if len(point_N2) else (np.zeros(2), np.ones(2))
    scaled_N2 = 300 + 560 * (point_N2 - (low_2 + high_2) / 2) / max(float((high_2 - low_2).max()), 1e-9)
    return [(round(x), round(y)) for x, y in scaled_N2.tolist()]
