"""LLM-ESR: two views of an item, causal attention between them, users pulled towards like users."""

from __future__ import annotations

import pytest
import torch

from models.behaviour.data import Histories, histories
from models.behaviour.llm_esr import SCALE, Distiller, DualItems, DualView, like_users
from models.behaviour.recommender import Backbone, build_sequence


def logs(lists: list[list[int]], train_end: list[int], catalogue: int) -> Histories:
    offsets = [0]
    for items in lists:
        offsets.append(offsets[-1] + len(items))
    flat = [item for items in lists for item in items]
    return histories(
        offsets=offsets, items=flat, timestamps=[0] * len(flat), train_end=train_end, valid_end=train_end, catalogue=catalogue
    )


def dual_items() -> DualItems:
    torch.manual_seed(0)
    return DualItems(torch.randn(5, 6), hidden=7, width=8)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_a_position_sees_itself_and_what_was_before_it_in_both_views(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name=name, width=6, max_len=5, dropout=0.0)  # type: ignore[arg-type]
    dual = DualView(build_sequence(backbone), 12).eval()
    emb_BLD, valid_BL = torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool)
    changed_BLD = emb_BLD.clone()
    changed_BLD[0, 3] += 1
    with torch.no_grad():
        same_BL = (dual(emb_BLD, valid_BL) - dual(changed_BLD, valid_BL)).abs().amax(-1) < 1e-5
    assert same_BL.tolist() == [[True, True, True, False, False]]


def test_padding_is_never_attended_to() -> None:
    torch.manual_seed(0)
    dual = DualView(build_sequence(Backbone(width=6, max_len=5, dropout=0.0)), 12).eval()
    emb_BLD, valid_BL = torch.randn(1, 5, 12), torch.tensor([[False, False, True, True, True]])
    other_BLD = emb_BLD.clone()
    other_BLD[0, :2] = 9
    with torch.no_grad():
        assert torch.allclose(dual(emb_BLD, valid_BL)[:, 2:], dual(other_BLD, valid_BL)[:, 2:], atol=1e-5)
        assert torch.allclose(dual(emb_BLD, valid_BL)[:, -1], dual(emb_BLD[:, 2:], valid_BL[:, 2:])[:, -1], atol=1e-5)


def test_each_view_asks_the_other() -> None:
    torch.manual_seed(0)
    dual = DualView(build_sequence(Backbone(width=6, max_len=3, dropout=0.0)), 12).eval()
    emb_BLD, valid_BL = torch.randn(1, 3, 12), torch.ones(1, 3, dtype=torch.bool)
    for changed, other in ((slice(0, 6), slice(6, 12)), (slice(6, 12), slice(0, 6))):
        moved_BLD = emb_BLD.clone()
        moved_BLD[..., changed] += 1
        with torch.no_grad():
            assert (dual(emb_BLD, valid_BL) - dual(moved_BLD, valid_BL))[..., other].abs().max() > 1e-3


def test_an_id_vector_starts_as_the_texts_principal_directions_and_padding_is_zero() -> None:
    items = dual_items()
    table_VD = items.table().detach()
    assert torch.equal(table_VD[0], torch.zeros(8))
    assert torch.allclose(table_VD[1:, 4:], SCALE * items.white_VK[1:, :4])
    assert torch.allclose(items(torch.tensor([[2, 0]]))[0], table_VD[[2, 0]], atol=1e-5)


def test_an_item_never_trained_keeps_the_id_vector_it_would_have_started_from() -> None:
    items = dual_items()
    with torch.no_grad():
        items.learned += 1
        emb_ND = items.project(items.white_VK[[1, 1]], torch.tensor([1, 0]))
    assert torch.allclose(emb_ND[0], items.table()[1].detach(), atol=1e-5)
    assert torch.allclose(emb_ND[1, 4:], SCALE * items.white_VK[1, :4])


def test_settings_that_cant_be_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        DualItems(torch.randn(3, 4), hidden=4, width=7)
    with pytest.raises(ValueError, match="causal"):
        DualView(build_sequence(Backbone(name="bert4rec", width=6)), 12)


def test_like_users_touched_like_texts_in_train_rows_and_nobody_is_like_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    white_VK = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    # the last user has no train event, the one before touched like items in test rows alone
    events = logs([[1, 1], [2, 2], [3, 3], [4, 4], [3, 1, 1, 1], [1]], [2, 2, 2, 2, 1, 0], 4)
    like_US = like_users(events, white_VK, 2)
    assert [sorted(row) for row in like_US.tolist()[2:]] == [[3, 4], [2, 4], [2, 3], [6, 6]]
    assert like_US[0].tolist()[0] == 1
    assert like_US[1].tolist()[0] == 0
    monkeypatch.setattr("models.behaviour.llm_esr.CHUNK", 8)
    assert torch.equal(like_US, like_users(events, white_VK, 2))


def test_a_user_is_pulled_towards_the_mean_of_like_users_met_before() -> None:
    events = logs([[1, 1]] * 3, [2] * 3, 1)
    distiller = Distiller(events, torch.tensor([[1, 2], [0, 2], [0, 1]]), width=2, alpha=0.5)
    end_B = torch.tensor([2])
    assert float(distiller(torch.tensor([1]), end_B, torch.tensor([[1.0, 1.0]]))) == 0  # nobody like him was met
    assert float(distiller(torch.tensor([2]), end_B, torch.tensor([[3.0, 3.0]]))) == 0.5 * 4
    user_BD = torch.zeros(1, 2, requires_grad=True)
    loss = distiller(torch.tensor([0]), end_B, user_BD)
    assert float(loss) == 0.5 * 4  # the mean of 1 and 3, squared
    torch.autograd.backward(loss)
    assert user_BD.grad is not None
    assert bool((user_BD.grad < 0).all())


def test_older_rows_of_a_user_and_the_empty_row_of_an_odd_batch_distil_nothing() -> None:
    events = logs([[1] * 4] * 2, [4] * 2, 1)
    distiller = Distiller(events, torch.tensor([[1], [0]]), width=1, alpha=1.0)
    distiller(torch.tensor([0]), torch.tensor([4]), torch.ones(1, 1))
    for user, end in ((0, 2), (0, 0)):
        assert float(distiller(torch.tensor([user]), torch.tensor([end]), torch.full((1, 1), 9.0))) == 0
    assert float(distiller(torch.tensor([1]), torch.tensor([4]), torch.zeros(1, 1))) == 1
