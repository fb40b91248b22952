"""The ranking without training tells encoders apart, on samples and on the whole catalogue, and decides nothing on too little."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.behaviour.data import histories, item_groups, train_counts
from models.judge.evaluation import SLICES
from models.judge.untrained import DECIDING, Worth, draw, untrained_ndcg, verdict, weigh

ITEMS, USERS, LONG, KINDS = 400, 300, 8, 20


def logs(seed: int = 0):  # type: ignore[no-untyped-def]
    """Users who stay with one kind of items; item i is of kind i % KINDS."""
    random = torch.Generator().manual_seed(seed)
    kind_U = torch.randint(KINDS, (USERS,), generator=random)
    rows = [torch.randperm(ITEMS // KINDS, generator=random)[:LONG] * KINDS + kind + 1 for kind in kind_U]
    ends = torch.full((USERS,), LONG)
    return histories(offsets=torch.arange(USERS + 1) * LONG, items=torch.cat(rows), timestamps=torch.arange(USERS * LONG),
                     train_end=ends - 2, valid_end=ends - 1, catalogue=ITEMS)  # fmt: skip


def told_by_kind(noise: float, seed: int = 0) -> torch.Tensor:
    """Embeddings in which items of a kind lie near each other."""
    random = torch.Generator().manual_seed(seed)
    centre = torch.randn(KINDS, 32, generator=random)
    return centre[torch.arange(ITEMS) % KINDS] + noise * torch.randn(ITEMS, 32, generator=random)


def test_an_encoder_that_knows_what_users_go_by_is_better_than_one_that_does_not() -> None:
    trial = draw(logs(), 10_000, 1)
    good, poor = told_by_kind(0.3), told_by_kind(3.0, 1)
    worth = weigh(trial, {"new": good, "base": poor, "same": good.clone()})
    assert worth.users == USERS and worth.ndcg["new"]["overall"] > 2 * worth.ndcg["base"]["overall"]
    assert verdict(worth, "new - base") == "better"
    assert verdict(worth, "new - same") == "no different" and worth.less["new - same"]["overall"] == (0, 0, 0)
    assert verdict(weigh(trial, {"new": poor, "base": good}), "new - base") == "worse"


def test_a_common_direction_and_scales_change_nothing_as_whitening_takes_them() -> None:
    trial, emb = draw(logs(), 10_000, 1), told_by_kind(0.3)
    bent = (emb + 30) * torch.linspace(0.1, 9, 32)
    torch.testing.assert_close(untrained_ndcg(trial, emb), untrained_ndcg(trial, bent), atol=2e-2, rtol=0)


def test_a_sample_holds_whole_cases_and_keeps_the_groups_of_all_train_rows() -> None:
    events = logs()
    trial = draw(events, 120, 3)
    assert 100 <= len(trial.rows_N) <= 150 and trial.cases.events.catalogue == len(trial.rows_N)
    assert 1 <= len(trial.cases.users_C) < USERS
    group_V = item_groups(train_counts(events))
    whole_C = trial.rows_N[trial.cases.target_C - 1] + 1
    for number, name in enumerate(("cold", "tail", "head")):
        assert torch.equal(trial.cases.slices_SC[SLICES.index(name)], group_V[whole_C] == number)
    # what a user had is the same, in their order
    own = events.items_N.view(USERS, LONG)[:, : LONG - 1]
    for user in range(len(trial.cases.events.train_end_U)):
        start, end = trial.cases.events.offsets_U1[user : user + 2]
        had = trial.rows_N[trial.cases.events.items_N[start:end] - 1] + 1
        assert any(torch.equal(had, row) or torch.equal(had[: LONG - 1], row) for row in own)
    assert torch.equal(trial.rows_N, draw(events, 120, 3).rows_N) and not torch.equal(trial.rows_N, draw(events, 120, 4).rows_N)


def test_embeddings_that_are_not_finite_or_all_equal_are_named() -> None:
    trial, emb = draw(logs(), 10_000, 1), told_by_kind(0.3)
    with pytest.raises(ValueError, match="not finite"):
        untrained_ndcg(trial, emb.index_fill(0, torch.tensor([3]), float("nan")))
    with pytest.raises(ValueError, match="same LLM embedding"):
        untrained_ndcg(trial, torch.ones(ITEMS, 32))


def test_no_validation_event_is_named() -> None:
    events = logs()
    with pytest.raises(ValueError, match="no user has an event in the valid part"):
        draw(dataclasses.replace(events, valid_end_U=events.train_end_U), 100, 0)


@pytest.mark.parametrize(
    ("users", "ends", "said"),
    [
        (99, {"overall": (0.1, 0.2)}, "unknown"),
        (100, {"overall": (0.1, 0.2)}, "better"),
        (100, {"overall": (0.1, 0.2), "cold": (-0.2, -0.1)}, "no different"),
        (100, {"overall": (-0.1, 0.2), "tail": (-0.2, -0.1)}, "worse"),
        (100, {"overall": (-0.1, 0.2), "head": (-0.2, -0.1)}, "no different"),
        (100, {"overall": (-0.2, -0.1)}, "worse"),
        (100, {"overall": (-0.1, 0.1), "cold": (float("nan"), float("nan"))}, "no different"),
    ],
)
def test_the_verdict_goes_by_overall_tail_and_cold(users: int, ends: dict[str, tuple[float, float]], said: str) -> None:
    less = {name: (sum(pair) / 2, *pair) for name, pair in ends.items()}
    assert set(DECIDING) == {"overall", "tail", "cold"}
    assert verdict(Worth(users=users, ndcg={}, less={"new - base": less}), "new - base") == said
