"""What a report's page tells of: the night, the nights before, measures and views of the vectors."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.lake.nights import Night
from jobs.report.drift import Measure
from jobs.report.views import Views
from jobs.report.weak import Group


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that the page is made from."""

    night: Night
    before: tuple[Night, ...]
    """Earlier nights, oldest first."""
    measures: tuple[Measure, ...]
    views: Views | None
    why_no_views: str
    gpu_hour_price: float
    serving_ds: str
    """Date of the snapshot that serves, as the manifests tell; empty where nothing was published."""
    space_id: str = ""
    """Of the space that serves; empty where it is not known."""
    space_since: str = ""
    """Date of the first snapshot in that space; empty where the lake does not tell."""
    weak: tuple[Group, ...] = ()
    """Groups of users, and how badly they are served; none where nothing was evaluated."""
