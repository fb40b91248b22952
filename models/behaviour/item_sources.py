"""The item source that a configuration names: one builder, for a training and for an artifact.

Shapes: N items, K whitened width, V items + 1 (row 0 is padding), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.behaviour.code_items import code_items
from models.behaviour.items import (
    DirectionItems,
    IdItems,
    MlpAdapter,
    NullSpaceItems,
    ResidualItems,
    ShrunkItems,
    TableItems,
    TextItems,
)
from models.behaviour.llm_esr import DualItems


@dataclass(frozen=True, kw_only=True)
class Given:
    """What an item source is built from."""

    config: Mapping[str, Any]
    """As `recommender.json` keeps it: `kind`, and what that kind has to say."""
    width: int
    """D."""
    catalogue: int
    """V - 1."""
    white_NK: Tensor
    """The catalogue's whitened texts; no rows of it where an artifact is read, which makes vectors by `project` alone."""
    drop_ids: float = 0.0
    """Probability that training drops an item's ID part, where it has one."""
    spread_K: Tensor | None = None
    """Spread of the texts in each direction before whitening; None where it does not matter."""

    @property
    def rows(self) -> int:
        """V."""
        return self.catalogue + 1

    @property
    def white(self) -> int:
        """K."""
        return self.white_NK.shape[1]

    @property
    def text_NK(self) -> Tensor:
        """A row for each item: zeros where there is no text, which say how many items there are."""
        return self.white_NK if len(self.white_NK) else self.white_NK.new_zeros(self.catalogue, self.white)

    @property
    def unit(self) -> bool:
        """Whether vectors have length one."""
        return bool(self.config.get("unit", False))

    def adapter(self) -> MlpAdapter:
        """A fresh adapter."""
        return MlpAdapter(self.white, self.config["hidden"], self.width)


SOURCES: dict[str, Callable[[Given], nn.Module]] = {
    "id": lambda given: IdItems(given.rows, given.width),
    "mlp": lambda given: TextItems(given.white_NK, given.adapter(), unit=given.unit),
    "residual": lambda given: ResidualItems(given.text_NK, given.adapter(), given.width, given.drop_ids, unit=given.unit),
    # artifacts from before AlphaFuse as published say nothing of `added`
    "null_space": lambda given: NullSpaceItems(
        given.text_NK, given.width, given.config["text_width"], added=bool(given.config.get("added", False)), unit=given.unit
    ),
    "codes": lambda given: code_items(
        given.config, given.width, given.catalogue, given.white_NK, given.spread_K, unit=given.unit
    ),
    "llm_esr": lambda given: DualItems(given.text_NK, given.config["hidden"], given.width),
    "shrunk": lambda given: ShrunkItems(given.rows, given.white, given.width),
    "directions": lambda given: DirectionItems(given.white, given.width),
    "table": lambda given: TableItems(given.rows, given.width),
    "sides": lambda given: TableItems(given.rows, given.width),
}
"""Every kind of item source; each class has its own `project`."""


def build_items(
    config: Mapping[str, Any], width: int, catalogue: int, white_NK: Tensor | None = None, drop_ids: float = 0.0,
    spread_K: Tensor | None = None,
) -> Any:  # fmt: skip
    """A fresh item source of the kind that `config["kind"]` names; `white_NK` as in `Given`, None where no text is read.

    Raises ValueError for a kind that this version does not know.
    """
    kind = config["kind"]
    if kind not in SOURCES:
        raise ValueError(
            f"item source {kind!r} is not one of {', '.join(SOURCES)}: a newer version made it; read it with that one"
        )
    white_NK = torch.zeros(0, 0) if white_NK is None else white_NK
    return SOURCES[kind](Given(config=config, width=width, catalogue=catalogue, white_NK=white_NK, drop_ids=drop_ids,
                               spread_K=spread_K))  # fmt: skip
