"""Locks of a lake on an object store: leases. An object says who holds it; who dies stops renewing it, and another takes it.

Each holder takes the next number (the fencing token). A holder that slept too long finds another number there: it may think that
it works alone, but it commits nothing (`check`), and a commit that is under way already fails, as it is put on the condition
that nobody committed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from jobs.lake.store import Conflict, Found, Store
from jobs.run import Unavailable

log = logging.getLogger(__name__)
LEASE_S = 60.0
"""How long a lease outlives its last renewal, by the store's clock and that of who asks."""
RENEWED = 4
"""Renewals in that time."""
ASKED_S = 2.0
"""Between two looks at a lease that another holds."""
AT_WORK = "locks/at-work"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """What the object of a lease says."""

    holder: str
    """Empty where nobody holds it."""
    machine: str
    process: int
    began: str
    """When that process was started, as its machine counts: numbers of processes come again."""
    token: int
    renewal: int

    @classmethod
    def mine(cls, token: int) -> Lease:
        """A lease of this process."""
        holder = f"{uuid.uuid4().hex} process {os.getpid()} on {socket.gethostname()}"
        return cls(holder=holder, machine=machine(), process=os.getpid(), began=began(os.getpid()), token=token, renewal=0)

    def data(self) -> bytes:
        """As it is put."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()

    def dead(self, found: Found) -> bool:
        """Whether nobody holds it any more: let go, not renewed for too long, or of a process of this machine that has ended."""
        if not self.holder or found.age_s > LEASE_S:
            return True
        return self.machine == machine() and began(self.process) != self.began


def machine() -> str:
    """This machine since its start, and which processes it sees: a container sees its own alone."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    if not boot.exists():
        return f"{socket.gethostname()} {uuid.getnode()}"
    return f"{boot.read_text().strip()} {space.readlink() if space.exists() else ''}"


def began(process: int) -> str:
    """When a process of this machine was started; "" where it has ended or nothing tells."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


class Held:
    """A lease of this process, renewed until it is let go."""

    def __init__(self, store: Store, key: str, lease: Lease, tag: str) -> None:
        self.store, self.key, self.lease, self.tag = store, key, lease, tag
        self.renewed, self.lost = time.monotonic(), ""
        self.over = threading.Event()
        self.renewer = threading.Thread(target=self.renew, daemon=True)
        self.renewer.start()

    def renew(self) -> None:
        """Puts the lease anew, again and again; says why where it is lost."""
        while not self.over.wait(LEASE_S / RENEWED):
            again = dataclasses.replace(self.lease, renewal=self.lease.renewal + 1)
            asked = time.monotonic()
            try:
                self.tag, self.lease, self.renewed = self.store.put_if(self.key, again.data(), self.tag), again, asked
            except Conflict:
                self.lost = "another one took it"
                return
            except Exception as error:  # the store is away: the lease holds as long as it said
                log.warning("the lease %s could not be renewed: %s", self.key, error)

    def refuse_lost(self) -> None:
        """Raises Unavailable where the lease has ended meanwhile.

        The object itself is asked: clocks of machines differ, and a store tells an object's age in whole seconds.
        """
        why = self.lost or ("it was not renewed in time" if time.monotonic() - self.renewed > LEASE_S else "")
        now = None if why else read(self.store.get(self.key))
        if not why and (now is None or (now.token, now.holder) != (self.lease.token, self.lease.holder)):
            why = "another one took it"
        if why:
            raise Unavailable(f"{self.store.address}/{self.key} was lost ({why}): nothing is committed; run again")

    def let_go(self) -> None:
        """Lets others take it at once; its number stays."""
        self.over.set()
        self.renewer.join()
        with contextlib.suppress(Unavailable):  # it ends by itself
            if self.key.startswith(AT_WORK):
                self.store.delete([self.key])
            else:
                self.store.put_if(self.key, dataclasses.replace(self.lease, holder="").data(), self.tag)


HELD: list[Held] = []
"""Leases of this process."""


def check(store: Store) -> None:
    """Raises Unavailable where this process has lost a lease of the lake: another one may be at its work already."""
    for held in HELD:
        if held.store.address == store.address:
            held.refuse_lost()


@contextlib.contextmanager
def hold(store: Store, what: str, wait_s: float) -> Iterator[None]:
    """Holds the lease `what`. Raises Unavailable that names who holds it, once `wait_s` are over."""
    key, end, told = f"locks/{what}.json", time.monotonic() + wait_s, False
    while (held := take(store, key)) is None:
        holder = holder_of(store.get(key))
        if time.monotonic() >= end:
            raise Unavailable(f"{what} is under way already ({holder}): run again when that has ended")
        if not told:
            log.info("waiting for %s: %s is at it", what, holder)
        told = True
        time.sleep(min(ASKED_S, max(0.05, end - time.monotonic())))
    with kept(held):
        yield


@contextlib.contextmanager
def kept(held: Held) -> Iterator[None]:
    """A lease among those of this process meanwhile."""
    HELD.append(held)
    try:
        yield
    finally:
        HELD.remove(held)
        held.let_go()


def take(store: Store, key: str) -> Held | None:
    """The lease, where nobody holds it."""
    found = store.get(key)
    before = read(found)
    if found is not None and before is not None and not before.dead(found):
        return None
    lease = Lease.mine((before.token if before else 0) + 1)
    try:
        return Held(store, key, lease, store.put_if(key, lease.data(), found.tag if found else None))
    except Conflict:
        return None


def read(found: Found | None) -> Lease | None:
    """What a lease says; None where there is none."""
    return Lease(**json.loads(found.data)) if found else None


def holder_of(found: Found | None) -> str:
    """Who holds a lease, for a person."""
    lease = read(found)
    return lease.holder.partition(" ")[2] if lease and lease.holder else "another process"


def at_work(store: Store, job: str) -> contextlib.AbstractContextManager[None]:
    """Shows meanwhile that a job is at work."""
    lease = Lease.mine(1)
    key = f"{AT_WORK}/{job}-{uuid.uuid4().hex}.json"
    return kept(Held(store, key, lease, store.put_if(key, lease.data(), None)))


def others_ended(store: Store, wait_s: float) -> bool:
    """As `locks.others_ended`."""
    end, lived = time.monotonic() + wait_s, False
    for one in store.listed(AT_WORK):
        key = str(one["path"])
        while (found := store.get(key)) is not None and (lease := read(found)) is not None and not lease.dead(found):
            lived = True
            if time.monotonic() >= end:
                job = Path(key).stem.rpartition("-")[0]
                raise Unavailable(f"{job} is under way already ({holder_of(found)}): run again when that has ended")
            time.sleep(min(ASKED_S, max(0.05, end - time.monotonic())))
        store.delete([key])
    return lived
