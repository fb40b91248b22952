"""Where a lake is: a folder."""

from __future__ import annotations

import re
from pathlib import Path

from jobs.run import InputError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)")
"""An address; a `Path` leaves one of its two slashes."""


def place(said: Path) -> Path:
    """The folder of a lake. Raises InputError for an address: a folder of that name would be made without a word."""
    if (address := SCHEME.fullmatch(str(said))) is None:
        return said
    raise InputError(
        f"run.lake {address[1]}://{address[2]}: a lake is a folder, and {address[1]}:// is none: name a folder, on a file system "
        "that all machines share where there are several"
    )
