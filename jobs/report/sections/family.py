"""The bake-off of all systems, and codes of items: figures of jobs that are off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.report import plots as plots
from jobs.report.blocks import Figure, Table
from jobs.report.facts import Facts
from jobs.report.sections.gates import MARKS, SLICES, in_order, interval
from jobs.report.words import number


def section(facts: Facts) -> dict[str, Any]:
    """The bake-off's table, its forest plots, and the figures of codes."""
    judged, codes = facts.night.result("bakeoff"), facts.night.result("codes")
    slices = [name for name in ("overall", "cold", "tail") if any(row["slice"] == name for row in judged.get("differences", []))]
    return {
        "bakeoff": {key: judged.get(key) for key in ("champion", "seeds", "device")} if judged.get("values") else None,
        "tables": [by_slice(judged), costs(judged), *kept(judged)] if judged.get("values") else [],
        "forests": [forest(judged, name) for name in slices],
        "shared": " ".join(shared(codes["report"])) if codes.get("report") else "",
        "codes": [codes_table(codes), *use_of_books(codes)] if codes.get("report") else [],
        "offline": [*reranked(told_by(facts, "rerank")), *generated(told_by(facts, "generate"))],
        "told": {key: codes.get(key) for key in ("books_id", "source", "new", "changed", "kept", "refit")} if codes else None,
    }


def by_slice(judged: Mapping[str, Any]) -> Table:
    """NDCG of every model in every slice."""
    values = judged["values"]
    slices = in_order(next(iter(values.values())), SLICES)
    names = sorted(values, key=lambda name: -(values[name].get("overall", {}).get("ndcg@10") or 0.0))
    rows = [["users", *(number(judged.get("users", {}).get(name)) for name in slices)]]
    rows += [[name, *(number(values[name].get(slice_, {}).get("ndcg@10")) for slice_ in slices)] for name in names]
    return Table(caption="NDCG@10 of every system and floor, means over the seeds", head=["System", *slices], rows=rows)


def costs(judged: Mapping[str, Any]) -> Table:
    """Seconds and bytes of every system, and its NDCG with each seed."""
    models: Sequence[Mapping[str, Any]] = judged.get("models", [])
    rows = [
        [one["model"], number(one["seconds"], 1), number(one["bytes_per_item"], 1), ", ".join(number(v) for v in one["by_seed"])]
        for one in models
    ]
    head = ["System", "Seconds to make, with what it needs", "Bytes an item", "NDCG@10 by seed"]
    return Table(caption="What each system costs", head=head, rows=rows)


def kept(judged: Mapping[str, Any]) -> Iterator[Table]:
    """What codes keep of the champion's vectors, beside controls of as many bits; with the first seed."""
    told = {one["model"]: one["told"][0] for one in judged.get("models", []) if one.get("told")}
    keys = ("recall_at_10", "error")
    rows = [[model, *(number(one.get(key)) for key in keys)] for model, one in told.items() if keys[0] in one]
    if rows:
        caption = f"What codes keep of {judged.get('champion')}'s vectors"
        yield Table(caption=caption, head=["System", "Recall of ten neighbours", "Error over variance"], rows=rows)


def forest(judged: Mapping[str, Any], slice_: str) -> Figure:
    """The champion's lead over every other system in one slice."""
    rows = [row for row in judged["differences"] if row["slice"] == slice_ and row.get("value") is not None]
    rows = sorted(rows, key=lambda row: row["value"])
    intervals = [interval({**row, "slice": "overall"}, None) for row in rows]
    words = f"{judged.get('champion')} less each other system, {slice_}: NDCG@10, 95 % intervals over users and seeds. {MARKS}"
    return Figure(picture=plots.forest(f"family-{slice_}", intervals, "difference in NDCG"), words=words)


def codes_table(codes: Mapping[str, Any]) -> Table:
    """Recall of neighbours and the error of the books, and of the controls of as many bits where they were measured."""
    report = codes["report"]
    names = {"books": "These books", "pq": "Product quantisation", "rq": "Residual k-means"}
    rows = [[names[kind], number(report[kind].get("recall_at_10")), number(report[kind].get("error"))]
            for kind in names if report.get(kind)]  # fmt: skip
    caption = f"What codes of {report.get('bits')} bits an item keep"
    return Table(caption=caption, head=["Codes", "Recall of ten neighbours", "Error over variance"], rows=rows)


def shared(report: Mapping[str, Any]) -> Iterator[str]:
    """Sentences on items of the same codes and what tells them apart, and on what new books moved."""
    same, moved = report.get("collisions") or {}, report.get("moved") or {}
    yield (f"Share of items whose codes another has too: {number(same.get('share'))}; at most {number(same.get('largest'), 0)} "
           f"have the same, told apart by numbers below {number(same.get('most_numbered'), 0)}.")  # fmt: skip
    if moved:
        yield f"New books moved {number(moved.get('share'))} of the {number(moved.get('items'), 0)} items coded before."


def use_of_books(codes: Mapping[str, Any]) -> Iterator[Table]:
    """How evenly each book's entries are used, and what its codes tell of a category."""
    report = codes["report"]
    told = report.get("category") or {}
    information = told.get("information") or []
    rows = [[f"Book {place + 1}", number(book.get("entropy")), number(book.get("gini")), number(book.get("dead"), 0),
             *([number(information[place])] if place < len(information) else [])]
            for place, book in enumerate(report.get("usage") or [])]  # fmt: skip
    head = ["Book", "Entropy, bits", "Gini (0 even)", "Dead entries"]
    if information:
        head.append(f"Share of the bits of {told.get('attribute')}")
    if rows:
        yield Table(caption=f"Use of each book's {number(codes.get('entries'))} entries", head=head, rows=rows)


WAYS = {
    "recommender": "The recommender's order",
    "plain": "The LLM, plain prompt",
    "soft": "The LLM with soft tokens",
    "shuffled": "The same, titles shuffled over the items",
    "mixed": "Both, weighed on validation",
    "oracle": "Oracle: the next item first where the list holds it",
}
"""Orders of a recommender's list, in words."""
BESIDE = ("NDCG@10", "More than the recommender's", "From", "To")


def told_by(facts: Facts, job: str) -> Mapping[str, Any]:
    """The whole Result of a job that ended well: `users` and `differences` have other shapes here than those of `evaluate`."""
    run = facts.night.done(job)
    return (run.manifest.get("result") or {}) if run else {}


def reranked(found: Mapping[str, Any]) -> Iterator[Table]:
    """What an LLM that re-ranks lists adds; nothing where `rerank` did not run."""
    values, less = found.get("ndcg") or {}, found.get("differences") or {}
    rows = [[words, number(values.get(way)), *ends(less.get(way))] for way, words in WAYS.items() if way in values]
    if rows:
        sizes = [number(found.get(key), 0) for key in ("top", "users", "tokens")]
        caption = "Lists of {} re-ranked for {} users; {} soft tokens; weight of the LLM in the mix: ".format(*sizes)
        yield Table(caption=caption + number(found.get("mix"), 1), head=["Order", *BESIDE], rows=rows)


def generated(found: Mapping[str, Any]) -> Iterator[Table]:
    """What a model that writes items' codes achieves; nothing where `generate` did not run."""
    values = found.get("ndcg") or {}
    if values:
        rows = [["The recommender", number(values.get("recommender")), *ends(None)],
                ["Generated", number(values.get("generated")), *ends(found.get("difference"))]]  # fmt: skip
        shares = [number(found.get(key), 3) for key in ("items_share", "drift")]
        caption = "Items written as codes of books {} for {} users; beams that are items: {}, index drift: {}".format(
            found.get("books_id"), number(found.get("users"), 0), *shares
        )
        yield Table(caption=caption, head=["List", *BESIDE], rows=rows)


def ends(less: Mapping[str, Any] | None) -> list[str]:
    """A difference with its interval, as cells."""
    return [number((less or {}).get(key)) for key in ("value", "low", "high")]
