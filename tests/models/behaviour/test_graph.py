"""The graph view: a closed form on a path, train rows alone, zeros for cold items, which text fills in the fused recommender."""

import dataclasses

import pytest
import torch

from models.behaviour.assembly import Fusion, assemble, part_options
from models.behaviour.data import histories, train_counts
from models.behaviour.graph import graph_recommender, graph_table, propagated
from models.behaviour.recommender import Backbone
from tests.models.behaviour.small_world import COLD, EACH, ITEMS, events, later_changed, material


def test_on_a_path_of_three_nodes_it_is_the_closed_form() -> None:
    """a - b - c: S sends 1/sqrt(2) from a to b and from b to a and c; S² = [[1, 0, 1], [0, 2, 0], [1, 0, 1]] / 2."""
    half = 0.5**0.5
    step = torch.tensor([[0, half, 0], [half, 0, half], [0, half, 0]])
    square = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    torch.testing.assert_close(step @ step, square)
    # S⁴ = S²: the mean over 2 and 4 is S²
    found = propagated(torch.tensor([0, 1]), torch.tensor([1, 2]), torch.eye(3), 4)
    torch.testing.assert_close(found, square)
    # with a fourth node S⁴ is another: the ends send to their neighbours 1/sqrt(2), those to each other 1/2
    step = torch.zeros(4, 4)
    for one, other, value in ((0, 1, half), (1, 2, 0.5), (2, 3, half)):
        step[one, other] = step[other, one] = value
    found = propagated(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3]), torch.eye(4), 4)
    torch.testing.assert_close(found, (step @ step + torch.linalg.matrix_power(step, 4)) / 2)


def test_an_items_own_random_vector_does_not_drown_what_it_collects() -> None:
    """Two items of the same users are one; rows are of length one, however many took them."""
    offsets = torch.arange(0, 13, 2).tolist()
    logs = histories(items=[1, 2] * 5 + [3, 3], train_end=[2] * 6, offsets=offsets, timestamps=[1, 2] * 6, valid_end=[2] * 6,
                     catalogue=3)  # fmt: skip
    table_VD = graph_table(logs, 16)
    torch.testing.assert_close(table_VD[1], table_VD[2])
    torch.testing.assert_close(table_VD[1:].norm(dim=1), torch.ones(3))
    assert float(table_VD[1] @ table_VD[3]) < 0.9


def test_items_that_users_share_are_alike_and_cold_ones_are_zero() -> None:
    logs = events()
    table_VD = graph_table(logs, 64)
    assert not table_VD[0].any()
    assert not table_VD[torch.tensor(COLD)].any()
    assert bool((table_VD[train_counts(logs) > 0].norm(dim=1) > 0).all())
    near_NN = torch.nn.functional.normalize(table_VD[1:], dim=1) @ torch.nn.functional.normalize(table_VD[1:], dim=1).T
    kind_N = torch.arange(ITEMS) // EACH
    same_NN = kind_N[:, None] == kind_N[None]
    warm_N = train_counts(logs)[1:] > 0
    both_NN = warm_N[:, None] & warm_N[None] & ~torch.eye(ITEMS, dtype=torch.bool)
    assert float(near_NN[same_NN & both_NN].mean()) > float(near_NN[~same_NN & both_NN].mean()) + 0.2


def test_what_comes_after_training_teaches_nothing_and_a_rerun_is_equal() -> None:
    assert torch.equal(graph_table(events(), 8), graph_table(later_changed(events()), 8))


def test_an_item_taken_twice_by_a_user_is_one_edge() -> None:
    known = {"offsets": [0, 3, 5], "timestamps": [1, 2, 3, 1, 2], "valid_end": [3, 2], "catalogue": 2}
    twice = histories(items=[1, 1, 2, 1, 2], train_end=[3, 2], **known)  # type: ignore[arg-type]
    once = histories(items=[1, 2, 2, 1, 2], train_end=[2, 2], **known)  # type: ignore[arg-type]
    assert torch.equal(graph_table(twice, 4), graph_table(once, 4))


def test_an_empty_graph_is_refused() -> None:
    logs = events()
    with pytest.raises(ValueError, match="the graph is empty; extract a longer history"):
        graph_table(dataclasses.replace(logs, train_end_U=torch.zeros_like(logs.train_end_U)), 8)


def test_as_a_part_cold_items_are_filled_from_text_and_warm_ones_keep_their_place() -> None:
    given = material()
    (part, *_) = part_options(Fusion(graph_width=8), given, "graph", given.white_NK).values()
    alone = part.loaded(given.item_ids, given.whitening, "cpu")
    emb_ND = alone.from_white(given.white_NK, torch.arange(1, ITEMS + 1))
    cold_N = torch.tensor(COLD) - 1
    assert bool(emb_ND[cold_N].any(1).all())
    table_VD = graph_table(given.events, 8)
    share_N = (given.counts_V / (given.counts_V + 1))[1:, None]
    left_ND = emb_ND - share_N * table_VD[1:]
    torch.testing.assert_close(left_ND, (1 - share_N) * part.items.predicted(given.white_NK), atol=1e-5, rtol=0)


def test_as_a_part_it_is_chosen_by_validation_and_off_by_default() -> None:
    assert "graph" not in Fusion().parts
    assembled = assemble(dataclasses.replace(Fusion(), parts=("llmemb", "graph"), graph_width=16), material())
    assert assembled.found.relative["graph"] > 0
    assert assembled.found.alone["graph"] > assembled.found.alone["llmemb"]


def test_as_a_recommender_it_foretells_the_kind() -> None:
    logs = events()
    teacher = graph_recommender(logs, Backbone(width=16, max_len=6))
    user_1D = teacher.encode(torch.tensor([[1, 2, 3]]), teacher.item_table())
    assert int((user_1D @ teacher.item_table().T)[0].argmax()) - 1 in range(EACH)
