"""Manifests: what a run read and wrote, with the digests; one file a run, never written again.

`manifests/ds=DATE/NAME.ENDED-RANDOM.json`, so names of one job lie in the order in which its runs ended. Runs of an experiment
(`run.variant`) lie beside those of the nights and say so. Lakes that are older hold one `NAME.json`, which was replaced by every
run and tells of earlier ones; it counts as the oldest run. They chain from an online vector back to the source snapshot.

An answer to a person's question stays `NAME.json`, replaced by the next: who was asked about is no history to keep.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jobs.lake import remote
from jobs.lake import store as stores
from jobs.lake.partitions import publish_json
from jobs.redaction import without_secrets
from jobs.run import InputError, Run

ANSWERS = ("recommend", "explain", "asked-lookup")
"""Names of runs that answer a question."""


def path_of(lake: Path, ds: str, name: str) -> Path:
    """Where an answer lies, and in an older lake the newest run of any name."""
    return lake / "manifests" / f"ds={ds}" / f"{name}.json"


def append(lake: Path, ds: str, name: str, record: Mapping[str, Any]) -> Path:
    """Writes the manifest of a run that has ended, beside those of other runs. `name` is the job's, or a shard's."""
    ended = f"{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S%fZ}"
    path = path_of(lake, ds, name if name in ANSWERS else f"{name}.{ended}-{uuid.uuid4().hex[:6]}")
    publish_json(lake, path, without_secrets(record))
    return path


def name_of(path: Path) -> str:
    """The name under which a run was written."""
    return path.name.split(".")[0]


def runs(lake: Path, ds: str, name: str) -> list[Path]:
    """Files of all runs of a name for a date, oldest first."""
    return named(of_day(lake, ds), name)


def named(paths: Iterable[Path], name: str) -> list[Path]:
    """Those of the runs of a name, oldest first."""
    found = [path for path in paths if fnmatch.fnmatchcase(path.name, f"{name}.*json")]
    # `NAME.json` is of an older lake: before all that say when they ended
    return sorted(found, key=lambda path: (path.name.count("."), path.name))


def of_day(lake: Path, ds: str) -> list[Path]:
    """Files of all runs for a date; of a lake on an object store they are brought to this machine."""
    if store := stores.of(lake):
        remote.mirror(store, lake, f"manifests/ds={ds}", ".json")
    return sorted((lake / "manifests" / f"ds={ds}").glob("*.json"))


def days(lake: Path) -> list[str]:
    """Dates that have a manifest, in order."""
    if store := stores.of(lake):
        names = store.folders("manifests")
    else:
        names = sorted(path.name for path in (lake / "manifests").glob("ds=*"))
    return [name.removeprefix("ds=") for name in names if name.startswith("ds=")]


def history(lake: Path, name: str, ds: str = "9999-12-31") -> Iterator[Path]:
    """Files of all runs of a name for dates up to `ds`, newest first; `name` may be a pattern, such as `embed*`."""
    if store := stores.of(lake):
        yield from history_there(store, lake, name, ds)
        return
    for day in reversed([day for day in days(lake) if day <= ds]):
        yield from reversed(runs(lake, day, name))


def history_there(store: stores.Store, lake: Path, name: str, ds: str) -> Iterator[Path]:
    """The same of an object store: one list names all, a request for each thousand, and a file comes once it is asked for."""
    there = {lake / str(one["path"]): one for one in store.listed("manifests") if str(one["path"]).endswith(".json")}
    for day in sorted({path.parent.name for path in there if path.parent.name <= f"ds={ds}"}, reverse=True):
        for path in reversed(named((path for path in there if path.parent.name == day), name)):
            if remote.is_older(path, there[path]):
                store.fetch_one(str(there[path]["path"]), path)
            yield path


def parsed(path: Path) -> dict[str, Any]:
    """A manifest; empty where it is no JSON object. Without secrets also where an older version has kept them."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return without_secrets(found) if isinstance(found, dict) else {}


def variant_of(manifest: Mapping[str, Any]) -> str:
    """The experiment that a run belongs to; "" for the nights' own."""
    return str(manifest.get("variant") or "")


def read(lake: Path, ds: str, job: str, variant: str = "") -> dict[str, Any]:
    """The newest run of a job at or before `ds` that ended well: of the experiment, where it has one, else of the nights' own.

    Raises InputError where there is none.
    """
    for wanted in dict.fromkeys((variant, "")):
        for path in history(lake, job, ds):
            manifest = parsed(path)
            if manifest.get("status") == "done" and variant_of(manifest) == wanted:
                return manifest
    raise InputError(f"no run of {job!r} at or before {ds} in the lake {stores.called(lake)}: run `python -m jobs {job}` first")


def of_date(lake: Path, ds: str, name: str) -> dict[str, Any]:
    """The newest run of a name for one date that ended well, of the nights' own; empty where there is none."""
    found = (parsed(path) for path in reversed(runs(lake, ds, name)))
    return next((one for one in found if one.get("status") == "done" and not variant_of(one)), {})


def latest(run: Run, job: str) -> dict[str, Any]:
    """The Result of the newest run of a job at or before the run's date that ended well. Raises InputError without one."""
    found: dict[str, Any] = read(run.lake, run.ds, job, run.variant)["result"]
    return found
