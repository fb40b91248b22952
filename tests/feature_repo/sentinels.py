"""A Redis master with replicas under Sentinel, of real processes, whose master can be killed."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

MASTER = "catalogue"
DEADLINE_S = 60.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def redis_at(port: int, **more: Any) -> redis.Redis:
    """A client that asks once. By itself it would wait for a second before it asks a server again that has not started yet."""
    return redis.Redis(port=port, retry=Retry(NoBackoff(), 0), **more)


def until(true: Callable[[], object], what: str) -> None:
    """Waits until something is so; fails the test where it doesn't come to that."""
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        with contextlib.suppress(redis.RedisError, OSError):
            if true():
                return
        time.sleep(0.05)
    raise TimeoutError(f"after {DEADLINE_S:g} s still not: {what}")


class Failover:
    """The servers. `kill` ends the master as a lost machine would and returns once another one is master."""

    def __init__(self, home: Path, nodes: int) -> None:
        self.home = home
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.ports = [free_port() for _ in range(nodes)]
        self.watch = free_port()
        for port in self.ports:
            self.start(port, None if port == self.ports[0] else self.ports[0])
        conf = home / "sentinel.conf"
        conf.write_text(
            f"port {self.watch}\nbind 127.0.0.1\ndir {home}\nsentinel monitor {MASTER} 127.0.0.1 {self.ports[0]} 1\n"
            f"sentinel down-after-milliseconds {MASTER} 2000\nsentinel failover-timeout {MASTER} 2000\n"
            f"sentinel parallel-syncs {MASTER} {nodes}\n"
        )
        self.running[self.watch] = self.process(["redis-server", str(conf), "--sentinel"])
        until(lambda: len(self.sentinel.sentinel_slaves(MASTER)) == nodes - 1, "Sentinel knows the replicas")
        until(self.whole, "replicas follow the master")

    @property
    def sentinel(self) -> redis.Redis:
        return redis_at(self.watch)

    @property
    def settings(self) -> str:
        """LLMEMB_ONLINE_STORE."""
        return json.dumps(
            {
                "type": "redis",
                "redis_type": "redis_sentinel",
                "sentinel_master": MASTER,
                "connection_string": f"127.0.0.1:{self.watch},socket_timeout=12,socket_connect_timeout=2",
            }
        )

    def process(self, command: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start(self, port: int, master: int | None) -> None:
        """A server that keeps nothing on disk: what a lost machine had is lost."""
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--repl-diskless-sync-delay", "0"]
        command += ["--dir", str(self.home), "--dbfilename", f"{port}.rdb"]
        if master is not None:
            command += ["--replicaof", "127.0.0.1", str(master)]
        self.running[port] = self.process(command)
        until(redis_at(port).ping, f"Redis answers at {port}")

    @property
    def master(self) -> int:
        """The port of who is master by now."""
        port: int = Sentinel([("127.0.0.1", self.watch)]).discover_master(MASTER)[1]
        return port

    def changes(self) -> int:
        """How often another server became master."""
        told: dict[str, int] = self.sentinel.sentinel_master(MASTER)
        return int(told["config-epoch"])

    def leads(self, port: int) -> bool:
        """Whether a server says itself that it is master."""
        return bool(redis_at(port).info("replication")["role"] == "master")

    def whole(self) -> bool:
        """Whether every other server follows the master."""
        told = redis_at(self.master).info("replication")
        alive = [port for port in self.ports if self.running[port].poll() is None]
        online = [told[name] for name in told if name.startswith("slave") and told[name]["state"] == "online"]
        return bool(told["role"] == "master" and len(online) == len(alive) - 1)

    def kill(self) -> int:
        """Kills the master; returns the port of the new one."""
        old = self.master
        self.running[old].kill()
        self.running[old].wait()
        until(lambda: self.master != old and self.leads(self.master), "another server is master")
        return self.master

    def mend(self) -> None:
        """Starts what was killed as replicas, empty, and waits until they follow."""
        for port in self.ports:
            if self.running[port].poll() is not None:
                self.start(port, self.master)
        until(self.whole, "all servers are there again")

    def stop(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@contextlib.contextmanager
def failover(home: Path, nodes: int = 3) -> Iterator[Failover]:
    """Servers for the time of a `with` block."""
    servers = Failover(home, nodes)
    try:
        yield servers
    finally:
        servers.stop()
