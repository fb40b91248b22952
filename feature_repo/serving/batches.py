"""Asks that come within a millisecond or two, answered together on one thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from feature_repo.serving.search import Ask, Found

Work = Callable[[Sequence[Ask]], list[Found | Exception]]


class Batcher:
    """Gathers asks for `window_s` and hands them to a thread; what comes while it works makes the next batch."""

    def __init__(self, work: Work, window_s: float, most: int) -> None:
        self.work, self.window_s, self.most = work, window_s, most
        self.thread = ThreadPoolExecutor(1, "numeric")
        self.waiting: list[tuple[Ask, asyncio.Future[Found]]] = []
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
            done = asyncio.get_running_loop().run_in_executor(self.thread, self.work, [ask for ask, _ in batch])
            done.add_done_callback(lambda result: self.finish(batch, result))

    def finish(self, batch: list[tuple[Ask, asyncio.Future[Found]]], result: asyncio.Future[list[Found | Exception]]) -> None:
        """Gives each caller its own answer, and begins the next batch at once."""
        self.busy = False
        error = result.exception()
        answers: Sequence[Found | BaseException] = [error] * len(batch) if error else result.result()
        for (_, future), one in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(one, BaseException):
                future.set_exception(one)
            else:
                future.set_result(one)
        self.start()

    def close(self) -> None:
        """Ends the thread."""
        self.thread.shutdown(wait=False, cancel_futures=True)


def step_back() -> None:
    """Lets this thread run after those that answer requests."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
