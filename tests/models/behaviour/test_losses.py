"""Losses against numbers worked out by hand or by exhaustive sums."""

import math

import pytest
import torch

from models.behaviour.losses import alignment, bce, full_softmax, gbce, sampled_softmax


def test_full_softmax_is_the_negative_log_probability_of_the_label() -> None:
    hidden, table = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    expected = -math.log(math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(3)))
    assert full_softmax(hidden, table, torch.tensor([1])).item() == pytest.approx(expected, rel=1e-5)


def test_sampled_softmax_over_every_other_item_once_is_the_full_softmax() -> None:
    logits = torch.randn(1, 7)
    full = -logits.log_softmax(1)[:, 0]
    assert torch.allclose(sampled_softmax(logits[:, 0], logits[:, 1:], candidates=7), full, atol=1e-6)


def test_few_negatives_estimate_the_full_softmax_thanks_to_the_correction() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1000)
    full = float(logits.logsumexp(0) - logits[0])
    drawn = logits[torch.randint(1, 1000, (4000, 64))]
    estimate = float(sampled_softmax(logits[:1].expand(4000), drawn, candidates=1000).mean())
    uncorrected = float((torch.cat([logits[:1].expand(4000, 1), drawn], 1).logsumexp(1) - logits[0]).mean())
    assert estimate == pytest.approx(full, abs=0.05)
    assert abs(uncorrected - full) > 1


def test_a_negative_that_is_the_label_does_not_count() -> None:
    positive, negative = torch.tensor([0.5]), torch.tensor([[0.1, -torch.inf]])
    one = torch.tensor(0.5).exp() + torch.tensor(0.1 + math.log(9 / 2)).exp()
    assert sampled_softmax(positive, negative, 10).item() == pytest.approx(float(one.log()) - 0.5, rel=1e-5)
    assert bce(positive, negative).isfinite().all()
    assert gbce(positive, negative, 10).isfinite().all()


def test_bce_with_one_negative_is_the_papers_loss() -> None:
    expected = -math.log(1 / (1 + math.exp(-0.3))) - math.log(1 - 1 / (1 + math.exp(0.2)))
    assert bce(torch.tensor([0.3]), torch.tensor([[-0.2]])).item() == pytest.approx(expected, rel=1e-5)


def test_gbce_is_bce_uncalibrated_and_scales_the_positive_by_the_sampling_rate_when_calibrated() -> None:
    positive, negative = torch.tensor([0.3, -1.0]), torch.randn(2, 5)
    assert torch.allclose(gbce(positive, negative, 101, calibration=0.0), bce(positive, negative))
    calibrated = gbce(positive, negative, 101, calibration=1.0) - bce(positive, negative)
    assert torch.allclose(calibrated, (1 - 0.05) * torch.nn.functional.logsigmoid(positive), atol=1e-6)


def test_alignment_is_lowest_where_every_item_points_at_its_own_teacher() -> None:
    teacher, weight = torch.eye(4), torch.ones(4)
    right = alignment(teacher * 3, teacher, weight, 0.1)
    assert right < 0.01
    assert alignment(teacher.roll(1, 0), teacher, weight, 0.1) > 5


def test_alignment_is_one_hot_so_a_scale_of_the_vectors_does_not_matter() -> None:
    adapted, teacher, weight = torch.randn(5, 3), torch.randn(5, 3), torch.ones(5)
    assert torch.allclose(alignment(adapted, teacher, weight, 0.2), alignment(adapted * 9, teacher / 7, weight, 0.2), atol=1e-6)


def test_the_temperature_of_the_alignment_is_used() -> None:
    adapted, teacher, weight = torch.randn(5, 3), torch.randn(5, 3), torch.ones(5)
    assert not torch.allclose(alignment(adapted, teacher, weight, 0.1), alignment(adapted, teacher, weight, 1.0))


def test_items_of_weight_zero_neither_align_nor_serve_as_negatives() -> None:
    adapted, teacher = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 0.0])
    loss = alignment(adapted, teacher, weight, 0.2)
    loss.backward()
    assert adapted.grad is not None
    assert adapted.grad[[2, 4]].abs().max() == 0
    kept = [0, 1, 3]
    assert torch.allclose(loss, alignment(adapted[kept], teacher[kept], weight[kept], 0.2), atol=1e-6)


def test_a_batch_without_any_weight_has_no_alignment_loss_and_no_nan() -> None:
    adapted = torch.zeros(3, 4, requires_grad=True)
    loss = alignment(adapted, torch.zeros(3, 4), torch.zeros(3), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert adapted.grad is not None
    assert adapted.grad.isfinite().all()


def test_items_of_one_text_are_no_negatives_of_each_other() -> None:
    """Their adapted text is the same: no map can tell them apart, and asking for it pushes the pair away from both teachers."""
    adapted, teacher, weight = torch.randn(4, 3), torch.randn(4, 3), torch.ones(4)
    adapted[1] = adapted[0]
    text = torch.tensor([7, 7, 8, 9])
    found = alignment(adapted, teacher, weight, 0.2, text)
    logits = torch.nn.functional.normalize(adapted, dim=1) @ torch.nn.functional.normalize(teacher, dim=1).T / 0.2
    by_hand = []
    for own in range(4):
        others = [other for other in range(4) if other == own or text[other] != text[own]]
        by_hand.append((logits[own, others].logsumexp(0) + logits[others, own].logsumexp(0)) / 2 - logits[own, own])
    torch.testing.assert_close(found, torch.stack(by_hand).mean())
    assert float(alignment(adapted, teacher, weight, 0.2)) > float(found)
