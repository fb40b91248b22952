"""The answer as a tree, for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.explain.result import Link, Result, Verdict

if TYPE_CHECKING:
    from feature_repo.reader import Pointer

MARKS: dict[Verdict, str] = {"verified": "ok", "broken": "BROKEN", "unknown": "not checked"}
INDENT = "   "


def tree(result: Result, pointer: Pointer) -> Iterator[str]:
    """Lines of the tree: the chain, the text, the neighbours."""
    yield f"{result.item_id}  {result.title}"
    for link in result.links:
        yield from branch(link)
    yield "the LLM read:"
    yield from (f"{INDENT}{line}" for line in (result.text or "unknown: the encoder or the item's text is gone").splitlines())
    yield f"nearest now, in space {result.space_id}:"
    yield from (f"{INDENT}{found.score:>9.4f}  {found.title}" for found in result.neighbours)
    if pointer.previous is None:
        yield "no space served before this one"
    elif not result.neighbours_before:
        yield f"space {pointer.previous.space_id} served before: it was collected, or the item was not in it"
    else:
        yield f"nearest before, in space {pointer.previous.space_id} ({result.kept_neighbours} are the same):"
        yield from (f"{INDENT}{found.score:>9.4f}  {found.title}" for found in result.neighbours_before)


def branch(link: Link) -> Iterator[str]:
    """The two lines of a link."""
    yield f"{INDENT * link.depth}└─ {link.step} {link.identity}  [{MARKS[link.verdict]}]"
    yield f"{INDENT * link.depth}{INDENT}{link.text}"
