"""What Prometheus reads of the serving process. No label ever holds an id."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SHARED = "PROMETHEUS_MULTIPROC_DIR" in os.environ
"""Whether workers count together: prometheus_client decides when it is first imported, and Feast sets the variable later."""
BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
SECONDS = Histogram("llmemb_request_seconds", "From a request's last byte to its answer", ["endpoint"], buckets=BUCKETS)
REQUESTS = Counter("llmemb_requests", "Requests by outcome, which is the HTTP status", ["endpoint", "outcome"])
FALLBACKS = Counter("llmemb_fallbacks", "Answers that were not what was asked for, by cause", ["cause"])
STORE_READS = Counter(
    "llmemb_store_reads", "Reads of the online store: ok, failed, slow, refused (breaker open or queue full)", ["outcome"]
)
STORE_UP = Gauge("llmemb_store_up", "Whether the pointer could be read at the last look", multiprocess_mode="livemin")
SEQUENCE = Gauge("llmemb_pointer_sequence", "How many times the pointer that serves was written", multiprocess_mode="livemin")
SEEN = Gauge(
    "llmemb_pointer_sequence_seen",
    "The same of the pointer last read: more, while a generation is loaded",
    multiprocess_mode="livemax",
)
AGE = Gauge("llmemb_pointer_age_seconds", "Since the end of the snapshot that serves", multiprocess_mode="livemax")
ITEMS = Gauge("llmemb_generation_items", "Items that are served", multiprocess_mode="livemin")
LOADS = Counter("llmemb_generation_loads", "Generations loaded: ok or failed", ["outcome"])
LOAD_SECONDS = Gauge("llmemb_generation_load_seconds", "How long the last one took to load", multiprocess_mode="livemax")
IN_WORK = Gauge("llmemb_requests_in_work", "Requests in work", multiprocess_mode="livesum")
BATCH = Histogram("llmemb_batch_size", "Requests that were answered together", buckets=(1, 2, 4, 8, 16, 32))

READ_OK = STORE_READS.labels("ok")


@functools.cache
def answered(endpoint: str, outcome: str) -> Counter:
    """The counter of an endpoint's requests with an outcome: both are few."""
    return REQUESTS.labels(endpoint, outcome)


@functools.cache
def seconds(endpoint: str) -> Histogram:
    """The histogram of an endpoint."""
    return SECONDS.labels(endpoint)


def exposition() -> bytes:
    """All metrics, of all workers."""
    if SHARED:
        bury(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
    return generate_latest(REGISTRY)


def bury(folder: Path) -> None:
    """Takes gauges of workers that died out of a folder: what they were is no longer so. What they counted stays."""
    for pid in {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_live*_*.db")}:
        if not works(pid):
            with contextlib.suppress(FileNotFoundError):  # another worker was faster
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def works(pid: int) -> bool:
    """Whether a process lives and is a worker beside this one: its number may have been given to another program."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return False
    return state not in "ZX" and int(parent) == os.getppid()
