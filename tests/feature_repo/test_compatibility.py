"""Compatibility: a turned space is recognised, and churn is counted where neighbours changed."""

from __future__ import annotations

import numpy as np
import pytest

from feature_repo.compatibility import apart, churn, compare, procrustes

GENERATOR = np.random.default_rng(0)
OLD_ND = GENERATOR.normal(size=(300, 8)).astype(np.float32)
TURN_DD = np.linalg.qr(GENERATOR.normal(size=(8, 8)))[0].astype(np.float32)
GROUPS = ["head"] * 100 + ["tail"] * 200


def test_a_turned_space_is_alignable_and_keeps_all_neighbours() -> None:
    result = compare(OLD_ND, OLD_ND @ TURN_DD, GROUPS, same=False)
    assert (result.kind, result.residual, result.churn) == ("alignable", 0.0, {"head": 0.0, "tail": 0.0})


def test_the_rotation_is_found() -> None:
    turn_DD = procrustes(OLD_ND, OLD_ND @ TURN_DD)
    assert np.allclose(turn_DD, TURN_DD.T, atol=1e-5)
    assert apart(OLD_ND, OLD_ND @ TURN_DD @ turn_DD) == pytest.approx(0, abs=1e-5)


def test_what_a_rotation_leaves_over_is_the_noise() -> None:
    noise_ND = 0.05 * GENERATOR.normal(size=OLD_ND.shape).astype(np.float32)
    result = compare(OLD_ND, (OLD_ND + noise_ND) @ TURN_DD, GROUPS, same=False)
    assert result.kind == "alignable"
    assert result.distance > 0.5
    assert result.residual == pytest.approx(np.linalg.norm(noise_ND) / np.linalg.norm(OLD_ND), rel=0.05)
    assert compare(OLD_ND, OLD_ND + noise_ND, GROUPS, same=False).kind == "aligned"


def test_another_space_is_breaking_and_loses_nearly_all_neighbours() -> None:
    result = compare(OLD_ND, GENERATOR.normal(size=(300, 8)).astype(np.float32), GROUPS, same=False)
    assert result.kind == "breaking"
    assert min(result.churn.values()) > 0.9


def test_another_width_is_breaking() -> None:
    assert compare(OLD_ND, OLD_ND[:, :4], GROUPS, same=False).kind == "breaking"


def test_churn_is_counted_in_the_group_where_it_happened() -> None:
    moved_ND = OLD_ND.copy()
    moved_ND[:100] = GENERATOR.normal(size=(100, 8))
    lost = churn(OLD_ND, moved_ND, GROUPS)
    assert lost["head"] > 0.9
    assert lost["head"] > lost["tail"] > 0


def test_a_handful_of_items_can_be_compared() -> None:
    assert compare(OLD_ND[:1], OLD_ND[:1], ["head"], same=True).churn == {"head": 0.0}
    assert compare(OLD_ND[:0], OLD_ND[:0], [], same=True).items == 0
