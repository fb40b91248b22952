"""A TCP proxy that a test puts between the service and its store: it passes on, delays, swallows, or hangs up."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Proxy:
    """What it does at the moment; a test changes these while connections are open."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.delay_s: tuple[float, float] = (0.0, 0.0)
        """Shortest and longest time for which a reply is held back."""
        self.swallow = False
        """Whether replies are read and lost; the connection stays open."""
        self.down = False
        """Whether connections are hung up on."""
        self.deaf: set[socket.socket] = set()
        """Connections that stay open, and on which nothing comes through any more."""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.lines: list[socket.socket] = []
        self.random = random.Random(0)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Takes connections until the listener is closed."""
        while True:
            try:
                line, _ = self.listener.accept()
            except OSError:
                return
            if self.down:
                line.close()
                continue
            with suppress(OSError):
                store = socket.create_connection(("127.0.0.1", self.target))
                self.lines += [line, store]
                threading.Thread(target=self.pump, args=(line, store, False), daemon=True).start()
                threading.Thread(target=self.pump, args=(store, line, True), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket, reply: bool) -> None:
        """Carries one direction."""
        with suppress(OSError):
            while (data := source.recv(65_536)) and not self.down:
                if reply and self.delay_s[1]:
                    time.sleep(self.random.uniform(*self.delay_s))
                if not (reply and self.swallow) and source not in self.deaf:
                    sink.sendall(data)
        for line in (source, sink):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def cut(self) -> None:
        """Hangs up on all."""
        for line in self.lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        self.lines.clear()


@contextmanager
def between(target: int) -> Iterator[Proxy]:
    """A proxy before a port of this machine."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.down = True
        proxy.listener.close()
        proxy.cut()
