"""A PostgreSQL primary and its standby behind one address: the primary can be killed, and the standby takes over.

What Patroni or a cloud's own does, in a few lines: it promotes, and lets the address name the new primary.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.feature_repo.postgresql import Server, programs
from tests.feature_repo.sentinels import until
from tests.feature_repo.serving.proxy import between

SCHEMA = "standby"


class Node(Server):
    """A server that is looked at and killed as a process of `subprocess` is."""

    @property
    def pid(self) -> int:
        """The first of its processes."""
        return int((self.folder / "data" / "postmaster.pid").read_text().splitlines()[0])

    def poll(self) -> int | None:
        """None while it runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE:
                return None
        return -signal.SIGKILL

    def kill(self) -> None:
        """Ends all its processes at once, as a machine that is lost."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.cwd() == str(self.folder / "data"):
                    process.kill()

    def wait(self) -> None:
        """Returns once none of its processes is left: those that outlive the first one are ended too."""
        until(lambda: self.poll() is not None, "the server is gone")
        self.kill()


class Standbys:
    """The servers; as `sentinels.Failover`, but for who promotes: whoever asks for the master."""

    def __init__(self, home: Path, bin_: Path) -> None:
        self.home, self.bin = home, bin_
        self.promotions = multiprocessing.Value("i", 0)
        first = Node(self.folder(), bin_)
        self.running = {first.port: first}
        self.leader = first.port
        self.stack = contextlib.ExitStack()
        self.proxy = self.stack.enter_context(between(first.port))
        self.mend()

    def folder(self) -> Path:
        """A folder for a server."""
        return Path(tempfile.mkdtemp(dir=self.home))

    @property
    def settings(self) -> str:
        """LLMEMB_ONLINE_STORE."""
        return self.running[self.leader].online(SCHEMA, port=self.proxy.port)

    @property
    def master(self) -> int:
        """The port of who leads; where that one is gone, of the standby, which is promoted."""
        if self.running[self.leader].poll() is not None:
            self.promote()
            self.proxy.cut()
        return self.leader

    def kill(self) -> int:
        """Kills the primary; returns the port of the new one."""
        old = self.running[self.leader]
        old.kill()
        old.wait()
        return self.master

    def promote(self) -> Node:
        """Lets the standby lead, whether or not the primary lives; returns that one. Connections that are open stay."""
        old = self.running.pop(self.leader)
        ((self.leader, standby),) = self.running.items()
        standby.call("pg_ctl", "promote", "--wait", "--pgdata", "data")
        self.promotions.value += 1
        self.proxy.target = self.leader
        return old

    def deafen(self) -> None:
        """Lets the standby receive nothing any more, and nobody notice."""
        (standby,) = (node for port, node in self.running.items() if port != self.leader)
        with standby.administrator() as connection:
            connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
            connection.execute("SELECT pg_reload_conf()")
        with self.running[self.leader].administrator() as connection:
            follows = "SELECT count(*) FROM pg_stat_replication"
            until(lambda: connection.execute(follows).fetchone() == (0,), "the standby follows no more")

    def changes(self) -> int:
        """How often a standby was promoted."""
        return int(self.promotions.value)

    def leads(self, port: int) -> bool:
        """Whether a server says itself that it takes writes."""
        with self.running[port].administrator() as connection:
            return connection.execute("SELECT NOT pg_is_in_recovery()").fetchone() == (True,)

    def mend(self) -> None:
        """Makes a standby where there is none, and waits until it follows."""
        leader = self.running[self.master]
        if len(self.running) == 1:
            standby = Node(self.folder(), self.bin, follows=leader)
            self.running[standby.port] = standby
        with leader.administrator() as connection:
            follows = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
            until(lambda: connection.execute(follows).fetchone() == (1,), "the standby follows")

    def stop(self) -> None:
        """Ends all."""
        for node in self.running.values():
            node.kill()
        self.stack.close()


@contextlib.contextmanager
def standbys() -> Iterator[Standbys]:
    """Servers for the time of a `with` block. Skips where PostgreSQL is not installed."""
    bin_ = programs()
    if bin_ is None:
        pytest.skip("PostgreSQL's programs are not installed: `apt-get install postgresql`")
    with tempfile.TemporaryDirectory(prefix="standbys-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)
        servers = Standbys(Path(folder), bin_)
        try:
            yield servers
        finally:
            servers.stop()
