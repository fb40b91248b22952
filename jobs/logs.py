"""Logs of the jobs, on standard error: a line of text each, or with LLMEMB_LOG=json one JSON object for log collectors.

A JSON line holds fields of an allow-list alone. The last one of a job tells how it ended, from its manifest: what is not named
here never reaches a log.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from jobs.redaction import redacted

FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "job": str,
    "ds": str,
    "status": str,
    "started_at": str,
    "seconds": (int, float),
    "code_revision": str,
    "recipe_sha256": str,
}
"""Of a manifest: whole values of these types. Errors stay out: their text may quote what was read."""
COUNTS = "rows"
"""Row counts by table, the only nested field."""
ROOT = "jobs"
CHATTY = ("bitsandbytes",)
"""Libraries heard from errors on: this one warns at its import of what only 4 bits on a CPU would need."""
SILENCE_S = 8.0
"""Nobody waits longer than ten seconds for a sign of life."""


def start(job: str = "", ds: str = "") -> None:
    """Sends the jobs' logs from INFO on, and the libraries' warnings, to standard error. A second call replaces the first."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, ToStandardError)]:
        root.removeHandler(handler)
    handler = ToStandardError()
    handler.setFormatter(Json(job, ds) if as_json() else Text())
    root.addHandler(handler)
    logging.getLogger(ROOT).setLevel(logging.INFO)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def as_json() -> bool:
    """Whether logs are for a collector."""
    return os.environ.get("LLMEMB_LOG") == "json"


class ToStandardError(logging.Handler):
    """Writes to what standard error is now, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """One record, in one write: processes of one job share the terminal."""
        try:
            line = self.format(record)
            if "tqdm" in sys.modules and sys.stderr.isatty():
                sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)
            else:
                sys.stderr.write(f"{line}\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)


class SignsOfLife(logging.Handler):
    """A context manager around a job: says that it is at work wherever nothing was logged for SILENCE_S. A bar is a sign too."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.log = logging.getLogger(f"{ROOT}.{job}")
        self.began = self.last = time.monotonic()
        self.ended = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)

    def __enter__(self) -> SignsOfLife:
        logging.getLogger().addHandler(self)
        self.watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.watcher.join()
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Remembers when somebody spoke."""
        self.last = time.monotonic()

    def watch(self) -> None:
        """Speaks where nobody does."""
        while not self.ended.wait(0.5):
            if time.monotonic() - self.last >= SILENCE_S and not bars():
                self.log.info("at work for %.0f s", time.monotonic() - self.began)


def bars() -> bool:
    """Whether a progress bar is on the terminal."""
    return "tqdm" in sys.modules and bool(getattr(sys.modules["tqdm"].tqdm, "_instances", ()))


class Text(logging.Formatter):
    """`01:02:03 INFO    embed: text`, in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record; a text of several lines stays one record."""
        clock = f"{moment(record):%H:%M:%S}"
        line = f"{clock} {record.levelname:<7} {record.name.removeprefix(f'{ROOT}.')}: {record.getMessage()}"
        return redacted(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


class Json(logging.Formatter):
    """A JSON object of time, level, logger, job, ds and message; of a job's end also the allowed fields of its manifest."""

    def __init__(self, job: str, ds: str) -> None:
        super().__init__()
        self.about = {name: value for name, value in (("job", job), ("ds", ds)) if value}

    def format(self, record: logging.LogRecord) -> str:
        """The JSON line of a record."""
        shown = {"time": moment(record).isoformat(timespec="milliseconds"), "level": record.levelname, "logger": record.name}
        message = {"message": redacted(record.getMessage())}
        if record.exc_info:
            message["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps({**shown, **self.about, **message, **allowed(getattr(record, "manifest", {}))}, sort_keys=True)


def moment(record: logging.LogRecord) -> dt.datetime:
    """When a record was made, UTC."""
    return dt.datetime.fromtimestamp(record.created, dt.UTC)


def allowed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a manifest that a log may hold."""
    kept: dict[str, Any] = {name: manifest[name] for name, kind in FIELDS.items() if isinstance(manifest.get(name), kind)}
    counts = manifest.get(COUNTS)
    if isinstance(counts, Mapping):
        kept[COUNTS] = {str(name): count for name, count in counts.items() if isinstance(count, int)}
    return kept
