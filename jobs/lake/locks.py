"""One at a time: locks of the lake that end with the process that holds them."""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.lake import leases
from jobs.lake import store as stores
from jobs.run import Unavailable

log = logging.getLogger(__name__)


@contextmanager
def alone(lake: Path, what: str, wait_s: float = math.inf) -> Iterator[None]:
    """Holds the lake's lock `what` meanwhile; another process that wants it waits, `wait_s` at most.

    The kernel lets a lock go when its process ends, however it ends. On a network file system it needs one that passes `flock` on
    (NFS 4, CephFS, EFS). On an object store it is a lease (leases.py). Raises Unavailable that names who holds it.
    """
    if store := stores.of(lake):
        with leases.hold(store, what, wait_s):
            yield
        return
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


@contextmanager
def at_work(lake: Path, job: str) -> Iterator[None]:
    """Shows meanwhile that a job is at work on the lake; whoever must not miss what it writes waits by `others_ended`."""
    if store := stores.of(lake):
        with leases.at_work(store, job):
            yield
        return
    path = lake / "locks" / f"at-work-{job}-{uuid.uuid4().hex}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}")
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def others_ended(lake: Path, wait_s: float) -> bool:
    """Returns once all jobs ended that were at work when it was called, killed ones too; whether there were any that lived.

    Later ones may be at work by then: they have seen all that was in the lake before. Raises Unavailable once `wait_s` are over.
    """
    if store := stores.of(lake):
        return leases.others_ended(store, wait_s)
    began, lived = time.monotonic(), False
    for path in sorted((lake / "locks").glob("at-work-*.lock")):
        with contextlib.suppress(FileNotFoundError), path.open("a") as lock:
            job = path.name.removeprefix("at-work-").rpartition("-")[0]
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lived = True
                wait_for(lock.fileno(), path, job, max(0.0, began + wait_s - time.monotonic()))
            path.unlink(missing_ok=True)
    return lived


def wait_for(lock: int, path: Path, what: str, wait_s: float) -> None:
    """Takes a lock that `path` tells the holder of. Raises Unavailable once `wait_s` are over."""
    began, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (path.read_text() if path.exists() else "") or "another process"
        if time.monotonic() - began >= wait_s:
            raise Unavailable(f"{what} is under way already ({holder}): run again when that has ended")
        if not told:
            log.info("waiting for %s: %s is at it", what, holder)
        told = True
        time.sleep(0.1)
