"""A store's server is lost at a chosen step of its writer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def lost_at(
    patch: pytest.MonkeyPatch,
    store: type[Any],
    lose: Callable[[], object],
    method: str,
    number: int,
    *,
    after: bool,
    view: str = "",
) -> None:
    """Calls `lose` before or after the writer's n-th call of a method (for a view), once."""
    calls, real = [0], getattr(store, method)

    def call(self: Any, *given: Any) -> Any:
        calls[0] += not view or given[0].name == view
        now = calls[0] == number
        calls[0] += now
        if now and not after:
            lose()
        done = real(self, *given)
        if now and after:
            lose()
        return done

    patch.setattr(store, method, call)
