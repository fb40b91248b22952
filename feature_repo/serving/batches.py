"""Asks that come within a millisecond or two, answered together: light ones at once, others on one thread."""

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
    """Gathers asks for `window_s`. A light batch is answered on the event loop itself: to wake a thread and be woken by it would
    cost as much, and each would wait for the other. Others go to a thread; what comes while it works makes the next batch.

    The thread is fed by a queue of its own: an executor's futures cost half as much again as the hand-over itself.
    """

    def __init__(self, work: Work, light: Callable[[Sequence[Ask]], bool], window_s: float, most: int) -> None:
        self.work, self.light, self.window_s, self.most = work, light, window_s, most
        self.batches: SimpleQueue[list[Pair]] = SimpleQueue()
        self.waiting: list[Pair] = []
        self.timer: asyncio.Handle | None = None
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
                # even without a window, what the loop has read already comes first
                self.timer = loop.call_later(self.window_s, self.start) if self.window_s else loop.call_soon(self.start)
        return await future

    def start(self) -> None:
        """Answers or hands over what waits, without those whose callers have gone."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.waiting = [pair for pair in self.waiting if not pair[1].done()]
        batch, self.waiting = self.waiting[: self.most], self.waiting[self.most :]
        if not batch:
            return
        self.busy = True
        if self.light([ask for ask, _ in batch]):
            give(batch, self.answers(batch))
            self.busy = False
            if self.waiting:  # not at once: what the loop has read meanwhile comes in turn, however many wait
                self.timer = asyncio.get_running_loop().call_soon(self.start)
        else:
            self.batches.put(batch)

    def answers(self, batch: list[Pair]) -> Sequence[Found | Exception]:
        """What the work says of each ask."""
        try:
            return self.work([ask for ask, _ in batch])
        except Exception as error:
            return [error] * len(batch)

    def run(self, loop: asyncio.AbstractEventLoop) -> None:
        """The numeric thread, until an empty batch tells it to end."""
        while batch := self.batches.get():
            answers = self.answers(batch)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self.finish, batch, answers)

    def finish(self, batch: list[Pair], answers: Sequence[Found | Exception]) -> None:
        """Gives the thread's answers, and begins the next batch at once."""
        self.busy = False
        give(batch, answers)
        self.start()

    def open(self) -> None:
        """Begins the thread, for the event loop that runs."""
        threading.Thread(target=self.run, args=[asyncio.get_running_loop()], name="numeric", daemon=True).start()

    def close(self) -> None:
        """Ends the thread."""
        self.batches.put([])


def give(batch: list[Pair], answers: Sequence[Found | Exception]) -> None:
    """Each caller gets its own answer."""
    for (_, future), one in zip(batch, answers, strict=True):
        if future.done():
            continue
        if isinstance(one, Exception):
            future.set_exception(one)
        else:
            future.set_result(one)


def step_back() -> None:
    """Lets this thread run after those that answer requests."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
