"""The manifests of a night, as its report reads them, and the same as OpenLineage events.

An event stands for a job's run: what it read and wrote, each with the digest of its bytes as the data set's version
(OpenLineage 2-0-2, facets `version`, `outputStatistics`, `errorMessage`).
"""

from __future__ import annotations

import datetime as dt
import json
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

PATH = (
    "movielens", "extract", "scft", "embed", "pretrain", "rat", "evaluate", "promote", "project", "publish", "lookup",
    "rollback", "collect", "forget",
)  # fmt: skip
"""Jobs in the order of the data. Answers to single questions (`recommend`, `explain`) and the report itself are left out."""
NIGHTLY = ("extract", "embed", "project", "publish")
"""Jobs without which a night is unfinished; the others run when they are due."""
Whole = Annotated[int, Field(gt=-(2**63), lt=2**63)]
Number = Whole | Annotated[float, Field(allow_inf_nan=False)]


class Difference(TypedDict):
    """A comparison of `evaluate`, as far as it is shown."""

    against: str
    slice: str
    value: Number | None
    low: Number | None
    high: Number | None
    detectable: NotRequired[Number | None]
    reference: NotRequired[Number | None]
    n: NotRequired[Whole]


class Reason(TypedDict):
    """A gate's verdict."""

    gate: str
    verdict: str
    text: str


SHAPES: Mapping[str, TypeAdapter[Any]] = {
    **dict.fromkeys(("seen", "quarantined", "rows"), TypeAdapter(dict[str, Whole])),
    **dict.fromkeys(("fill", "users", "figures", "base_figures"), TypeAdapter(dict[str, Number])),
    **dict.fromkeys(("inputs", "outputs"), TypeAdapter(dict[str, str | None])),
    **dict.fromkeys(
        ("items", "embedded", "resumed", "written", "tokens", "tokens_per_second", "new_items", "changed_items", "forgotten",
         "later", "carried", "steps", "best_step", "best_epoch", "validation_ndcg", "read_ms_p50"),
        TypeAdapter(Number | None),
    ),
    **dict.fromkeys(("space_id", "encoder_id", "serves_ds", "decision", "device"), TypeAdapter(str)),
    "churn": TypeAdapter(dict[str, Number | None]),
    "values": TypeAdapter(dict[str, dict[str, dict[str, Number | None]]]),
    "history": TypeAdapter(list[dict[str, Number | None]]),
    "losses": TypeAdapter(list[Number]),
    "differences": TypeAdapter(list[Difference]),
    "reasons": TypeAdapter(list[Reason]),
}  # fmt: skip
"""What the page reads of a Result. A manifest may be of another version, or half of it written by hand."""
KEPT = ("device", "embedded", "resumed", "tokens", "tokens_per_second", "written")
"""Of a Result, what stays known of a run after the job has run again for the same date."""
ATTEMPTS = 20
PRODUCER = "urn:llmemb:jobs"
EVENT = "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
FACETS = "https://openlineage.io/spec/facets"


@dataclass(frozen=True, kw_only=True)
class JobRun:
    """One manifest. Anything in it may be missing: a job that failed early wrote little."""

    name: str
    """Of the manifest; a shard's carries its number."""
    job: str
    manifest: Mapping[str, Any]

    @property
    def status(self) -> str:
        """done, refused or failed."""
        return str(self.manifest.get("status", "failed"))

    @property
    def result(self) -> Mapping[str, Any]:
        """The Result, empty where there is none; known figures of a strange type are left out, as if they were missing."""
        found = self.manifest.get("result")
        if not isinstance(found, Mapping):
            return {}
        return {name: value for name, value in found.items() if name not in SHAPES or fits(SHAPES[name], value)}

    @property
    def seconds(self) -> float:
        """How long it ran."""
        return as_number(self.manifest.get("seconds"))

    @property
    def earlier(self) -> tuple[JobRun, ...]:
        """Runs of the same job and date before this one, oldest first: retries, or the same job in another DAG."""
        found = self.manifest.get("earlier")
        kept = found if isinstance(found, list) else []
        return tuple(JobRun(name=self.name, job=self.job, manifest=one) for one in kept if isinstance(one, Mapping))

    @property
    def on_gpu(self) -> bool:
        """Whether it says that it ran on a GPU."""
        return str(self.result.get("device", "")).startswith("cuda")


@dataclass(frozen=True, kw_only=True)
class Night:
    """What ran for one date."""

    ds: str
    runs: tuple[JobRun, ...]
    """In the order of the data."""
    unreadable: tuple[str, ...] = field(default=())
    """Manifests that are no JSON object."""

    def all(self, job: str) -> tuple[JobRun, ...]:
        """Every run of a job: one, or one a shard."""
        return tuple(run for run in self.runs if run.job == job)

    def done(self, job: str) -> JobRun | None:
        """The run of a job that ended well; of shards the first."""
        return next((run for run in self.all(job) if run.status == "done"), None)

    def result(self, job: str) -> Mapping[str, Any]:
        """The Result of a job that ended well, else empty."""
        found = self.done(job)
        return found.result if found else {}

    def attempts(self, job: str = "") -> tuple[JobRun, ...]:
        """Every run of a job, or of all jobs, with those that a later one for the same date followed: what a night cost."""
        return tuple(one for run in self.runs if job in ("", run.job) for one in (*run.earlier, run))

    def total(self, job: str, figure: str) -> float:
        """A figure summed over a job's shards and attempts."""
        return sum(as_number(run.result.get(figure)) for run in self.attempts(job))


def fits(shape: TypeAdapter[Any], value: object) -> bool:
    """Whether a value has a shape."""
    try:
        shape.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def as_number(value: object) -> float:
    """A figure of a manifest; 0 for none, and for what is no figure."""
    return float(value) if isinstance(value, int | float) and abs(value) < 2**63 else 0.0


def runs_so_far(manifest: Path) -> list[dict[str, Any]]:
    """Runs that a manifest, about to be replaced, tells of: their end, time and what they did, oldest first; of many the last."""
    try:
        known = json.loads(manifest.read_text())
        own = {name: known[name] for name in ("status", "started_at", "seconds")}
        result = known.get("result") or {}
        own["result"] = {name: result[name] for name in KEPT if name in result}
        return [*known.get("earlier", []), own][-ATTEMPTS:]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def read_night(lake: Path, ds: str) -> Night:
    """The manifests of a date, each as far as it can be read."""
    runs, unreadable = list[JobRun](), list[str]()
    for path in sorted((lake / "manifests" / f"ds={ds}").glob("*.json")):
        job = path.stem.split("-")[0]
        if job not in PATH:
            continue
        try:
            manifest = json.loads(path.read_text())
        except (OSError, ValueError):
            manifest = None
        if isinstance(manifest, Mapping):
            runs.append(JobRun(name=path.stem, job=job, manifest=manifest))
        else:
            unreadable.append(path.name)
    runs.sort(key=lambda run: (PATH.index(run.job), run.name))
    return Night(ds=ds, runs=tuple(runs), unreadable=tuple(unreadable))


def nights_before(lake: Path, ds: str, most: int) -> list[Night]:
    """The last nights before a date, oldest first."""
    dates = sorted(path.name.removeprefix("ds=") for path in (lake / "manifests").glob("ds=*") if path.name < f"ds={ds}")
    return [read_night(lake, date) for date in dates[-most:]] if most else []


# ----------------------------------------------------------------------------------------------------------------- events


def events(night: Night, namespace: str) -> Iterator[dict[str, Any]]:
    """A START and a COMPLETE or FAIL event for each run; equal manifests give equal events."""
    for run in night.runs:
        begun = started(night, run)
        # a manifest that counts a million years is no reason for none of the events
        ended = (dt.datetime.fromisoformat(begun) + dt.timedelta(seconds=min(max(run.seconds, 0), 1e9))).isoformat()
        common: dict[str, Any] = {
            "run": {"runId": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{namespace}/{night.ds}/{run.name}/{begun}")), "facets": {}},
            "job": {"namespace": namespace, "name": run.job},
            "producer": PRODUCER,
            "schemaURL": EVENT,
        }
        facets = run_facets(night, run)
        read = datasets(run.result.get("inputs"), namespace, {})
        written = datasets(run.result.get("outputs"), namespace, run.result.get("rows") or {})
        yield {**common, "eventType": "START", "eventTime": begun, "inputs": read, "outputs": []}
        yield {
            **common,
            "run": {**common["run"], "facets": facets},
            "eventType": "COMPLETE" if run.status == "done" else "FAIL",
            "eventTime": ended,
            "inputs": read,
            "outputs": written,
        }


def started(night: Night, run: JobRun) -> str:
    """When a run began; the night's first moment where it does not tell."""
    try:
        begun = dt.datetime.fromisoformat(run.manifest["started_at"])
        return (begun if begun.tzinfo else begun.replace(tzinfo=dt.UTC)).isoformat()
    except (KeyError, TypeError, ValueError):
        return f"{night.ds}T00:00:00+00:00"


def run_facets(night: Night, run: JobRun) -> dict[str, Any]:
    """The night's date, the code, and the error where there is one."""
    nominal = {"nominalStartTime": f"{night.ds}T00:00:00Z"}
    found = {"nominalTime": facet("1-0-1/NominalTimeRunFacet", nominal)}
    if run.manifest.get("error"):
        error = {"message": str(run.manifest["error"]), "programmingLanguage": "python"}
        found["errorMessage"] = facet("1-0-1/ErrorMessageRunFacet", error)
    known = {"codeRevision": run.manifest.get("code_revision", ""), "recipeSha256": run.manifest.get("recipe_sha256", "")}
    # custom facets carry a prefix, as the specification asks
    return {**found, "llmemb_manifest": {"_producer": PRODUCER, "_schemaURL": f"{PRODUCER}:manifest", **known}}


def datasets(digests: object, namespace: str, rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Data sets of a Result's inputs or outputs; empty digests (no champion yet) are left out.

    A table has one name, whoever reads or writes it, so that a lineage graph hangs together; its partition is in the version.
    """
    found = []
    for name, digest in (digests if isinstance(digests, Mapping) else {}).items():
        if not digest:
            continue
        facets = {"version": facet("1-0-1/DatasetVersionDatasetFacet", {"datasetVersion": str(digest)})}
        table = str(name).partition("/")[0]
        one = {"namespace": namespace, "name": table, "facets": facets}
        if isinstance(rows.get(table), int) and rows[table] >= 0:
            counted = facet("1-0-2/OutputStatisticsOutputDatasetFacet", {"rowCount": rows[table]})
            one["outputFacets"] = {"outputStatistics": counted}
        found.append(one)
    return found


def facet(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A facet of the specification."""
    version, _, name = kind.partition("/")
    return {"_producer": PRODUCER, "_schemaURL": f"{FACETS}/{version}/{name}.json#/$defs/{name}", **values}


def send(found: Sequence[Mapping[str, Any]], url: str, timeout_s: float = 5.0) -> int:
    """Posts events to an OpenLineage endpoint, in order; returns how many it took. Raises OSError at the first it does not."""
    for event in found:
        request = urllib.request.Request(url, json.dumps(event).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s):
            pass
    return len(found)
