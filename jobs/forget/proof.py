"""What was said of an item, removed; and the proof: every file of the lake is searched for its id, whatever it is called."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from jobs.forget.names import LONG, Ids, batches, ids_on_page, leaves, named, said, values
from jobs.lake.partitions import COMMIT, write_json
from jobs.run import Unavailable

ECHOES = ("lookup", "recommend", "explain")
"""Jobs whose manifests repeat items as their answer."""
TOLD = ("result", "error", "earlier", "inputs", "outputs", "rows")
"""What a manifest tells of a run; the rest is its recipe."""
INSTEAD = "(forgotten)"
RECORD = ("tombstones/", "feast/offline/item_tombstone/")
"""What must go on naming the item, so that it stays away: its tombstones."""
BLOCK = 1 << 22


def forget_answers(lake: Path, ids: Ids) -> int:
    """Removes what was said of the items: answers of serving jobs that named one, and reports; returns how many.

    Any other manifest keeps its figures and loses the id.
    """
    removed = 0
    for path in sorted(lake.glob("manifests/**/*.json")):
        manifest = read(path)
        job = job_of(path, manifest)
        if job in ECHOES and ids & values(path.read_text()):
            path.unlink()
            removed += 1
        elif job != "forget" and names_item(manifest, ids):
            write_json(path, manifest | {key: silenced(manifest[key], ids) for key in TOLD if key in manifest})
    for path in sorted(lake.glob("reports/**/*")):
        if path.is_file() and names(path, ids):
            path.unlink()
            removed += 1
    return removed


def read(path: Path) -> dict[str, Any]:
    """A manifest, empty where it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def job_of(path: Path, manifest: dict[str, Any]) -> str:
    """The job that a manifest is of."""
    return str(manifest.get("job") or path.stem.removeprefix("asked-").split("-")[0])


def names_item(manifest: dict[str, Any], ids: Ids) -> bool:
    """Whether what a manifest tells of its run names an item, as a value or in quotes."""
    texts = [value for key in TOLD for value in leaves(manifest.get(key)) if isinstance(value, str)]
    return any(text in ids or said(text, ids) for text in texts)


def silenced(value: Any, ids: Ids) -> Any:
    """A JSON value whose texts name no item any more."""
    if isinstance(value, dict):
        return {key: silenced(part, ids) for key, part in value.items()}
    if isinstance(value, list):
        return [silenced(part, ids) for part in value]
    if not isinstance(value, str):
        return value
    if value in ids:
        return INSTEAD
    for item in ids:
        for quote in ("'", '"'):
            value = value.replace(f"{quote}{item}{quote}", INSTEAD)
        value = value.replace(item, INSTEAD) if len(item) >= LONG else value
    return value


def mentions(lake: Path, ids: Ids) -> Iterator[str]:
    """Files of the lake that still name an item, each read whole, whatever its name and format.

    Left out: tombstones, and the manifests of `forget`, which are the record of what was asked.
    """
    for path in sorted(lake.rglob("*")):
        name = path.relative_to(lake).as_posix()
        if name.startswith(RECORD) or path.is_symlink() or not path.is_file():
            continue
        if name.startswith("manifests/") and path.suffix == ".json":
            manifest = read(path)
            job = job_of(path, manifest)
            if job != "forget" and (names_item(manifest, ids) or (job in ECHOES and ids & values(path.read_text()))):
                yield name
        elif names(path, ids):
            yield name


def names(path: Path, ids: Ids) -> bool:
    """Whether a file names an item. Short ids are looked for where items stand: bytes that are alike by chance prove nothing."""
    if path.suffix in (".parquet", ".arrow"):
        return any(pc.any(named(batch, ids)).as_py() for batch in batches(path))
    if path.name == COMMIT:
        return False
    if path.suffix == ".html" and ids & ids_on_page(path.read_text()):
        return True
    if path.suffix == ".json":
        return bool(ids & values(path.read_text())) or in_bytes(path, ids)
    if path.suffix == ".jsonl" and any(ids & values(line) for line in path.read_text().splitlines()):
        return True
    if is_database(path):
        return in_rows(path, ids)
    return in_bytes(path, ids)


def in_bytes(path: Path, ids: Ids) -> bool:
    """Whether the bytes of a long id stand in a file, as they are or as JSON writes them; in bounded blocks."""
    wanted = [text.encode() for item in ids if len(item) >= LONG for text in {item, json.dumps(item)[1:-1]}]
    overlap, tail = max(map(len, wanted), default=0), b""
    with path.open("rb") as stream:
        while wanted and (block := stream.read(BLOCK)):
            if any(item in tail + block for item in wanted):
                return True
            tail = (tail + block)[-overlap:]
    return False


def is_database(path: Path) -> bool:
    """Whether a file is of SQLite: a database, or the log beside one.

    SQLite looks itself. A process that opens a database's file by other means and closes it lets go of the locks that its own
    connections hold there (POSIX), and other processes then take the log away under them.
    """
    if path.name.endswith(("-wal", "-shm", "-journal")):
        return True
    try:
        with closing(reading(path)) as database:
            database.execute("PRAGMA schema_version")
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_NOTADB:
            raise
        return False
    return True


def reading(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def in_rows(path: Path, ids: Ids) -> bool:
    """Whether a row of a database has a long id, other than a tombstone; `scrub` has emptied its free pages."""
    wanted = [item.encode() for item in ids if len(item) >= LONG]
    if not wanted or path.name.endswith(("-wal", "-shm", "-journal")):
        return False
    with closing(reading(path)) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            if "tombstone" in table:
                continue
            for row in database.execute(f'SELECT * FROM "{table}"'):
                cells = [cell.encode() if isinstance(cell, str) else cell for cell in row if isinstance(cell, str | bytes)]
                if any(item in cell for cell in cells for item in wanted):
                    return True
    return False


def scrub(lake: Path) -> None:
    """Lets SQLite databases of the lake write themselves anew: rows that were deleted lie in their free pages until then.

    Raises Unavailable where another process keeps one busy.
    """
    for path in sorted(lake.rglob("*.db")):
        if not path.stat().st_size or not is_database(path):
            continue
        try:
            with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as database:
                database.execute("VACUUM")
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.OperationalError as error:
            raise Unavailable(
                f"{path.name} is busy ({error}): free pages may still hold what was deleted; run forget again"
            ) from error
