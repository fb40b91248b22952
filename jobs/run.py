"""What a job is made of: the run that all jobs of a night share, what each returns, and how it says no."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from jobs.lake.place import place
from jobs.redaction import without_secrets


class InputError(ValueError):
    """The recipe or its input is at fault: the message names the value and the remedy (exit status 2)."""


class Refused(Exception):
    """A gate refused the result; the message says which and by how much (exit status 3)."""


class Older(Refused):
    """What serves is newer than ds (exit status 5): a backfill fills the lake and leaves what serves."""


class Unavailable(ConnectionError):
    """Something else is at it, or a service is down: the same run may do later (exit status 4, which the scheduler repeats)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all jobs of one night share: the recipe's `[run]` table and the date of the command line."""

    ds: str
    """Date of the snapshot, YYYY-MM-DD: the night works on what was true at its end (UTC)."""
    lake: Path
    """Folder of the lake, or `s3://BUCKET/PREFIX`; tables, models and manifests lie under it."""
    tracking_uri: str = ""
    """MLflow tracking and registry; empty leaves both out (GPU workers without MLflow)."""
    experiment: str = "llmemb"
    """MLflow's experiment, under which all runs stand."""
    device: str = "auto"
    """`auto` takes the GPU where there is one; or `cpu`, `cuda`, `cuda:1`."""
    variant: str = ""
    """Name of an experiment. `latest` in a run without one never means its encoders, teachers, recommenders or evaluations; a run
    of the same name takes those first, and the nights' own where it has none."""
    seed: int = 42
    """Every random draw follows from it: the same seed, data and machine give the same numbers."""
    exclude_seen: bool = True
    """Whether serving leaves out what a user has had. Validation, early stopping, the weights of parts, the gates and `recommend`
    rank alike; turn it off where repeats are what is wanted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lake", place(self.lake))
        try:
            dt.date.fromisoformat(self.ds)
        except ValueError as error:
            raise InputError(f"--ds {self.ds!r} is not a date: write it as YYYY-MM-DD") from error
        if self.variant and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", self.variant):
            raise InputError(f"run.variant {self.variant!r}: write it in up to 64 letters, digits, dots, dashes and underscores")


class Result(Protocol):
    """What every job's frozen `Result` dataclass holds beside its own figures."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digest of each thing read, by name."""

    @property
    def outputs(self) -> Mapping[str, str]:
        """Digest of each thing written, by name."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Row counts of the tables written."""


@cache
def code_revision() -> str:
    """The git revision of this code (with `-dirty` if changed), or LLMEMB_REVISION where there is no checkout."""
    if revision := os.environ.get("LLMEMB_REVISION"):
        return revision
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def as_json(value: object) -> Any:
    """A dataclass, path or mapping as plain JSON values, without secrets: it is kept in manifests, MLflow and logs."""
    return without_secrets(plain(value))


def plain(value: object) -> Any:
    """A dataclass, path or mapping as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
