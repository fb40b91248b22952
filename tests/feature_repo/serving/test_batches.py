"""Light asks are answered on the event loop, others beside it; everyone gets their own answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from feature_repo.serving import search
from feature_repo.serving.batches import Batcher
from feature_repo.serving.search import Ask
from feature_repo.serving.settings import Settings


def test_light_batches_are_answered_here_and_others_on_the_thread() -> None:
    where: list[tuple[str, list[int]]] = []

    def work(asks: Sequence[Any]) -> list[Any]:
        where.append((threading.current_thread().name, list(asks)))
        return [ask if ask != 13 else RuntimeError("13") for ask in asks]

    async def ask() -> None:
        batcher = Batcher(work, lambda asks: max(asks) < 100, 0.0, 4)
        batcher.open()
        asked = [1, 2, 13, 3, 4, 200, 5, 300]
        answers = await asyncio.gather(*map(batcher.ask, asked), return_exceptions=True)  # type: ignore[arg-type]
        assert [one for one in answers if not isinstance(one, RuntimeError)] == [one for one in asked if one != 13]
        assert isinstance(answers[2], RuntimeError)
        batcher.close()

    asyncio.run(ask())
    assert where == [("MainThread", [1, 2, 13, 3]), ("numeric", [4, 200, 5, 300])]


def test_many_light_batches_that_waited_for_the_thread_are_answered_one_by_one() -> None:
    here = threading.Event()
    between: list[int] = []

    def work(asks: Sequence[Any]) -> list[Any]:
        return list(asks) if asks[0] != "heavy" or here.wait(5) else []

    async def ask() -> None:
        batcher = Batcher(work, lambda asks: asks[0] != "heavy", 0.0, 1)
        batcher.open()
        asked = [asyncio.ensure_future(batcher.ask(one)) for one in ("heavy", *range(600))]  # type: ignore[arg-type]
        asked[1].add_done_callback(lambda _: between.append(sum(one.done() for one in asked)))
        await asyncio.sleep(0)
        here.set()
        assert await asyncio.wait_for(asyncio.gather(*asked), 3) == ["heavy", *range(600)]
        assert between[0] < 10, "the event loop has its turn"
        batcher.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("more", "asks", "light"),
    [
        ({}, 1, True),
        ({}, 5, True),
        ({}, 6, False),  # too many numbers
        ({"approximate": False}, 2, True),
        ({"approximate": False}, 3, False),  # too many numbers without codes
        ({"approximate": True, "exact_numbers": 200 * 16}, 3, False),
        ({"generation": 1}, 8, True),
        ({"generation": 1}, 9, False),  # too many asks, however few items
        ({"k": 101}, 1, False),
        ({"hidden": frozenset(range(201))}, 1, False),
        ({"filters": (("genre", ("A",)),)}, 1, False),
    ],
)
def test_many_asks_long_answers_and_filters_are_not_light(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], asks: int, light: bool
) -> None:
    monkeypatch.setattr(search, "LIGHT_NUMBERS", 5 * 200 * 16)
    monkeypatch.setattr(search, "LIGHT_SCORED", 2 * 200 * 16)

    items = 1 if "generation" in more else 200
    more, settings = dict(more), Settings(exact_numbers=more.get("exact_numbers", 1))
    more.pop("exact_numbers", None)
    about = {"approximate": more.pop("approximate", True)}
    made = SimpleNamespace(index=SimpleNamespace(vector_ND=np.zeros((items, 16), np.float32), about=about))
    ask = Ask(**{"row_L": np.array([1]), "user": True, "k": 10, "hidden": frozenset(), **more, "generation": made})  # type: ignore[arg-type]
    assert search.is_light([ask] * asks, settings) is light
