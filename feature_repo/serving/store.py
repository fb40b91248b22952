"""Reads of the online store that may not hold up an answer: a time limit, one more try, a circuit breaker, a bounded queue."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feature_repo.reader import NothingServed, Reader
from feature_repo.reader import settings as feast_settings
from feature_repo.serving import metrics
from feature_repo.serving.lines import lines_of
from feature_repo.serving.settings import Settings
from feature_repo.transport import Sdk

IDS_EACH = 100
"""Ids of items that a user who is remembered has on average, at most: bounds the memory."""
QUEUE = 32
"""Reads that may wait for a thread; where so many do, the store can't keep up."""


class Unavailable(ConnectionError):
    """The store did not answer in time, or is left alone for now."""


def open_reader(settings: Settings, lake: Path | None = None) -> Reader:
    """A reader whose connection gives up after `store_ms`, and tries nothing again by itself."""
    limit = settings.store_ms / 1000
    found = feast_settings(lake, f"socket_timeout={limit},socket_connect_timeout={limit}")
    return Reader(Sdk(found, tries=0, limit_s=limit))


class Guard:
    """Runs reads: those that can wait without a thread on the event loop, the others on threads of its own. Lives in one loop."""

    def __init__(self, settings: Settings, threads: int) -> None:
        self.settings = settings
        self.threads = ThreadPoolExecutor(threads, "store")
        self.most = threads + QUEUE
        self.in_work = 0
        self.failures = 0
        self.closed_until = 0.0
        self.trying = False

    async def read(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` returns. Raises Unavailable where it fails or is slow twice, or need not be tried."""
        if not self.admits():
            metrics.STORE_READS.labels("refused").inc()
            raise Unavailable("the online store is left alone for a moment")
        probe, self.trying = self.failures >= self.settings.breaker_failures, True
        try:
            for last in (probe, True):  # while the store is thought down, one try is enough
                try:
                    found = await self.once(work, *arguments)
                except Unavailable:
                    if last:
                        raise
                else:
                    self.failures = 0
                    return found
        finally:
            self.trying = False
        raise AssertionError("a last try returns or raises")

    def admits(self) -> bool:
        """Whether the store may be asked: it is well, or it is time for one read to try it."""
        if self.in_work >= self.most:
            return False
        if self.failures < self.settings.breaker_failures:
            return True
        return time.monotonic() >= self.closed_until and not self.trying

    async def once(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """One try."""
        try:
            found = await (self.here if inspect.iscoroutinefunction(work) else self.beside)(work, *arguments)
        except (Unavailable, NothingServed):
            raise
        except Exception as error:
            self.failed("failed")
            raise Unavailable(f"the online store failed ({type(error).__name__})") from error
        metrics.READ_OK.inc()
        return found

    async def here(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """One try of what needs no thread; it is cancelled where it is slow."""
        self.in_work += 1
        try:
            async with asyncio.timeout(self.settings.store_ms / 1000) as limit:
                return await work(*arguments)
        except TimeoutError:
            if not limit.expired():
                raise
            self.failed("slow")
            raise Unavailable("the online store is slow") from None
        finally:
            self.in_work -= 1

    async def beside(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """One try on a thread."""
        future = asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)
        self.in_work += 1
        future.add_done_callback(self.done)
        # waits without cancelling: the thread reads to its end anyway
        if not (await asyncio.wait([future], timeout=self.settings.store_ms / 1000 * 1.2))[0]:
            self.failed("slow")
            raise Unavailable("the online store is slow")
        return future.result()

    def done(self, future: asyncio.Future[Any]) -> None:
        """A thread is free again; what a read that nobody waits for raised is known already."""
        self.in_work -= 1
        if not future.cancelled():
            future.exception()

    def failed(self, how: str) -> None:
        """Counts a failure; enough in a row, and the store is left alone."""
        metrics.STORE_READS.labels(how).inc()
        self.failures += 1
        if self.failures >= self.settings.breaker_failures:
            self.closed_until = time.monotonic() + self.settings.breaker_s

    def close(self) -> None:
        """Ends the threads."""
        self.threads.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class History:
    """A user's items, oldest first, and what is to be said of them."""

    item_ids: Sequence[str]
    fallback: str | None = None


class Histories:
    """Histories of users: from the store, or where it is down the last ones that were read."""

    def __init__(self, settings: Settings, reader: Reader, guard: Guard) -> None:
        self.settings, self.reader, self.guard = settings, reader, guard
        self.known: OrderedDict[str, tuple[float, tuple[str, ...]]] = OrderedDict()  # of tuples, which the collector passes by
        self.lines = lines_of(reader.transport)
        self.read: Callable[[str], Any] = self.pushed if self.lines is None else self.lines.item_ids
        self.held = 0
        """Ids of items in `known`."""

    async def of(self, user_id: str) -> History:
        """The user's history; without items, and with the cause, where it is not known."""
        try:
            item_ids: list[str] = await self.guard.read(self.read, user_id)
        except Unavailable:
            read_at, remembered = self.known.get(user_id, (0.0, ()))
            if remembered and time.monotonic() - read_at < self.settings.remembered_s:
                return History(item_ids=remembered, fallback="remembered_history")
            return History(item_ids=[], fallback="store_down")
        if not item_ids:
            self.forget(user_id)
            return History(item_ids=[], fallback="unknown_user")
        self.remember(user_id, item_ids)
        return History(item_ids=item_ids)

    def pushed(self, user_id: str) -> list[str]:
        """What the SRS pushed of a user."""
        _, values = self.reader.transport.read("user_history", {"user_id": [user_id]}, ["item_ids"])[0]
        return list(values.get("item_ids") or [])

    async def close(self) -> None:
        """Hangs up on the store."""
        if self.lines is not None:
            await self.lines.close()

    def remember(self, user_id: str, item_ids: list[str]) -> None:
        """Keeps a history in memory; those that were read longest ago make room."""
        self.forget(user_id)
        self.known[user_id] = (time.monotonic(), tuple(item_ids))
        self.held += len(item_ids)
        while len(self.known) > self.settings.remembered or self.held > IDS_EACH * self.settings.remembered:
            self.forget(next(iter(self.known)))

    def forget(self, user_id: str) -> None:
        """Keeps a history no longer."""
        self.held -= len(self.known.pop(user_id, (0.0, ()))[1])
