"""Looks at the pointer all the time, loads a new generation beside the one that serves, and swaps it in by one reference."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time

from feature_repo.reader import NothingServed, Pointer, Reader
from feature_repo.serving import artifacts, metrics
from feature_repo.serving.batches import step_back
from feature_repo.serving.generation import Generation, load
from feature_repo.serving.settings import Settings

LOG = logging.getLogger("llmemb.serving")
AGAIN_S = 5.0
"""Seconds after which a generation that could not be loaded is tried again."""

COLLECT = (20_000, 20, 20)
"""Objects made before the collector looks: by default it looks at every second request."""


class Watch:
    """Two threads: one looks, one loads, so that a forgotten id is withheld also while a large index is read."""

    def __init__(self, settings: Settings, reader: Reader) -> None:
        self.settings, self.reader = settings, reader
        self.current: Generation | None = None
        self.seen: Pointer | None = None
        self.up = True
        self.changed, self.stopped = threading.Event(), threading.Event()
        self.turn = threading.Lock()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.look_on, self.load_on)]

    def start(self) -> None:
        """Begins to look."""
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """Ends both threads."""
        self.stopped.set()
        self.changed.set()
        for thread in self.threads:
            thread.join(timeout=5)

    def look_on(self) -> None:
        """The thread that looks."""
        while not self.stopped.is_set():
            self.look()
            if self.current is not None:  # it ages also while the store is down
                metrics.AGE.set(self.current.pointer.age.total_seconds())
            self.stopped.wait(self.settings.poll_s)

    def look(self) -> None:
        """Reads the pointer once; a store that is down changes nothing."""
        try:
            pointer = self.reader.pointer()
        except NothingServed:
            metrics.STORE_UP.set(1)
            return
        except Exception as error:
            if self.up:
                LOG.warning("the pointer can't be read (%s): what is in memory serves on", type(error).__name__)
            self.up = False
            metrics.STORE_UP.set(0)
            return
        self.up = True
        metrics.STORE_UP.set(1)
        metrics.SEEN.set(pointer.sequence)
        with self.turn:
            self.seen = pointer
            if self.current is not None:
                # also while another index is still being read
                self.swap(self.current.without(pointer.withheld))
        self.changed.set()

    def load_on(self) -> None:
        """The thread that loads."""
        step_back()
        while not self.stopped.is_set():
            self.changed.wait()
            self.changed.clear()
            pointer = self.seen
            if pointer is None or self.stopped.is_set() or same(self.current, pointer):
                continue
            again = time.monotonic() + (0.0 if self.advance(pointer) else AGAIN_S)
            while self.seen == pointer and time.monotonic() < again and not self.stopped.wait(0.1):
                pass

    def advance(self, pointer: Pointer) -> bool:
        """Loads what a pointer names and lets it serve; False where that can't be."""
        started = time.monotonic()
        try:
            made = self.lighter(pointer) or load(self.settings, pointer)
        except Exception as error:
            metrics.LOADS.labels("failed").inc()
            LOG.error("space %s of %s can't be loaded: %s", pointer.space_id, pointer.ds, error)
            return False
        before = self.current
        with self.turn:
            self.swap(made.without(self.seen.withheld if self.seen else ()))
        metrics.LOADS.labels("ok").inc()
        metrics.LOAD_SECONDS.set(time.monotonic() - started)
        metrics.SEQUENCE.set(pointer.sequence)
        metrics.ITEMS.set(len(made.index) - len(made.withheld_rows))
        metrics.AGE.set(pointer.age.total_seconds())
        LOG.info("space %s of %s (pointer %d) serves", pointer.space_id, pointer.ds, pointer.sequence)
        if before is None:
            # what is here now stays: the collector need not walk over it while requests wait
            gc.collect()
            gc.freeze()
            gc.set_threshold(*COLLECT)
        artifacts.forget_others(self.settings, made.index.folder)
        return True

    def lighter(self, pointer: Pointer) -> Generation | None:
        """The generation that serves with another pointer, where nothing but the pointer itself changed."""
        now = self.current
        if now is None or now.pointer.space != pointer.space or not pointer.index:
            return None
        return dataclasses.replace(now, pointer=pointer)

    def swap(self, made: Generation) -> None:
        """Requests from now on take this one; those under way keep theirs."""
        self.current = made


def same(now: Generation | None, pointer: Pointer) -> bool:
    """Whether what a pointer names serves already."""
    return now is not None and now.pointer.sequence == pointer.sequence and now.pointer.space == pointer.space
