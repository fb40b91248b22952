"""SCFT's loss: symmetric, blind to length, and the same gradient whatever fits into memory."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.text.contrastive import backward, info_nce, same_text_mask


def views(count: int, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, width, generator=generator), torch.randn(count, width, generator=generator)


def nothing_alike(count: int) -> Tensor:
    return torch.zeros(count, count, dtype=torch.bool)


def test_two_orthogonal_items_give_the_value_worked_out_by_hand() -> None:
    emb_BE = torch.eye(2)
    # each row: positive 1 / .5 = 2, negative 0
    assert float(info_nce(emb_BE, 7 * emb_BE, torch.tensor(2.0), nothing_alike(2))) == pytest.approx(math.log(1 + math.exp(-2)))


def test_the_loss_is_the_mean_of_both_directions_of_cross_entropy() -> None:
    a, b = views(5)
    logits = 10 * F.cosine_similarity(a[:, None], b[None], dim=2)
    wanted = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(info_nce(a, b, torch.tensor(10.0), nothing_alike(5)), wanted)
    torch.testing.assert_close(info_nce(b, a, torch.tensor(10.0), nothing_alike(5)), wanted)


def test_items_of_the_same_text_are_not_negatives_of_each_other() -> None:
    a, b = views(4)
    text = torch.tensor([0, 1, 1, 3])
    marked = same_text_mask(text, text, torch.arange(4), torch.arange(4) + 9)
    logits = 5 * F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    # by hand: a row's positive against itself and what reads otherwise, in both directions
    losses = []
    for own in range(4):
        others = [other for other in range(4) if other == own or text[other] != text[own]]
        for seen in (logits[own], logits[:, own]):
            losses.append(float(seen[others].logsumexp(0) - seen[own]))
    found, blind = (float(info_nce(a, b, torch.tensor(5.0), mark)) for mark in (marked, nothing_alike(4)))
    assert found == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert blind > found + 0.01


def test_views_of_the_same_attributes_are_not_negatives_and_the_positive_always_stays() -> None:
    marked = same_text_mask(torch.arange(3), torch.arange(3), torch.tensor([4, 5, 6]), torch.tensor([5, 4, 6]))
    assert marked.tolist() == [[True, True, False], [True, True, False], [False, False, True]]
    a, b = views(3)
    assert math.isfinite(float(info_nce(a, b, torch.tensor(5.0), torch.ones(3, 3, dtype=torch.bool))))


def test_a_partner_is_no_negative_of_its_own_text_or_of_those_with_the_same_partner() -> None:
    text, partner, keys = torch.tensor([0, 1, 2, 3]), torch.tensor([9, 0, 9, 3]), torch.arange(4)
    marked = same_text_mask(text, partner, keys, keys + 9)
    # the first item's text is the second's partner, and the first and third have one partner
    off = marked & ~torch.eye(4, dtype=torch.bool)
    assert off.nonzero().tolist() == [[0, 1], [0, 2], [2, 0]]


def test_gradient_caching_gives_the_plain_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    rows = torch.randn(12, 6)

    def loss_of(all_RE: Tensor) -> Tensor:
        return info_nce(all_RE[0::2], all_RE[1::2], torch.tensor(8.0), nothing_alike(6))

    gradients, losses = [], []
    for parts in (1, 3):
        net.zero_grad()
        losses.append(backward([lambda part=part: net(part) for part in rows.chunk(parts)], loss_of)())
        gradients.append([parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(gradients[0]) == 4
    for whole, cached in zip(*gradients, strict=True):
        torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-6)


def test_a_learned_scale_gets_its_gradient() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    a, b = views(4)
    backward([lambda: torch.stack([a, b], 1).flatten(0, 1).requires_grad_()], lambda all_RE: info_nce(
        all_RE[0::2], all_RE[1::2], scale.exp(), nothing_alike(4)))  # fmt: skip
    assert scale.grad is not None and float(scale.grad) != 0
