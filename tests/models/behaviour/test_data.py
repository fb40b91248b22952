"""Histories: windows, splits, cases, groups and bad input."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from models.behaviour.data import (
    COLD,
    HEAD,
    TAIL,
    Histories,
    cases,
    held_out,
    histories,
    inputs_before,
    item_groups,
    leave_one_out,
    neighbours,
    targets,
    train_counts,
    training_rows,
    window,
    without_items,
)

ROOT = Path(__file__).parents[3]


def made(lists: list[list[int]], ends: list[tuple[int, int]], catalogue: int = 9) -> Histories:
    lengths = [len(events) for events in lists]
    return histories(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=np.array([item for events in lists for item in events], dtype=np.int64),
        timestamps=np.zeros(sum(lengths), dtype=np.int64),
        train_end=[train for train, _ in ends],
        valid_end=[valid for _, valid in ends],
        catalogue=catalogue,
    )


EVENTS = made([[1, 2, 3, 4, 5], [6], [7, 8]], [(3, 4), (1, 1), (2, 2)])


def test_inputs_are_left_padded_with_the_newest_event_last() -> None:
    inputs = inputs_before(EVENTS, torch.tensor([0, 0, 1]), torch.tensor([2, 5, 0]), 3)
    assert inputs.tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0]]


def test_a_window_never_reaches_into_another_users_history() -> None:
    assert window(EVENTS, torch.tensor([1, 2]), torch.tensor([1, 2]), 4).tolist() == [[0, 0, 0, 6], [0, 0, 7, 8]]


def test_a_case_is_the_last_event_of_its_part_with_everything_before_it_as_input() -> None:
    users, position = cases(EVENTS, "valid")
    assert (users.tolist(), position.tolist(), targets(EVENTS, users, position).tolist()) == ([0], [3], [4])
    users, position = cases(EVENTS, "test")
    assert (users.tolist(), position.tolist(), targets(EVENTS, users, position).tolist()) == ([0], [4], [5])


def test_users_without_events_in_a_part_or_with_nothing_before_it_give_no_case() -> None:
    lonely = made([[1], [1, 2], [3, 4]], [(0, 0), (2, 2), (0, 1)])
    assert cases(lonely, "test")[0].tolist() == [2]
    assert cases(lonely, "valid")[0].tolist() == []


def test_leave_one_out_trains_on_all_of_short_histories_and_holds_two_events_of_the_others() -> None:
    split = leave_one_out(EVENTS)
    assert split.train_end_U.tolist() == [3, 1, 2]
    assert split.valid_end_U.tolist() == [4, 1, 2]


def test_users_with_one_train_event_give_no_training_row() -> None:
    users, ends = training_rows(EVENTS, 4)
    assert (users.tolist(), ends.tolist()) == ([0, 2], [3, 2])


def test_all_windows_make_each_train_event_a_label_exactly_once() -> None:
    long = made([list(range(1, 10)), [1, 2]], [(9, 9), (2, 2)])
    users, ends = training_rows(long, 3, "all")
    labels = window(long, users, ends, 4)[:, 1:]
    inputs = window(long, users, ends, 4)[:, :-1]
    of_first = labels[(users == 0)[:, None] & (inputs != 0)]
    assert sorted(of_first.tolist()) == list(range(2, 10))


def test_popularity_counts_train_rows_only() -> None:
    assert train_counts(EVENTS).tolist() == [0, 1, 1, 1, 0, 0, 1, 1, 1, 0]


def test_groups_are_cold_without_train_events_and_head_for_the_most_popular_fifth_of_the_rest() -> None:
    counts = torch.tensor([0, 5, 1, 0, 9, 2, 2])
    assert item_groups(counts).tolist() == [-1, TAIL, TAIL, COLD, HEAD, TAIL, TAIL]


def test_held_items_are_the_same_in_every_job_and_never_padding() -> None:
    ids = [f"item{number}" for number in range(2000)]
    held = held_out(ids, 0.1, 42)
    assert torch.equal(held, held_out(ids, 0.1, 42))
    assert not torch.equal(held, held_out(ids, 0.1, 43))
    assert not held[0]
    assert 150 < int(held.sum()) < 250
    assert not held_out(ids, 0.0, 42).any()


def test_held_items_leave_train_rows_and_stay_in_later_ones() -> None:
    held = torch.zeros(10, dtype=torch.bool)
    held[[2, 5, 7]] = True
    rest = without_items(EVENTS, held)
    assert rest.items_N.tolist() == [1, 3, 4, 5, 6, 8]
    assert rest.offsets_U1.tolist() == [0, 4, 5, 6]
    assert (rest.train_end_U.tolist(), rest.valid_end_U.tolist()) == ([2, 1, 1], [3, 1, 1])
    assert train_counts(rest)[held].sum() == 0


@pytest.mark.parametrize("item", [0, 10, -3])
def test_an_item_out_of_the_catalogue_is_refused_with_its_index(item: int) -> None:
    with pytest.raises(ValueError, match=r"out of 1\.\.9"):
        made([[1, item]], [(2, 2)])


def test_a_split_outside_its_history_is_refused() -> None:
    with pytest.raises(ValueError, match="split lies outside"):
        made([[1, 2]], [(2, 3)])
    with pytest.raises(ValueError, match="split lies outside"):
        made([[1, 2]], [(2, 1)])


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        histories(offsets=[0, 3], items=[1, 2], timestamps=[0, 0], train_end=[1], valid_end=[1], catalogue=2)
    with pytest.raises(ValueError, match="offset"):
        histories(offsets=[0, 2, 2], items=[1, 2], timestamps=[0, 0], train_end=[1], valid_end=[1], catalogue=2)


def test_a_history_of_ten_thousand_events_is_read_by_its_newest() -> None:
    long = made([[1 + number % 9 for number in range(10_000)]], [(9_998, 9_999)])
    users, position = cases(long, "test")
    assert inputs_before(long, users, position, 4).tolist() == [[1 + number % 9 for number in range(9_995, 9_999)]]


def test_neighbours_follow_one_another_in_one_users_train_rows_and_differ() -> None:
    events = made([[1, 2, 2, 3, 4, 5], [6], [7, 8]], [(4, 5), (1, 1), (2, 2)])
    assert neighbours(events).tolist() == [[1, 2], [2, 3], [7, 8]]
    assert neighbours(made([[], [3]], [(0, 0), (1, 1)])).shape == (0, 2)


def test_train_rows_are_those_before_the_end_of_train_and_one_place_says_so() -> None:
    events = histories(offsets=[0, 4, 4, 6], items=[1, 2, 3, 4, 5, 1], timestamps=[0] * 6, train_end=[2, 0, 0],
                       valid_end=[3, 0, 1], catalogue=5)  # fmt: skip
    assert events.in_train_N.tolist() == [True, True, False, False, False, False]
    written = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "models").rglob("*.py")
        if re.search(r"< (\w+\.)?train_end_U\[", path.read_text())
    ]
    assert written == ["models/behaviour/data.py"]
