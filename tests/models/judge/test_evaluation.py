"""Held-out cases: groups from train rows only, repeats, users, and ranks that agree with a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.behaviour.data import Histories, histories
from models.behaviour.items import IdItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.judge.evaluation import SLICES, Cases, floor_ranks, make_cases, span_ranks, vector_ranks
from tests.models.tiny import scores_of


def logs(lists: list[list[int]], train_end: list[int], catalogue: int) -> Histories:
    offsets = [0]
    for items in lists:
        offsets.append(offsets[-1] + len(items))
    flat = [item for items in lists for item in items]
    return histories(
        offsets=offsets, items=flat, timestamps=[0] * len(flat), train_end=train_end, valid_end=train_end, catalogue=catalogue
    )


def cases_of(lists: list[list[int]], train_end: list[int], catalogue: int, **more: Any) -> Cases:
    known: dict[str, Any] = {"negatives": 4, "paper_tail": 4, "chunk": 4096, "seed": 0, **more}
    return make_cases(logs(lists, train_end, catalogue), "test", **known)


def in_slice(cases: Cases, name: str) -> list[bool]:
    found: list[bool] = cases.slices_SC[SLICES.index(name)].tolist()
    return found


def test_an_item_popular_in_held_out_rows_alone_stays_cold() -> None:
    """METHOD 5.6: the reference counts test rows, so that no test target is ever cold."""
    cases = cases_of([[1, 2, 9], [1, 3, 9], [1, 4, 9], [1, 5, 9], [1, 2, 1]], [2] * 5, 9)
    assert in_slice(cases, "cold") == [True, True, True, True, False]
    assert in_slice(cases, "head") == [False, False, False, False, True]
    # the paper's own rule does count them; it has a slice of its own
    assert in_slice(cases, "paper_tail") == [False] * 5


def test_each_target_is_in_one_item_group_either_new_or_repeat_and_of_one_kind_of_user() -> None:
    cases = cases_of([[1, 2, 3, 1], [2, 2, 4], [1, 3, 2, 5], [4, 1, 5, 5, 5, 1]], [3, 2, 3, 5], 6)
    of = {name: cases.slices_SC[place] for place, name in enumerate(SLICES)}
    assert (of["cold"].int() + of["tail"].int() + of["head"].int()).tolist() == [1] * 4
    assert (of["repeat"] ^ of["new"]).all()
    assert (of["short"] ^ of["long"]).all()
    assert cases.users_C[of["repeat"]].tolist() == [0, 3]
    assert cases.users_C[of["long"]].tolist() == [3]
    assert of["overall"].all()


def test_a_target_repeated_only_later_is_new() -> None:
    cases = make_cases(
        histories(offsets=[0, 4], items=[1, 2, 3, 3], timestamps=[0] * 4, train_end=[2], valid_end=[3], catalogue=3),
        "valid", negatives=1, paper_tail=4, chunk=9, seed=0,
    )  # fmt: skip
    assert in_slice(cases, "repeat") == [False]


@pytest.mark.parametrize("unseen", [False, True])
def test_parts_of_the_columns_rank_as_if_the_others_were_zero_and_histories_are_encoded_once(unseen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randint(1, 10, (4 + user % 3,), generator=generator).tolist() for user in range(30)]
    cases = cases_of(lists, [len(items) - 1 for items in lists], 9, unseen=unseen, chunk=7)
    table_VD = torch.nn.functional.pad(torch.randn(9, 6, generator=generator), (0, 0, 1, 0))
    encoded = [0]

    def encode(emb_BLD: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
        encoded[0] += len(emb_BLD)
        return emb_BLD.sum(1)

    def alone(start: int, stop: int) -> Any:
        keep_D = torch.zeros(6).index_fill_(0, torch.arange(start, stop), 1.0)
        return vector_ranks(cases, table_VD, lambda emb_BLD, valid_BL: emb_BLD.sum(1) * keep_D, 5)

    spans = [(0, 6), (0, 2), (2, 6)]
    found = span_ranks(cases, table_VD, encode, 5, spans)
    assert encoded == [30]
    for span, (full_C2, sampled_C2) in zip(spans, found, strict=True):
        assert torch.equal(full_C2, alone(*span)[0]) and torch.equal(sampled_C2, alone(*span)[1])


def test_an_empty_test_part_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="move the split"):
        cases_of([[1, 2], [3]], [2, 1], 3)


def test_a_user_whose_only_event_is_held_out_gives_no_case() -> None:
    cases = cases_of([[1], [1, 2]], [0, 1], 3)
    assert cases.users_C.tolist() == [1]


@pytest.mark.parametrize("unseen", [False, True])
def test_ranks_in_chunks_equal_a_plain_loop_over_users(unseen: bool) -> None:
    torch.manual_seed(0)
    lists = [torch.randint(1, 31, (length,)).tolist() for length in range(3, 23)]
    cases = cases_of(lists, [len(items) - 1 for items in lists], 30, chunk=3, unseen=unseen)
    recommender = Recommender(IdItems(31, 8), build_sequence(Backbone(width=8, max_len=6))).eval()
    table_VD = recommender.item_table().detach()

    def encode(emb_BLD: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
        user_BD: torch.Tensor = recommender.sequence(emb_BLD, valid_BL)[:, -1]
        return user_BD

    full_C, sampled_C = vector_ranks(cases, table_VD, encode, 6)
    for row, items in enumerate(lists):
        with torch.no_grad():
            scores_V = scores_of(recommender, torch.tensor([items[:-1][-6:]]))[0]
        asked = [items[-1], *cases.negative_CN[row].tolist()]
        hidden = set(items[:-1]) - {items[-1]} if unseen else set()
        above = [item for item in range(1, 31) if scores_V[item] > scores_V[items[-1]] and item not in hidden]
        assert full_C[row].tolist() == [1 + len(above)] * 2
        assert sampled_C[row].tolist() == [1 + int((scores_V[asked] > scores_V[items[-1]]).sum())] * 2


@pytest.mark.parametrize("unseen", [False, True])
def test_floors_rank_in_chunks_as_they_do_at_once(unseen: bool) -> None:
    torch.manual_seed(0)
    lists = [torch.randint(1, 13, (length,)).tolist() for length in range(3, 23)]
    ends = [len(items) - 1 for items in lists]
    at_once, by_two = (floor_ranks(cases_of(lists, ends, 12, chunk=chunk, unseen=unseen)) for chunk in (99, 2))
    for name, (full_C, sampled_C) in at_once.items():
        assert torch.equal(full_C, by_two[name][0])
        assert torch.equal(sampled_C, by_two[name][1])


def test_popularity_tells_of_ties_and_can_leave_out_what_was_seen() -> None:
    lists, ends = [[1, 2, 3], [1, 2, 4], [1, 5, 2]], [2, 2, 2]  # train counts 3, 2, 0, 0, 1
    assert floor_ranks(cases_of(lists, ends, 5))["popularity"][0].tolist() == [[4, 5], [4, 5], [2, 2]]
    assert floor_ranks(cases_of(lists, ends, 5, unseen=True))["popularity"][0].tolist() == [[2, 3], [2, 3], [1, 1]]


def test_chunks_shrink_where_histories_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.judge.evaluation.SCORES", 40)
    cases = cases_of([[1, 2, 3]] * 6 + [[1, 2] * 15 + [3]] * 2, [2] * 6 + [30] * 2, 3)
    ranges = list(cases.chunks(5, 1))
    assert [place for some, _ in ranges for place in range(some.start, min(some.stop, 8))] == list(range(8))
    assert ranges[-1] == (slice(7, 8), 30)
    assert all((some.stop - some.start) * (5 + longest) <= 40 or some.stop - some.start == 1 for some, longest in ranges)


def test_a_history_of_ten_thousand_events_is_ranked() -> None:
    cases = cases_of([[1, 2] * 5000 + [3], [1, 2, 3]], [10_000, 2], 4)
    assert [len(ranks[0]) for ranks in floor_ranks(cases).values()] == [2, 2]
