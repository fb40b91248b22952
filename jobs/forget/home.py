"""Where `forget` works: the lake's folder; or a copy of a lake on an object store, of which what it changed is put back.

It reads every file anyway. The copy lies in the scratch folder and goes at the end: this machine needs room for the lake.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jobs.lake import store as stores
from jobs.lake.remote import COMMIT
from jobs.run import Unavailable

COPIES = ("indexes", "reports", ".staging")
"""What a scratch folder keeps of things that may name an item; of manifests it keeps what the store has."""
LOCKS = "locks/"
Signature = tuple[int, int]


class Home:
    """A lake's files on this machine."""

    def __init__(self, path: Path, store: stores.Store | None = None) -> None:
        self.path, self.store = path, store
        self.known: dict[str, tuple[str, Signature]] = {}
        """Key -> its tag in the store, and the file as it was brought."""

    def refresh(self) -> None:
        """Makes the copy what the store holds now. A folder needs none."""
        if self.store is None:
            return
        there = {str(one["path"]): one for one in self.store.listed("") if not str(one["path"]).startswith(LOCKS)}
        for key in self.here().keys() - there.keys():
            (self.path / key).unlink()
        files = self.here()
        stale = [key for key, one in there.items() if self.known.get(key, ("", None)) != (stores.tag_of(one), files.get(key))]
        self.store.fetch([(key, self.path / key) for key in stale])
        now = self.here()
        self.known = {key: (stores.tag_of(one), now[key]) for key, one in there.items()}

    def here(self) -> dict[str, Signature]:
        """The files of the copy, but for its locks: those of a folder are none of a bucket."""
        files = {path.relative_to(self.path).as_posix(): path.stat() for path in self.path.rglob("*") if path.is_file()}
        return {key: (known.st_mtime_ns, known.st_size) for key, known in files.items() if not key.startswith(LOCKS)}

    def put_back(self) -> None:
        """Puts what changed, parts before the commits that name them, and removes what went. A folder needs none.

        Raises Unavailable where another writer has committed a partition since it was brought.
        """
        if self.store is None:
            return
        now = self.here()
        changed = sorted(key for key, signature in now.items() if self.known.get(key, ("", None))[1] != signature)
        commits = [key for key in changed if key.endswith(f"/{COMMIT}")]
        self.store.put_files([(key, self.path / key) for key in changed if key not in commits])
        for key in commits:
            try:
                self.store.put_if(key, (self.path / key).read_bytes(), self.known[key][0] if key in self.known else None)
            except stores.Conflict as error:
                raise Unavailable(f"{key}: another writer committed it meanwhile; run forget again") from error
        gone = self.known.keys() - now.keys()
        self.store.delete(sorted(gone))
        for key in (*gone, *changed):
            if key.startswith("manifests/"):
                (self.path.parent / key).unlink(missing_ok=True)


@contextlib.contextmanager
def home_of(lake: Path) -> Iterator[Home]:
    """The lake's files on this machine; a copy goes at the end, with all that this machine's scratch folder keeps of it."""
    if (store := stores.of(lake)) is None:
        yield Home(lake)
        return
    with tempfile.TemporaryDirectory(prefix=".forget-", dir=lake) as aside:
        home = Home(Path(aside), store)
        home.refresh()
        yield home
    for name in COPIES:
        shutil.rmtree(lake / name, ignore_errors=True)
