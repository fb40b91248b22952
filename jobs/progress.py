"""Progress of long work: a bar on a terminal, elsewhere a log line at once and then every few seconds, with an estimate."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

from jobs import logs

EVERY_S = 8.0
"""Seconds between two lines: nobody waits longer than ten for a sign of life."""


class Progress:
    """Counts `total` units of work; a context manager. With `rounds`, work past the total begins anew."""

    def __init__(self, log: logging.Logger, what: str, total: int, unit: str = "texts", *, rounds: bool = False) -> None:
        self.log, self.what, self.total, self.unit, self.rounds = log, what, max(total, 1), unit, rounds
        self.done = 0
        self.bar: Any = None
        self.began = self.last = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Says what begins. `add` does it where nobody did."""
        self.done, self.began = 0, time.monotonic()
        self.last = self.began
        if on_terminal():
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc=self.what, unit=f" {self.unit}", file=sys.stderr, leave=False)
        else:
            self.log.info("%s: %s %s", self.what, f"{self.total:,}", self.unit)

    def add(self, count: int, note: str = "") -> None:
        """Some units are done; a `note` stands behind the estimate."""
        if not self.began:
            self.start()
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
            self.bar.set_postfix_str(note, refresh=False)
        elif time.monotonic() - self.last >= EVERY_S:
            self.last = time.monotonic()
            self.log.info("%s: %s%s", self.what, self.where(), f"  {note}" if note else "")
        if self.rounds and self.done >= self.total:
            self.close()

    def where(self) -> str:
        """Units done, and the seconds that the others will take at the same speed."""
        left = (self.total - self.done) * (time.monotonic() - self.began) / max(self.done, 1)
        return f"{self.done:,} of {self.total:,} {self.unit}, {max(left, 0):,.0f} s to go"

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()
        self.bar, self.began = None, 0.0


def on_terminal() -> bool:
    """Whether a person looks on: then a bar moves where a log would fill up."""
    return sys.stderr.isatty() and not logs.as_json()
