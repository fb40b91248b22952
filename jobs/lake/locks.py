"""One at a time: locks of the lake that end with the process that holds them."""

from __future__ import annotations

import datetime as dt
import fcntl
import logging
import math
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.run import Unavailable

log = logging.getLogger(__name__)


@contextmanager
def alone(lake: Path, what: str, wait_s: float = math.inf) -> Iterator[None]:
    """Holds the lake's lock `what` meanwhile; another process that wants it waits, `wait_s` at most.

    The kernel lets a lock go when its process ends, however it ends. On a network file system it needs one that passes `flock` on
    (NFS 4, CephFS, EFS). Raises Unavailable that names who holds it.
    """
    path = lake / "locks" / f"{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        wait_for(lock.fileno(), path, what, wait_s)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        # by the file that is locked: over NFS, closing another one of the same name would let the lock go
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)


def wait_for(lock: int, path: Path, what: str, wait_s: float) -> None:
    """Takes a lock that `path` tells the holder of. Raises Unavailable once `wait_s` are over."""
    began, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text() or "another process"
        if time.monotonic() - began >= wait_s:
            raise Unavailable(f"{what} is under way already ({holder}): run again when that has ended")
        if not told:
            log.info("waiting for %s: %s is at it", what, holder)
        told = True
        time.sleep(0.1)
