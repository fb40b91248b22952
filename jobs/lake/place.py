"""Where a lake is: a folder; or the folder of this machine in which a lake on an object store is worked on."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)")
"""An address; a `Path` leaves one of its two slashes."""
KNOWN = ("s3", "gs", "az")
MARK = ".store"
"""The file of such a folder that names the address."""


def place(said: Path) -> Path:
    """The folder in which a lake is worked on: itself, or of an address a scratch folder of this machine (LLMEMB_SCRATCH).

    Raises ValueError for an address of an unknown kind: a folder of that name would be made without a word.
    """
    if (written := SCHEME.fullmatch(str(said))) is None:
        return said
    kind, rest = written[1].lower(), written[2].strip("/")
    if kind not in KNOWN or not rest:
        raise ValueError(
            f"run.lake {written[1]}://{written[2]}: give a folder, or a bucket as {', '.join(f'{one}://' for one in KNOWN)} and "
            f"then BUCKET/PREFIX; {written[1]}:// is none of these (a mount of it is a folder)"
        )
    address = f"{kind}://{rest}"
    home = os.environ.get("LLMEMB_SCRATCH") or Path(os.environ.get("LLMEMB_CACHE") or Path.home() / ".cache" / "llmemb", "lakes")
    name = f"{re.sub('[^A-Za-z0-9.]+', '-', address)[:60]}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    folder = Path(home).absolute() / name
    if not (folder / MARK).exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{MARK}.{uuid.uuid4().hex[:8]}"
        aside.write_text(address)
        aside.replace(folder / MARK)
    return folder
