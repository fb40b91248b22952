"""A row of a table and the link of its partition: file held against commit, commit against manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.explain.records import commit_entries, find, first_changed, origin, written_by
from jobs.explain.result import Link
from jobs.lake import partitions
from jobs.run import InputError


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found of one row."""

    link: Link
    """Of the partition."""
    values: dict[str, Any] = field(default_factory=dict)
    """Empty where the row is gone."""
    manifest: dict[str, Any] | None = None
    """Of the job that wrote the partition."""
    unreadable: bool = False
    """A file could not be read: the row may well be in it."""


def row_of(lake: Path, table: str, partition: str, column: str, value: str, jobs: Sequence[str], depth: int) -> Row:
    """The row with a value, and its link; `jobs` are file patterns of the manifests that may name the partition.

    The file that holds the row is hashed, the commit over all files is checked, and the commit against the manifest.
    """
    link = Link(step=table, identity=f"{table}/{partition}", digest="", verdict="unknown", text="not in the lake", depth=depth)
    try:
        commit = partitions.read_commit(lake, table, partition)
        found = find(lake, table, partition, column, value)
    except InputError:
        return Row(link=link)
    except (OSError, ValueError) as error:
        text = f"a file can't be read ({type(error).__name__}: {error}): write the partition again"
        return Row(link=replace(link, verdict="broken", text=text), unreadable=True)
    manifest = origin(lake, jobs, commit.digest)
    if found is None:
        return Row(link=replace(link, verdict="broken", text="the row is missing: write the partition again"), manifest=manifest)
    checked = check_file(lake, table, partition, found[0].name, manifest)
    return Row(link=replace(link, digest=commit.digest, **checked), values=found[1], manifest=manifest)


def check_file(lake: Path, table: str, partition: str, name: str, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Verdict and text of the file that holds a row."""
    if first_changed(lake, table, partition, [name]):
        text = f"the bytes of {name} are not those that were committed: write the partition again"
        return {"verdict": "broken", "text": text}
    if manifest is None:
        return {"verdict": "unknown", "text": "the file is as committed, but no manifest names this partition as its output"}
    entries = commit_entries(lake, table, partition)
    rows = sum(entry["rows"] for entry in entries)
    return {"verdict": "verified", "text": f"{written_by(manifest)}; row in {name}, one of {len(entries)}, {rows:,} rows"}
