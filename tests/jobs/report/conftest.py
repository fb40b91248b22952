"""Pictures that are drawn once: most pages of these tests show the same ones, and drawing them is most of their time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from jobs.report import maps, plots
from jobs.report.layers import Matrix

DRAWN: dict[str, Any] = {}
"""By function and arguments: equal ones give equal bytes."""


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What has been drawn; whoever clears it has it drawn anew."""

    def once(draw: Callable[..., Any], keyed: Callable[[Any], object] = lambda given: given) -> Callable[..., Any]:
        def known(*given: Any) -> Any:
            key = repr((draw.__name__, [keyed(one) for one in given]))
            if key not in DRAWN:
                DRAWN[key] = draw(*given)
            return DRAWN[key]

        return known

    for kind in (plots.forest, plots.bars, plots.curves, plots.over_nights):
        monkeypatch.setattr(plots, kind.__name__, once(kind))
    monkeypatch.setattr(maps, "layout", once(maps.layout, digest))
    return DRAWN


def digest(value: Matrix | int | None) -> object:
    """A matrix by its bytes."""
    return value if value is None or isinstance(value, int) else (value.shape, value.tobytes())
