"""The floors: counted in train rows alone, right under ties, and a distribution over the catalogue."""

from __future__ import annotations

import pytest
import torch

from models.behaviour.data import Histories, histories
from models.judge.floors import count, repeat_markov_popularity


def logs(lists: list[list[int]], train_end: list[int], catalogue: int) -> Histories:
    offsets = [0]
    for items in lists:
        offsets.append(offsets[-1] + len(items))
    flat = [item for items in lists for item in items]
    return histories(
        offsets=offsets, items=flat, timestamps=[0] * len(flat), train_end=train_end, valid_end=train_end, catalogue=catalogue
    )


def test_held_out_events_never_count() -> None:
    counted = count(logs([[1, 2, 3, 3], [1, 2, 4]], [2, 2], 4))
    assert counted.counts_V.tolist() == [0, 2, 2, 0, 0]
    assert counted.next_T.tolist() == [2]
    assert counted.times_T.tolist() == [2]
    assert counted.repeat_share == 0


def test_transitions_never_cross_from_one_user_to_the_next() -> None:
    counted = count(logs([[1, 2], [3, 4]], [2, 2], 4))
    assert [(first, int(counted.next_T[counted.start_V1[first]])) for first in (1, 3)] == [(1, 2), (3, 4)]
    assert int(counted.start_V1[-1]) == 2


def test_what_followed_the_newest_item_comes_first_and_repeats_only_where_logs_repeat() -> None:
    counted = count(logs([[1, 2], [1, 2], [3, 4], [4, 3]], [2, 2, 2, 2], 5))
    scores_BV = repeat_markov_popularity(counted, torch.tensor([[0, 1], [2, 1]]))
    assert int(scores_BV[0].argmax()) == 2
    assert float(scores_BV[1, 2]) == 0  # touched, and nobody here touches twice
    repeating = count(logs([[1, 1, 1, 2, 2]], [5], 3))
    assert repeating.repeat_share == pytest.approx(3 / 4)
    scores_BV = repeat_markov_popularity(repeating, torch.tensor([[0, 1, 1, 2]]))
    assert scores_BV[0, 1:].argsort(descending=True).tolist() == [0, 1, 2]


def test_scores_are_a_distribution_over_the_items_and_padding_has_none() -> None:
    counted = count(logs([[1, 2, 1], [2, 3, 4]], [3, 3], 6))
    scores_BV = repeat_markov_popularity(counted, torch.tensor([[0, 0, 5], [1, 2, 1]]))
    assert scores_BV[:, 0].tolist() == [-torch.inf] * 2
    assert scores_BV[1, 1:].sum() == pytest.approx(1.0)
    assert bool((scores_BV[:, 1:] >= 0).all())


def test_logs_without_a_transition_leave_popularity() -> None:
    counted = count(logs([[1], [1], [2]], [1, 1, 1], 3))
    scores_BV = repeat_markov_popularity(counted, torch.tensor([[3]]))
    assert scores_BV[0, 1:].argsort(descending=True).tolist() == [0, 1, 2]
