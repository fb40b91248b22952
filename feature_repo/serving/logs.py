"""The serving process's logs, on standard error: a line of text each, or with LLMEMB_LOG=json one JSON object, as the jobs' are.

The fields of an object are those of `jobs/logs.py`, which this process may not import; a test holds them together.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import os

from feature_repo.serving.redaction import redacted

ROOT = "llmemb"
"""Loggers of ours begin with it; others are heard from warnings on."""


def start() -> None:
    """Sends our lines from INFO on, and the libraries' warnings, to standard error. A second call replaces the first."""
    root, handler = logging.getLogger(), logging.StreamHandler()
    for before in [known for known in root.handlers if isinstance(known.formatter, Json | Text)]:
        root.removeHandler(before)
    handler.setFormatter(Json() if os.environ.get("LLMEMB_LOG") == "json" else Text())
    root.addHandler(handler)
    logging.getLogger(ROOT).setLevel(logging.INFO)


class Text(logging.Formatter):
    """`01:02:03 INFO    llmemb.serving: text`, in UTC."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line = f"{moment(record):%H:%M:%S} {record.levelname:<7} {record.name}: {record.getMessage()}"
        return redacted(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


class Json(logging.Formatter):
    """A JSON object of time, level, logger and message."""

    def format(self, record: logging.LogRecord) -> str:
        """The JSON line of a record."""
        shown = {
            "time": moment(record).isoformat(timespec="milliseconds"), "level": record.levelname, "logger": record.name,
            "message": redacted(record.getMessage()),
        }  # fmt: skip
        if record.exc_info:
            shown["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(shown, sort_keys=True)


def moment(record: logging.LogRecord) -> dt.datetime:
    """When a record was made, UTC."""
    return dt.datetime.fromtimestamp(record.created, dt.UTC)
