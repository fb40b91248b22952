"""Who is badly served, how that moved, and what it would bring to route these users to another model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.report import plots as plots
from jobs.report.blocks import Figure, Table
from jobs.report.facts import Facts
from jobs.report.plots import Panel
from jobs.report.weak import GROUPS, MEASURE
from jobs.report.words import number, percent


def section(facts: Facts) -> dict[str, Any]:
    """The table of groups, and of each model that weak users were routed to: a curve and its figures."""
    routing = facts.night.result("bakeoff").get("routing") or {}
    routes = routing.get("routes") or {}
    return {
        "groups": table(facts) if facts.weak else None,
        "weak": weak_table(routing) if routing.get("weak") else None,
        "unvalidated": number(routing.get("without_validation")) if routing.get("without_validation") else "",
        "routes": [curve(name, rows) for name, rows in routes.items()],
        "beats": [name for name, rows in routes.items() if any(pays(row) for row in rows)],
        "tried": sum(0 < row["share"] < 1 for rows in routes.values() for row in rows),
    }


def table(facts: Facts) -> Table:
    """Groups of users, worst served ones told by their share, beside the median of the nights before."""
    before = {measure.name: measure.median for measure in facts.measures}
    rows = [
        [GROUPS[one.slice], f"{one.users:,}", percent(one.weak), percent(before.get(f"{MEASURE}{one.slice}")), number(one.ndcg)]
        for one in facts.weak
    ]
    head = ["Users", "How many", "Without any hit", "Median of nights before", "NDCG@10"]
    return Table(caption="Users none of whose held-out events was among the ten best", head=head, rows=rows)


def weak_table(routing: Mapping[str, Any]) -> Table:
    """The weakest fifth by each signal, beside all other users."""
    rows = [
        [f"weak by {name}", number(int(one["users"])), number(one["ndcg"]), number(one["others"]), percent(one["without_hit"])]
        for name, one in routing["weak"].items()
    ]
    head = ["Signal", "Users", "NDCG@10", "All others", "Without any hit"]
    return Table(caption="The weakest fifth of the users under the champion of the bake-off", head=head, rows=rows)


def pays(row: Mapping[str, Any]) -> bool:
    """Whether a router surely beats both the random one with the same share and the champion alone."""
    ends = (row.get("low"), row.get("over_low"))
    return all(end is not None and end > 0 for end in ends)


def curve(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Figure, Table]:
    """NDCG by the share of users that goes to another model: every signal, the random router and the oracle."""
    signals = list(dict.fromkeys(row["signal"] for row in rows))
    first = [row for row in rows if row["signal"] == signals[0]]
    lines = {signal: points(rows, signal, "ndcg") for signal in signals}
    lines |= {other: ([row["share"] for row in first], [row[other] for row in first]) for other in ("random", "oracle")}
    words = f"NDCG@10 by the share of users, weakest first, that is routed to {name}; random: as many users drawn by chance."
    panel = Panel(title=f"Routed to {name}", across="share of the users that is routed", lines=lines)
    figure = Figure(picture=plots.curves(f"routing-{name}", [panel]), words=words)
    keys = ("ndcg", "random", "gain", "low", "high", "over", "over_low", "over_high", "oracle")
    inside = [row for row in rows if 0 < row["share"] < 1]
    cells = [[f"{row['signal']}, {row['share']:.0%}", *(number(row.get(key)) for key in keys)] for row in inside]
    more = ("More than random", "From", "To", "More than the champion", "From", "To")
    head = ["Signal and share", "NDCG@10", "Random router", *more, "Oracle"]
    return figure, Table(caption=f"Routed to {name}", head=head, rows=cells)


def points(rows: Sequence[Mapping[str, Any]], signal: str, key: str) -> tuple[list[float], list[float]]:
    """(shares, values) of a signal."""
    mine = [row for row in rows if row["signal"] == signal]
    return [row["share"] for row in mine], [row[key] for row in mine]
