"""A disk whose power is cut: bytes of a file count only once the file was synced, names in a folder only once the folder was.

At every call that changes or syncs something, many disks are made that a power cut could leave then, and each is looked at.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Names = dict[str, int]
"""What a folder holds: names and inodes."""


class Disk:
    """What of a lake would outlive a power cut: bytes of synced files, names of synced folders."""

    def __init__(self, lake: Path) -> None:
        self.lake = lake
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, Names] = {}
        self.instants: list[Callable[[], None]] = []
        for path in [lake, *lake.rglob("*")]:
            self.keep(path)

    def keep(self, path: Path) -> None:
        """A file or folder is synced."""
        inode = path.stat().st_ino
        if path.is_dir():
            self.names[inode] = {child.name: child.stat().st_ino for child in path.iterdir()}
        else:
            self.bytes[inode] = path.read_bytes()

    def known(self) -> dict[int, Path]:
        """Every folder of the lake as it is now, by inode."""
        return {path.stat().st_ino: path for path in [self.lake, *self.lake.rglob("*")] if path.is_dir()}

    def cut(self, home: Path, draw: Callable[[], bool]) -> Path:
        """A lake that a power cut could leave now: of each name changed since its folder was synced, the old or the new."""
        shutil.rmtree(home, ignore_errors=True)
        folders = self.known()

        def grow(inode: int, target: Path) -> None:
            target.mkdir(parents=True)
            old = self.names.get(inode, {})
            now = {child.name: child.stat().st_ino for child in folders[inode].iterdir()} if inode in folders else old
            for name in sorted(old.keys() | now.keys()):
                child = now.get(name) if old.get(name) == now.get(name) or draw() else old.get(name)
                if child is None:
                    continue
                if child in self.names or child in folders:
                    grow(child, target / name)
                else:
                    (target / name).write_bytes(self.bytes.get(child, b""))

        grow(self.lake.stat().st_ino, home)
        return home


Cuts = Callable[[Callable[[], Any], Callable[[Path], None]], int]


@pytest.fixture
def cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any], Callable[[Path], None]], int]:
    """Runs a program, cuts the power around each of its calls, checks every lake that is left; gives the number of instants."""

    def run(program: Callable[[], Any], check: Callable[[Path], None]) -> int:
        lake, instants = tmp_path / "lake", 0
        lake.mkdir(exist_ok=True)
        disk, draw = Disk(lake), random.Random(0)

        def power_cut() -> None:
            nonlocal instants
            instants += 1
            for chance in (0.0, 1.0, *[0.5] * 6):
                check(disk.cut(tmp_path / "after", lambda chance=chance: draw.random() < chance))  # type: ignore[misc]

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink", "mkdir", "fsync"):
                patch.setattr(os, name, watched(disk, getattr(os, name), name, power_cut))
            program()
        # what was said to be written is there, even if nothing that was left unsynced is
        check(disk.cut(tmp_path / "after", lambda: False))
        return instants

    return run


def watched(disk: Disk, call: Callable[..., Any], name: str, power_cut: Callable[[], None]) -> Callable[..., Any]:
    """A call of the operating system with a power cut before and after it."""
    busy = [False]

    def wrapped(*words: Any, **more: Any) -> Any:
        place = Path(f"/proc/self/fd/{words[0]}").readlink() if name == "fsync" else Path(words[0])
        if busy[0] or disk.lake not in (place, *place.parents):
            return call(*words, **more)
        busy[0] = True
        try:
            power_cut()
            done = call(*words, **more)
            if name == "fsync":
                disk.keep(place)
            power_cut()
        finally:
            busy[0] = False
        return done

    return wrapped
