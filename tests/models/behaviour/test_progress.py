"""How a training goes: the best epoch is chosen on validation events alone, and a killed run loses no weights.

Two seeds and two parts of the histories stand in each test, so that a mix-up of the two shows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from models.behaviour import rat_step, training
from models.behaviour.data import Histories, cases, targets
from models.behaviour.losses import LOSSES
from models.behaviour.progress import Progress, Trained, make_validation
from models.behaviour.recommender import Recommender
from models.behaviour.training import Training, train
from tests.models.behaviour.test_training import ITEMS, QUICK, cyclic, fresh, silent

RISE_AND_FALL = (0.1, 0.5, 0.3, 0.2, 0.1, 0.1)
"""Validation figures whose best epoch is the second."""


class Killed(Exception):
    """Stands for the end of a process."""


def changed(events: Histories, part: str) -> Histories:
    """The same histories with other items in one part."""
    found = events.position_N >= {"valid": events.train_end_U, "test": events.valid_end_U}[part][events.user_N]
    if part == "valid":
        found &= events.position_N < events.valid_end_U[events.user_N]
    return dataclasses.replace(events, items_N=torch.where(found, 1 + (events.items_N + 4) % ITEMS, events.items_N))


def history(events: Histories) -> list[dict[str, float]]:
    """Figures of a short training."""
    return list(train(fresh(), events, QUICK, max_len=6, seed=1, log=silent).history)


def test_the_best_epoch_is_chosen_on_validation_events_and_no_test_event_is_looked_at() -> None:
    events = cyclic()
    plain, other_test, other_valid = (history(given) for given in (events, changed(events, "test"), changed(events, "valid")))
    for name in ("loss", "ndcg", "recall"):
        assert [one[name] for one in other_test] == pytest.approx([one[name] for one in plain], rel=1e-5)
    assert [one["loss"] for one in other_valid] == pytest.approx([one["loss"] for one in plain], rel=1e-5)
    assert all(abs(one["ndcg"] - two["ndcg"]) > 0.01 for one, two in zip(other_valid, plain, strict=True))


def test_validation_asks_for_the_validation_event_of_every_user() -> None:
    events = cyclic()
    chunks = make_validation(events, torch.arange(1, ITEMS + 1), 99, 6).chunks
    asked = sorted((int(user), int(place)) for users, position, _ in chunks for user, place in zip(users, position, strict=True))
    assert asked == [(user, int(events.valid_end_U[user]) - 1) for user in range(len(events.valid_end_U))]
    of_test = targets(events, *cases(events, "test"))
    of_valid = torch.cat([targets(events, users, position) for users, position, _ in chunks])
    assert sorted(of_valid.tolist()) != sorted(of_test.tolist()), "the fixture can't tell the parts apart"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation says what RISE_AND_FALL says, whatever was learned."""
    plain = Progress.add

    def add(self: Progress, found: dict[str, float]) -> None:
        # the epoch at hand, in a resumed run too
        plain(self, found | {"ndcg": RISE_AND_FALL[self.epoch]})

    monkeypatch.setattr(Progress, "add", add)


def run(recommender: Recommender, epochs: int, *, seed: int, log: Any = silent, checkpoint: Path | None = None) -> Trained:
    config = Training(epochs=epochs, patience=99, batch=8, loss="sampled", negatives=4)
    return train(recommender, cyclic(), config, max_len=6, seed=seed, log=log, checkpoint=checkpoint)


def equal(one: Recommender, two: Recommender) -> bool:
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.usefixtures("scripted")
def test_the_weights_left_are_those_of_the_best_epoch_and_not_the_last(seed: int) -> None:
    whole, two_epochs, last = fresh(dropout=0.3), fresh(dropout=0.3), fresh(dropout=0.3)
    done = run(whole, 6, seed=seed)
    run(two_epochs, 2, seed=seed)
    assert (done.best_epoch, done.epochs) == (2, 6)
    assert equal(whole, two_epochs)
    run(last, 1, seed=seed)
    assert not equal(whole, last)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.usefixtures("scripted")
def test_a_training_killed_after_its_best_epoch_ends_with_the_best_weights(tmp_path: Path, seed: int) -> None:
    def dies(figures: dict[str, float], epoch: int) -> None:
        if epoch == 5:
            raise Killed

    straight, path = fresh(dropout=0.3), tmp_path / "run.safetensors"
    whole = run(straight, 6, seed=seed)
    with pytest.raises(Killed):
        run(fresh(dropout=0.3), 6, seed=seed, log=dies, checkpoint=path)
    # another process starts from other weights
    resumed = fresh(dropout=0.3, seed=99)
    rest = run(resumed, 6, seed=seed, checkpoint=path)
    assert rest.best_epoch == whole.best_epoch == 2
    assert equal(resumed, straight)


@pytest.mark.parametrize("loss", ["full", *LOSSES])
@pytest.mark.parametrize("per", ["batch", "position"])
def test_an_item_that_is_no_candidate_is_never_a_negative_in_a_whole_training(loss: str, per: str) -> None:
    # nobody touches the last item: only negatives could move its vector
    events = cyclic()
    events = dataclasses.replace(events, items_N=events.items_N.clamp_max(ITEMS - 1))
    config = dataclasses.replace(QUICK, loss=loss, negatives=16, negatives_per=per)
    moved = []
    for candidates_M in (torch.arange(1, ITEMS), torch.arange(1, ITEMS + 1)):
        recommender = fresh()
        before = recommender.item_table()[ITEMS].detach().clone()
        train(recommender, events, config, max_len=6, seed=1, log=silent, candidates_M=candidates_M)
        # of the last epoch's weights or of any other: each has taken steps
        moved.append(float((recommender.item_table()[ITEMS].detach() - before).abs().max()))
    assert moved[0] == 0
    assert moved[1] > 1e-3


def test_the_prior_of_logit_adjustment_counts_train_events_alone_and_is_weighed() -> None:
    events = cyclic()
    # the first item is in two train events of each user
    uneven = dataclasses.replace(events, items_N=torch.where(events.position_N < 2, 1, events.items_N))
    counts = torch.zeros(ITEMS + 1)
    for user in range(len(uneven.train_end_U)):
        start, end = int(uneven.offsets_U1[user]), int(uneven.train_end_U[user])
        for item in uneven.items_N[start : start + end].tolist():
            counts[item] += 1
    for strength in (0.0, 0.5, 1.0):
        config = dataclasses.replace(QUICK, logit_adjustment=strength)
        for given in (uneven, changed(changed(uneven, "test"), "valid")):
            task, _ = training.make_task(fresh(), given, config, 6, torch.arange(1, ITEMS + 1), None, 1)
            wanted = strength * (counts / counts.sum()).log()
            torch.testing.assert_close(task.prior_V[1:], wanted[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_adjusted_full_loss_is_the_cross_entropy_of_scores_raised_by_the_prior(strength: float) -> None:
    recommender, events = fresh(), cyclic()
    events = dataclasses.replace(events, items_N=torch.where(events.position_N < 2, 1, events.items_N))
    config = dataclasses.replace(QUICK, logit_adjustment=strength)
    task, _ = training.make_task(recommender, events, config, 6, torch.arange(1, ITEMS + 1), None, 1)
    hidden_PD, label_P = torch.randn(ITEMS, 16, generator=torch.Generator().manual_seed(0)), torch.arange(1, ITEMS + 1)
    found_P = rat_step.recommendation(task, hidden_PD, label_P, recommender.items)
    scores_PM = hidden_PD @ recommender.item_table()[1:].T
    wanted_P = torch.nn.functional.cross_entropy(scores_PM + task.prior_V[1:], label_P - 1, reduction="none")
    torch.testing.assert_close(found_P, wanted_P, rtol=1e-5, atol=1e-5)
    plain_P = torch.nn.functional.cross_entropy(scores_PM, label_P - 1, reduction="none")
    assert float((found_P - plain_P).abs().max()) > 0.1
