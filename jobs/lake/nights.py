"""What ran in a night: the manifests of a date, each value checked, so that a strange manifest costs no more than itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from jobs.lake import manifests

PATH = (
    "movielens", "extract", "scft", "embed", "pretrain", "rat", "evaluate", "promote", "project", "publish", "lookup",
    "codes", "bakeoff", "rerank", "generate", "rollback", "collect", "forget",
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
         "later", "carried", "steps", "best_step", "best_epoch", "validation_ndcg", "read_ms_p50", "loss_ratio"),
        TypeAdapter(Number | None),
    ),
    **dict.fromkeys(("space_id", "encoder_id", "serves_ds", "decision", "device", "note"), TypeAdapter(str)),
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
    def began(self) -> str:
        """When it was started, as ISO 8601 in UTC; empty where it does not tell."""
        return str(self.manifest.get("started_at") or "")

    @property
    def earlier(self) -> tuple[JobRun, ...]:
        """Other runs of the same job and date, oldest first: retries, reruns, or the same job in another DAG."""
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

    def named(self, name: str) -> Mapping[str, Any]:
        """The Result of the run with that manifest's name, if it ended well, else empty: `rat-refit` is a `rat` too."""
        return next((run.result for run in self.runs if run.name == name and run.status == "done"), {})

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
    """The manifests of a date, each as far as it can be read; experiments are left out.

    Of a name with several runs the newest that ended well stands for all, for that is what later jobs read; the others are told
    of as attempts. Where none did, the newest does.
    """
    found, unreadable = dict[str, list[Mapping[str, Any]]](), list[str]()
    for path in (of_day := manifests.of_day(lake, ds)):
        if manifests.name_of(path).split("-")[0] not in PATH:
            continue
        manifest = manifests.parsed(path)
        if not manifest:
            unreadable.append(path.name)
        elif not manifests.variant_of(manifest):
            found.setdefault(manifests.name_of(path), [])
    runs = [standing_for(name, [manifests.parsed(path) for path in manifests.named(of_day, name)]) for name in found]
    runs.sort(key=lambda run: (PATH.index(run.job), run.name))
    return Night(ds=ds, runs=tuple(runs), unreadable=tuple(unreadable))


def standing_for(name: str, attempts: Sequence[Mapping[str, Any]]) -> JobRun:
    """The run that later jobs read, with the other attempts of the same name; `attempts` are oldest first."""
    own = [one for one in attempts if one and not manifests.variant_of(one)]
    chosen = next((one for one in reversed(own) if one.get("status") == "done"), own[-1])
    told = chosen.get("earlier")
    others = [*(told if isinstance(told, list) else []), *(one for one in own if one is not chosen)]
    return JobRun(name=name, job=name.split("-")[0], manifest={**chosen, "earlier": others})


def nights_before(lake: Path, ds: str, most: int) -> list[Night]:
    """The last nights before a date, oldest first."""
    dates = [date for date in manifests.days(lake) if date < ds]
    return [read_night(lake, date) for date in dates[-most:]] if most else []


def trained_on(lake: Path, ds: str) -> str:
    """Date of the newest training of an encoder at or before `ds`; "" where none is on record.

    One that the gates refused counts: on the same texts the next one would be no better.
    """
    for path in manifests.history(lake, "scft", ds):
        made = manifests.parsed(path)
        result = made.get("result")
        trained = made.get("status") == "done" and isinstance(result, Mapping) and bool(result.get("due"))
        if (trained or made.get("status") == "refused") and not manifests.variant_of(made):
            return path.parent.name.removeprefix("ds=")
    return ""
