"""Machines of a cluster by Linux's namespaces: each with its own processes, name, and the one folder that it may write."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", *(["--map-root-user"] if os.geteuid() else []), "--mount", "--pid", "--uts", "--fork", "--kill-child",
           "--mount-proc"]  # fmt: skip
START = """
set -eu
hostname "$1"
at="$3" checkout="$4"
exec 3<"$2" 4<"$checkout"
for place in /dev/shm /tmp /var/tmp "$(dirname "$at")"; do
  mkdir -p "$place" && mount -t tmpfs machine "$place"
done
mkdir -p "$at" && mount --no-canonicalize --bind /proc/self/fd/3 "$at"
if [ ! -e "$checkout" ]; then  # it lay below one of these
  mkdir -p "$checkout" && mount --no-canonicalize --bind /proc/self/fd/4 "$checkout" && mount -o remount,bind,ro "$checkout"
fi
exec 3<&- 4<&-
{ cat /etc/hosts; echo "127.0.0.1 $1"; } > /tmp/hosts && mount --bind /tmp/hosts /etc/hosts
mount -o remount,bind,ro / && mount -o remount,bind,ro /dev
cd "$at" && shift 4
exec "$@"
"""
"""NAME OWN AT CHECKOUT COMMAND...: the folder OWN lies at AT; what else programs write to is its memory, or read-only."""


class Machine:
    """A machine that runs one command. It falls whole: whatever its processes started ends too, in whatever session that is."""

    def __init__(self, name: str, own: Path, at: Path, environment: dict[str, str], *command: str) -> None:
        self.name, self.log = name, own.parent / f"{own.name}.log"
        with self.log.open("w") as log:
            line = [*UNSHARE, "sh", "-c", START, "machine", name, str(own), str(at), str(ROOT), *command]
            self.process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)

    def fall(self) -> None:
        """SIGKILL, to all of it at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.fall()


def missing() -> str:
    """Why there can be no machines here; "" where there can: it takes root, and in a container the right to mount."""
    if not shutil.which("unshare"):
        return "unshare is not installed"
    with tempfile.TemporaryDirectory() as folder:
        own, at = Path(folder, "own"), Path(folder, "home", "at")
        own.mkdir()
        tried = f"{sys.executable} -V && touch here && ! touch {ROOT}/here /here"
        with Machine("probe", own, at, dict(os.environ), "sh", "-c", tried) as probe:
            if probe.process.wait(60) or not (own / "here").exists():
                return f"no machines by namespaces: {probe.log.read_text().strip()[-300:]}"
    return ""
