"""What the lake has recorded: rows found by a key, the manifest that names a digest, the files of a commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from jobs.lake import manifests, partitions

Found = tuple[Path, dict[str, Any]]
"""The file that holds a row, and the row."""


def find(lake: Path, table: str, partition: str, column: str, value: str) -> Found | None:
    """The first row with this value; of other rows no more than that column, and only where the value can be, is read."""
    here = partitions.folder(lake, table, partition)
    for name in partitions.read_commit(lake, table, partition).files:
        with partitions.opened(lake, f"{table}/{partition}/{name}") as file:
            at = file.schema_arrow.get_field_index(column)
            for group in range(file.num_row_groups):
                known = file.metadata.row_group(group).column(at).statistics
                if known is not None and known.has_min_max and not known.min <= value <= known.max:
                    continue
                row = pc.index(file.read_row_group(group, columns=[column])[column], value).as_py()
                if row >= 0:
                    return here / name, file.read_row_group(group).slice(row, 1).to_pylist()[0]
    return None


def origin(lake: Path, jobs: Sequence[str], digest: str) -> dict[str, Any] | None:
    """The newest manifest of these jobs (as file patterns) that recorded `digest` as an output."""
    paths = [path for job in jobs for path in manifests.history(lake, job)]
    for path in sorted(paths, key=lambda path: path.parent.name, reverse=True):
        manifest = manifests.parsed(path)
        if manifest.get("status") == "done" and digest in manifest["result"].get("outputs", {}).values():
            return manifest
    return None


def commit_entries(lake: Path, table: str, partition: str) -> list[dict[str, Any]]:
    """Files of a partition with their digests."""
    text = partitions.commit_text(lake, table, partition)
    return list(json.loads(text)["files"]) if text else []


def first_changed(lake: Path, table: str, partition: str, names: Sequence[str] | None = None) -> str:
    """The first of a partition's files (or of those named) whose bytes are not those that were committed; empty where none is."""
    entries = [entry for entry in commit_entries(lake, table, partition) if names is None or entry["name"] in names]

    def sha256(name: str) -> str:
        return partitions.digest_part(lake, f"{table}/{partition}/{name}")

    return next((entry["name"] for entry in entries if sha256(entry["name"]) != entry["sha256"]), "")


def written_by(manifest: dict[str, Any]) -> str:
    """Job, date and code of a manifest."""
    return f"{manifest['job']} of {manifest['ds']}, code {manifest.get('code_revision', 'unknown')}"
