"""k-means of wide vectors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.behaviour import k_means

PLACES, EACH = 32, 40


def wide(seed: int) -> tuple[Tensor, Tensor]:
    """Items of 32 places in four strong directions, with noise in 200 others that is longer than places are apart."""
    generator = torch.Generator().manual_seed(seed)
    place_PD = torch.cat([3 * torch.randn(PLACES, 4, generator=generator), torch.zeros(PLACES, 200)], 1)
    kind_N = torch.arange(PLACES * EACH) % PLACES
    spread_D = torch.cat([torch.full((4,), 0.2), torch.full((200,), 0.8)])
    turn_DD = torch.linalg.qr(torch.randn(204, 204, generator=generator))[0]
    return (place_PD[kind_N] + spread_D * torch.randn(len(kind_N), 204, generator=generator)) @ turn_DD, kind_N


def impurity(entry_CD: Tensor, z_ND: Tensor, kind_N: Tensor) -> float:
    """Share of items that are not of their entry's commonest place."""
    code_N = k_means.nearest(z_ND, entry_CD)
    together_CP = torch.zeros(len(entry_CD), PLACES).index_put_((code_N, kind_N), torch.ones(len(kind_N)), accumulate=True)
    return 1 - float(together_CP.max(1).values.sum()) / len(kind_N)


@pytest.mark.parametrize("seed", [0, 1])
def test_strong_directions_come_first(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z_ND, kind_N = wide(seed)
    by_turns = impurity(k_means.k_means(z_ND, 2 * PLACES, torch.Generator().manual_seed(seed)), z_ND, kind_N)
    monkeypatch.setattr(k_means, "FIRST", 204)
    at_once = impurity(k_means.k_means(z_ND, 2 * PLACES, torch.Generator().manual_seed(seed)), z_ND, kind_N)
    assert by_turns < 0.75 * at_once


def test_all_directions_count_in_the_end() -> None:
    assert k_means.widths(8) == [8]
    assert k_means.widths(20) == [8, 16, 20]
    assert k_means.widths(5) == [5]
