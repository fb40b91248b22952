"""A lake on an object store -> without what no record names: parts that were replaced or half written, indexes that serve nobody.

Commits delete nothing there, so that whoever reads the partition of before reads on. What is younger than `older_s` stays: it may
be of a writer who has not committed yet.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from jobs.lake import remote
from jobs.lake.store import Store

Listed = dict[str, Any]
NO_TABLES = ("feast", "models", "indexes", "manifests", "reports", "locks", "tombstones")


def parts(store: Store, older_s: float, dry_run: bool) -> dict[str, int]:
    """Removes parts that their partition's commit does not name; key -> bytes of what went, or would."""
    folders = defaultdict[str, list[Listed]](list)
    for one in store.listed(""):
        folder, _, name = str(one["path"]).rpartition("/")
        if name.endswith(".parquet") and folder.partition("/")[0] not in NO_TABLES and remote.age_s(one) >= older_s:
            folders[folder].append(one)
    gone = dict[str, int]()
    for folder, old in folders.items():
        table, _, partition = folder.partition("/")
        # read last: of two commits the newer one counts
        found = remote.committed_now(store, table, partition)
        named = {entry["name"] for entry in remote.entries_of(found.data if found else None)}
        gone |= removed(store, [one for one in old if str(one["path"]).rpartition("/")[2] not in named], dry_run)
    return gone


def indexes(store: Store, live: Collection[str], older_s: float, dry_run: bool) -> dict[str, int]:
    """Removes indexes but those that `live` (keys `indexes/space=ID/ds=DATE`) name; key -> bytes of what went, or would."""
    homes = defaultdict[str, list[Listed]](list)
    for one in store.listed("indexes"):
        homes["/".join(str(one["path"]).split("/")[:3])].append(one)
    gone = dict[str, int]()
    for home, files in homes.items():
        record = store.get(f"{home}/_index.json")
        kept = f"{home}/{json.loads(record.data)['folder']}/" if record and home in live else ""
        old = [one for one in files if remote.age_s(one) >= older_s and not (kept and str(one["path"]).startswith(kept))]
        if kept:
            old = [one for one in old if one["path"] != f"{home}/_index.json"]
        # first the file that names the others: no reader opens half of an index
        gone |= removed(store, sorted(old, key=lambda one: not str(one["path"]).endswith("/_index.json")), dry_run)
    return gone


def removed(store: Store, listed: Collection[Listed], dry_run: bool) -> dict[str, int]:
    """Removes objects in their order, unless it is only asked what would go; key -> bytes."""
    for one in () if dry_run else listed:
        store.delete([str(one["path"])])
    return {str(one["path"]): int(one["size"]) for one in listed}
