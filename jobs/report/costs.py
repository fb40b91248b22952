"""What nights took and cost: each figure is a function of a night, and None where the night doesn't know it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from jobs.lake.nights import JobRun, Night, as_number

Figure = Callable[[Night], float | None]
PER_THOUSAND = "Device cost per thousand items embedded"
DEVICE_JOBS = ("scft", "embed", "pretrain", "rat", "evaluate")
"""Jobs whose time is paid for as device time."""


def seconds_of(runs: Iterable[JobRun]) -> float:
    """Seconds of runs, and of those of the same night that they followed."""
    return sum(one.seconds for run in runs for one in (*run.earlier, run))


def minutes(night: Night) -> float | None:
    """Minutes of all jobs and their retries; None where nothing ran."""
    return seconds_of(night.runs) / 60 or None


def median_of(figure: Figure, nights: Sequence[Night]) -> float | None:
    """Median over the nights that know the figure."""
    known = [value for night in nights if (value := figure(night)) is not None]
    return statistics.median(known) if known else None


def cost_figures(gpu_hour_price: float) -> dict[str, Figure]:
    """Name -> figure of a night, in the order of the page."""

    def per_thousand(night: Night) -> float | None:
        embedded = night.total("embed", "embedded")
        return seconds_of(night.all("embed")) / 3600 * gpu_hour_price / embedded * 1000 if embedded else None

    return {
        "Embedding, tokens a second": tokens_per_second,
        "Texts embedded": lambda night: int(night.total("embed", "embedded")) if night.all("embed") else None,
        PER_THOUSAND: per_thousand,
        "GPU seconds of all jobs": lambda night: sum(run.seconds for run in night.attempts() if run.on_gpu),
        "Minutes of all jobs": lambda night: minutes(night) or 0.0,
        "Vectors written online": lambda night: int(night.total("publish", "written")) if night.done("publish") else None,
        "Read of up to 500 vectors, median ms": lambda night: night.result("lookup").get("read_ms_p50"),
    }


def tokens_per_second(night: Night) -> float | None:
    """The best of a night's shards and attempts."""
    return max((as_number(run.result.get("tokens_per_second")) for run in night.attempts("embed")), default=0.0) or None


def since_promotion(nights: Sequence[Night], gpu_hour_price: float) -> float | None:
    """Price of the device time from the promotion before the last one to the last one; None without any."""
    places = [place for place, night in enumerate(nights) if night.result("promote").get("decision") == "promoted"]
    if not places:
        return None
    start = places[-2] + 1 if len(places) > 1 else 0
    seconds = sum(run.seconds for night in nights[start : places[-1] + 1] for run in night.attempts() if run.job in DEVICE_JOBS)
    return seconds / 3600 * gpu_hour_price


def churn(group: str) -> Figure:
    """The figure of a group's neighbour churn: the share of nearest neighbours that changed."""

    def of(night: Night) -> float | None:
        value = (night.result("publish").get("churn") or {}).get(group)
        return float(value) if isinstance(value, int | float) else None

    return of
