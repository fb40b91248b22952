"""The faults of `bench_serving.py`: the store slow, hanging, flushed and killed under load; what was answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import redis

from tests.feature_repo.serving.proxy import Proxy

Load = Callable[[Sequence[bytes], list[Any]], dict[str, Any]]
"""Sends bodies to /recommend under an open loop, gathers the answers in order of their coming, gives the figures."""
SLOW_S = (0.08, 0.2)
"""Replies later than the service waits for one (50 ms)."""


class Answers:
    """What each user must be answered: the same as for the history itself; or what is popular, where that is said."""

    def __init__(self, ask: Callable[..., dict[str, Any]], histories: Sequence[Sequence[str]]) -> None:
        self.ask = ask
        self.right = {f"u{number}": self.items(history=list(history)) for number, history in enumerate(histories)}
        self.popular = self.items(history=[])

    def items(self, **body: Any) -> list[str]:
        """Ids of an answer."""
        return [item["item_id"] for item in self.ask("/recommend", k=10, **body)["items"]]

    def judge(self, answers: Sequence[bytes]) -> tuple[Counter[str], int]:
        """(what was said, how many answers are not what they say); an answer names no user, so all users' lists are looked up."""
        known = {tuple(items) for items in self.right.values()}
        said: Counter[str] = Counter()
        wrong = 0
        for text in answers:
            answer = json.loads(text)
            if "items" not in answer:
                said["refused"] += 1
                continue
            items = tuple(item["item_id"] for item in answer["items"])
            said[answer["fallback"] or "right"] += 1
            popular = answer["fallback"] in ("store_down", "unknown_user")
            wrong += items != tuple(self.popular) if popular else items not in known
        return said, wrong


def faults(
    load: Load, answers: Answers, proxy: Proxy, store: redis.Redis, push: Callable[[], object], tell: Callable[..., None]
) -> None:
    """One figure a fault, and the seconds until all is right again after it; a well store before, for comparison."""
    bodies = [json.dumps({"user_id": user, "k": 10}).encode() for user in answers.right]
    load(bodies[: len(bodies) // 2], [])  # half of the users are in memory

    def figure(name: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
        begin()
        gathered: list[Any] = []
        found = load(bodies, gathered)
        said, wrong = answers.judge(gathered)
        end()
        shares = {what: round(count / said.total(), 4) for what, count in sorted(said.items())}
        tell("fault", fault=name, **found, shares=shares, wrong=wrong, well_again_s=well_again(answers))

    def set_to(delay_s: tuple[float, float] = (0.0, 0.0), *, swallow: bool = False) -> Callable[[], None]:
        def change() -> None:
            proxy.delay_s, proxy.swallow, proxy.down = delay_s, swallow, False

        return change

    def cut() -> None:
        proxy.down = True
        proxy.cut()

    figure("none", set_to(), set_to())
    figure("slow", set_to(SLOW_S), set_to())
    figure("near the limit", set_to((0.0, 0.12)), set_to())
    figure("hanging", set_to(swallow=True), set_to())
    figure("flushed", store.flushall, push)
    figure("killed", cut, set_to())


def well_again(answers: Answers, seconds: float = 30.0) -> float | None:
    """Seconds until some users are answered rightly from the store again; None where that takes too long."""
    started = time.perf_counter()
    some = list(answers.right)[-5:]
    while time.perf_counter() - started < seconds:
        found = [answers.ask("/recommend", user_id=user, k=10) for user in some]
        if all(one["fallback"] is None for one in found):
            for user, one in zip(some, found, strict=True):
                assert [item["item_id"] for item in one["items"]] == answers.right[user], "each user's own answer"
            return round(time.perf_counter() - started, 2)
        time.sleep(0.05)
    return None


def under_load(open_loop: Any, port: int, rate: float, seconds: float) -> Load:
    """The open loop of the benchmark, on /recommend."""
    return lambda bodies, keep: asyncio.run(open_loop(port, "/recommend", bodies, rate, seconds, keep))
