"""Lists of a recommender and other orders of them, by hand."""

import dataclasses
import math

import pytest
import torch

from models.behaviour.data import histories
from models.judge.rerank import Lists, make_lists, oracle, placed

TABLE_VD = torch.tensor([[0.0], [5.0], [4.0], [3.0], [2.0]])
LOGS = histories(
    offsets=[0, 3, 7], items=[1, 2, 3, 4, 2, 1, 2], timestamps=range(7), train_end=[1, 2], valid_end=[2, 3], catalogue=4
)


def lists(part: str = "test", **more: object) -> Lists:
    known = {"top": 2, "most": 9, "unseen": True, **more}

    def encode(emb_BLD: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(emb_BLD), 1)

    return make_lists(LOGS, part, TABLE_VD, encode, 3, **known)  # type: ignore[arg-type]


def test_a_list_holds_the_best_items_that_the_user_has_not_had_and_a_repeat_that_came() -> None:
    # user 0 had 1 and 2, then came 3; user 1 had 4, 2 and 1, then came 2 once more
    assert lists().item_CM.tolist() == [[3, 4], [2, 3]]
    assert lists().place_C.tolist() == [0, 0]
    assert lists(unseen=False).item_CM.tolist() == [[1, 2], [1, 2]]
    assert lists(unseen=False).place_C.tolist() == [-1, 1]
    assert lists("valid").history_CL.tolist() == [[0, 0, 1], [0, 4, 2]]


def test_a_place_is_worth_its_discount_ties_are_a_block_and_what_is_not_there_is_worth_nothing() -> None:
    score_CM = torch.tensor([[3.0, 2.0], [3.0, 2.0], [1.0, 1.0], [9.0, 9.0]])
    found = placed(score_CM, torch.tensor([0, 1, 0, -1]))
    second = 1 / torch.tensor(3.0).log2()
    torch.testing.assert_close(found, torch.tensor([1, second, (1 + second) / 2, 0]).double(), atol=1e-6, rtol=0)
    assert oracle(torch.tensor([3, -1])).tolist() == [1, 0]


def test_a_mix_of_weight_nothing_is_the_recommender_s_order() -> None:
    found = dataclasses.replace(lists(), score_CM=torch.tensor([[3.0, 2.0], [1.0, 5.0]]))
    other_CM = torch.tensor([[0.0, 9.0], [4.0, 0.0]]).double()
    assert found.mixed(other_CM, 0.0).argmax(1).tolist() == [0, 1]
    assert found.mixed(other_CM, 2.0).argmax(1).tolist() == [1, 0]


def test_a_user_who_has_had_nearly_all_has_a_shorter_list_and_nothing_else_in_it() -> None:
    """User 0 had 1 and 2, then came 3: two items are left. User 1 had 4, 2 and 1, then came 2 once more."""
    found = lists(top=4)
    assert found.item_CM.tolist() == [[3, 4, 0, 0], [2, 3, 0, 0]]
    assert lists(top=4, unseen=False).item_CM.tolist() == [[1, 2, 3, 4]] * 2
    other_CM = torch.tensor([[0.0, 9.0, -torch.inf, -torch.inf], [9.0, 0.0, -torch.inf, -torch.inf]]).double()
    for weight, value in ((0.0, [1.0, 1.0]), (2.0, [1 / math.log2(3), 1.0])):
        torch.testing.assert_close(placed(found.mixed(other_CM, weight), found.place_C), torch.tensor(value).double())


def test_users_are_spread_evenly_and_a_part_without_events_is_refused() -> None:
    assert len(lists(most=1).place_C) == 1
    nothing = dataclasses.replace(LOGS, valid_end_U=LOGS.length_U, train_end_U=LOGS.length_U)
    with pytest.raises(ValueError, match="no user has an event in the test part"):
        make_lists(nothing, "test", TABLE_VD, lambda emb, valid: emb[:, -1], 3, top=2, most=9, unseen=True)
