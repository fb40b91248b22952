"""Intervals: they cover the truth, pair the models, and take a user's cases together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.judge.bootstrap import bootstrap, estimate


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    values_CK = (torch.rand(200, 300, generator=generator) < 0.3).float()  # 300 experiments of 200 users, true mean 0.3
    found = bootstrap(values_CK, torch.ones(1, 200, dtype=torch.bool), resamples=500)
    inside = [(got := estimate(found, 0, column)).low <= 0.3 <= got.high for column in range(300)]
    assert 0.91 < np.mean(inside) < 0.985


def test_the_interval_agrees_with_resampling_by_hand() -> None:
    values_C = torch.rand(400, generator=torch.Generator().manual_seed(3)).double()
    rng = np.random.default_rng(0)
    by_hand = np.quantile([rng.choice(values_C.numpy(), 400).mean() for _ in range(3000)], [0.025, 0.975])
    found = bootstrap(values_C[:, None], torch.ones(1, 400, dtype=torch.bool), resamples=3000)
    got = estimate(found, 0, 0)
    assert [got.low, got.high] == pytest.approx(by_hand, abs=0.004)


def test_differences_are_paired() -> None:
    """Two models that differ by a constant on very different users: an unpaired interval would be wide."""
    base_C = torch.rand(100, generator=torch.Generator().manual_seed(0))
    found = bootstrap(torch.stack([base_C + 0.01, base_C], 1), torch.ones(1, 100, dtype=torch.bool))
    paired, alone = estimate(found, 0, 0, minus=1), estimate(found, 0, 0)
    assert (paired.low, paired.high) == pytest.approx((0.01, 0.01), abs=1e-5)
    assert alone.high - alone.low > 0.05


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    generator = torch.Generator().manual_seed(0)
    noise_CK = torch.randn(400, 300, generator=generator)
    slice_1C = torch.ones(1, 400, dtype=torch.bool)
    detectable = estimate(bootstrap(noise_CK[:, :1], slice_1C), 0, 0).detectable
    found = bootstrap(noise_CK + detectable, slice_1C, resamples=400)
    assert 0.7 < np.mean([estimate(found, 0, column).low > 0 for column in range(300)]) < 0.9


def test_users_pass_by_in_chunks_and_slices_share_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values_CK = torch.rand(90, 2, generator=torch.Generator().manual_seed(0))
    slices_SC = torch.stack([torch.ones(90, dtype=torch.bool), torch.arange(90) < 40])
    monkeypatch.setattr("models.judge.bootstrap.SCORES", 200 * 7)
    found = bootstrap(values_CK, slices_SC, resamples=200)
    assert found.mean_SK[1].tolist() == pytest.approx(values_CK[:40].mean(0).tolist())
    assert found.mean_RSK.mean(0)[1].tolist() == pytest.approx(values_CK[:40].mean(0).tolist(), abs=0.02)
    assert found.n_S.tolist() == [90, 40]


def test_a_slice_of_too_few_users_gets_a_value_but_no_interval_and_an_empty_one_neither() -> None:
    slices_SC = torch.stack([torch.arange(60) < 5, torch.zeros(60, dtype=torch.bool)])
    found = bootstrap(torch.ones(60, 1), slices_SC)
    few, none = estimate(found, 0, 0), estimate(found, 1, 0)
    assert (few.value, few.n) == (1.0, 5)
    assert all(math.isnan(value) for value in (few.low, few.high, few.detectable, none.value, none.low))


def test_a_slice_in_which_no_user_differs_does_not_pretend_to_show_any_difference() -> None:
    got = estimate(bootstrap(torch.zeros(60, 1), torch.ones(1, 60, dtype=torch.bool)), 0, 0)
    assert (got.value, got.low, got.high) == (0.0, 0.0, 0.0)
    assert math.isnan(got.detectable)


def test_cases_of_a_user_are_drawn_together() -> None:
    """Ten equal cases of a user tell no more than one: taken apart, the interval would be a third as wide."""
    value_U = torch.rand(200, generator=torch.Generator().manual_seed(0))
    users_C = torch.arange(200).repeat(10)  # not side by side
    one, ten = torch.ones(1, 200, dtype=torch.bool), torch.ones(1, 2000, dtype=torch.bool)
    alone = estimate(bootstrap(value_U[:, None], one), 0, 0)
    together = estimate(bootstrap(value_U[users_C][:, None], ten, users_C), 0, 0)
    apart = estimate(bootstrap(value_U[users_C][:, None], ten), 0, 0)
    assert (together.value, together.n) == (pytest.approx(alone.value), 200)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high), abs=1e-6)
    assert apart.high - apart.low < 0.5 * (together.high - together.low)


def test_users_with_many_cases_weigh_by_their_cases_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    users_C = torch.arange(60).repeat_interleave(torch.arange(60) % 4 + 1)
    values_CK = torch.rand(len(users_C), 2, generator=torch.Generator().manual_seed(1))
    slices_SC = torch.stack([torch.ones(len(users_C), dtype=torch.bool), users_C % 4 == 3])
    whole = bootstrap(values_CK, slices_SC, users_C, resamples=400)
    monkeypatch.setattr("models.judge.bootstrap.SCORES", 400 * 7)
    chunked = bootstrap(values_CK, slices_SC, users_C, resamples=400)
    for found in (whole, chunked):
        assert found.mean_SK[0].tolist() == pytest.approx(values_CK.mean(0).tolist())
        assert found.n_S.tolist() == [60, 15]
        assert found.mean_RSK.mean(0).flatten().tolist() == pytest.approx(found.mean_SK.flatten().tolist(), abs=0.02)
