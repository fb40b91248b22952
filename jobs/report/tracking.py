"""The report as a run of MLflow: the page, the measures, and the night's data sets with their digests."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from jobs.lake.nights import Night
from jobs.run import InputError, Run, Unavailable

log = logging.getLogger(__name__)


def track(run: Run, night: Night, state: str, measures: Mapping[str, float], home: Path) -> None:
    """Logs what lies in `home`. Without MLflow nothing is done; one that is down costs the record, not the report."""
    if not run.tracking_uri:
        return
    from jobs.engines import registry

    figures = {metric_name(name): value for name, value in measures.items()}
    files = [home / name for name in ("report.html", "openlineage.jsonl")]
    try:
        registry.log_run(run, "report", {}, figures, inputs=written(night), tags={"state": state}, files=files)
    except (InputError, Unavailable) as error:
        log.warning("the page is written, but not logged: %s", error)


def metric_name(measure: str) -> str:
    """A measure's name in the letters that MLflow takes."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-. /") else "_" for letter in measure)


def written(night: Night) -> dict[str, str]:
    """Name -> digest of everything that the night's jobs wrote."""
    return {name: str(digest) for run in night.runs for name, digest in run.result.get("outputs", {}).items() if digest}
