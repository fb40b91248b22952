"""Asks that come within a millisecond or two, answered together on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from feature_repo.serving.search import Ask, Found

Pair = tuple[Ask, asyncio.Future[Found]]
Work = Callable[[Sequence[Ask]], list[Found | Exception]]


class Batcher:
    """Gathers asks for `window_s` and hands them to a thread; what comes while it works makes the next batch.

    The thread is fed by a queue of its own: an executor's futures cost half as much again as the hand-over itself.
    """

    def __init__(self, work: Work, window_s: float, most: int) -> None:
        self.work, self.window_s, self.most = work, window_s, most
        self.batches: SimpleQueue[list[Pair]] = SimpleQueue()
        self.waiting: list[Pair] = []
        self.timer: asyncio.TimerHandle | None = None
        self.busy = False

    async def ask(self, ask: Ask) -> Found:
        """The answer. Raises what the work raised for this ask."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Found] = loop.create_future()
        self.waiting.append((ask, future))
        if not self.busy:
            if len(self.waiting) >= self.most:
                self.start()
            elif self.timer is None:
                self.timer = loop.call_later(self.window_s, self.start)
        return await future

    def start(self) -> None:
        """Hands over what waits, without those whose callers have gone."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.waiting = [pair for pair in self.waiting if not pair[1].done()]
        batch, self.waiting = self.waiting[: self.most], self.waiting[self.most :]
        if batch:
            self.busy = True
            self.batches.put(batch)

    def run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The numeric thread, until an empty batch tells it to end."""
        while batch := self.batches.get():
            try:
                answers: Sequence[Found | Exception] = self.work([ask for ask, _ in batch])
            except Exception as error:
                answers = [error] * len(batch)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self.finish, batch, answers)

    def finish(self, batch: list[Pair], answers: Sequence[Found | Exception]) -> None:
        """Gives each caller its own answer, and begins the next batch at once."""
        self.busy = False
        for (_, future), one in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(one, Exception):
                future.set_exception(one)
            else:
                future.set_result(one)
        self.start()

    def open(self) -> None:
        """Begins the thread, for the event loop that runs."""
        threading.Thread(target=self.run, args=[asyncio.get_running_loop()], name="numeric", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self.batches.put([])


def step_back() -> None:
    """Lets this thread run after those that answer requests."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
