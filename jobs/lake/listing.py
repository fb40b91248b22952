"""What lies in a folder or an object store: keys, bytes and ages; and how it is removed, so that no reader sees half of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.lake import partitions, remote
from jobs.lake import store as stores
from jobs.lake.store import Store


@dataclass(frozen=True)
class File:
    """A file or an object."""

    size: int
    age_s: float
    """Seconds since it was written, or put."""


@dataclass(frozen=True)
class Home:
    """All files of a partition, or what else goes as one: by their keys."""

    files: Mapping[str, File]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(file.size for file in self.files.values())

    @property
    def is_committed(self) -> bool:
        """Whether a commit names its files."""
        return any(key.endswith(f"/{partitions.COMMIT}") for key in self.files)

    @property
    def age_s(self) -> float:
        """Seconds since the newest commit, or, where there is none, since the newest file was written."""
        commits = [file.age_s for key, file in self.files.items() if key.endswith(f"/{partitions.COMMIT}")]
        return min(commits or [file.age_s for file in self.files.values()])

    @property
    def untouched_s(self) -> float:
        """Seconds since any of its files was written."""
        return min(file.age_s for file in self.files.values())

    def is_still(self, listed: Home) -> bool:
        """Whether these are the files that were listed before, none written again since."""
        was = listed.files
        return self.files.keys() == was.keys() and all(file.age_s >= was[key].age_s for key, file in self.files.items())


@dataclass(frozen=True)
class Place:
    """A folder of this machine, or an object store."""

    root: Path
    store: Store | None = None

    @classmethod
    def of(cls, lake: Path) -> Place:
        """Where a lake's tables lie."""
        return cls(lake, stores.of(lake))

    @classmethod
    def at(cls, address: str) -> Place:
        """A folder, or an address of an object store."""
        return cls(Path(), Store(address)) if "://" in address else cls(Path(address))

    def files(self, prefix: str) -> dict[str, File]:
        """Files below a prefix by key, in order; a folder without any counts as one of no bytes."""
        if self.store is not None:
            return {str(one["path"]): File(int(one["size"]), remote.age_s(one)) for one in self.store.listed(prefix)}
        found, now = dict[str, File](), time.time()
        for folder, below, names in os.walk(self.root / prefix):
            for path in [Path(folder, name) for name in names] or ([] if below else [Path(folder)]):
                with contextlib.suppress(FileNotFoundError):  # a job at work has moved it since
                    known = path.stat()
                    key = path.relative_to(self.root).as_posix()
                    found[key] = File(0 if path.is_dir() else known.st_size, now - known.st_mtime)
        return dict(sorted(found.items()))

    def homes(self, prefix: str, last: str) -> dict[str, Home]:
        """What lies below a prefix, by the folder `last…` (`ds=`, `encoder=`) that it is in; files in none are left out."""
        found = defaultdict[str, dict[str, File]](dict)
        for key, file in self.files(prefix).items():
            parts = key.split("/")
            depth = next((number for number, part in enumerate(parts, 1) if part.startswith(last)), 0)
            if depth:
                found["/".join(parts[:depth])][key] = file
        return {home: Home(files) for home, files in found.items()}

    def home(self, name: str) -> Home:
        """What lies there now: the files of a folder, or the one file of this name; none where it is gone."""
        found = self.files(name) or self.files(name.rpartition("/")[0])
        return Home({key: file for key, file in found.items() if key == name or key.startswith(f"{name}/")})

    def remove(self, name: str, keys: Sequence[str]) -> None:
        """Removes a file or folder with these keys: first the commits that name its files."""
        commits = [key for key in keys if key.endswith(f"/{partitions.COMMIT}")]
        if self.store is not None:
            for key in (*commits, *(key for key in keys if key not in commits)):
                self.store.delete([key])
        elif (self.root / name).is_dir():
            for key in commits:
                (self.root / key).unlink(missing_ok=True)
                partitions.sync((self.root / key).parent)
            shutil.rmtree(self.root / name)
        else:
            (self.root / name).unlink(missing_ok=True)
