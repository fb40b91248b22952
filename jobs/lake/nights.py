"""What ran in a night: the manifests of a date, each value checked, so that a strange manifest costs no more than itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def trained_on(lake: Path, ds: str) -> str:
    """Date of the newest training of an encoder at or before `ds`; "" where none is on record."""
    found = ""
    for path in sorted((lake / "manifests").glob("ds=*/scft.json")):
        date = path.parent.name.removeprefix("ds=")
        try:
            made = json.loads(path.read_text())
            if date <= ds and made["status"] == "done" and made["result"]["due"]:
                found = date
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
