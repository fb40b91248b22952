"""Processes forked from one that has loaded what they need: torch and its like take longer to load than a test's work takes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from jobs.__main__ import main

SERVER = multiprocessing.get_context("forkserver")
LOADED = ["tests.models.text.test_scft_processes", "tests.models.behaviour.test_training", "jobs.project"]
"""Modules of what runs. Their process has started no thread: a fork of pytest's own would have lost some."""


def start(work: Callable[..., object], *given: Any, **environment: str) -> BaseProcess:
    """A process that calls a function of a module and ends with 0, or with 1 where the function raises."""
    SERVER.set_forkserver_preload(LOADED)
    process = SERVER.Process(target=begin, args=({**os.environ, **environment}, work, given))
    process.start()
    return process


def begin(environment: Mapping[str, str], work: Callable[..., object], given: tuple[Any, ...]) -> None:
    """What each process does."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    work(*given)


def job(words: Sequence[str]) -> None:
    """`python -m jobs …`."""
    sys.exit(main(list(words)))


def in_two_processes(work: Callable[..., None], *given: Any) -> None:
    """Runs a function in two processes that can find each other; fails where one fails or they hang."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    workers = [start(work, *given, **place, RANK=str(rank)) for rank in range(2)]
    try:
        for worker in workers:
            worker.join(250)
        assert [worker.exitcode for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
