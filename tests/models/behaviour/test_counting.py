"""The counting part: each closed form against its definition on small logs; train rows alone count."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour import counting
from models.behaviour.counting import Counting, cooccurrence, counting_items
from models.behaviour.data import Histories, train_counts
from models.behaviour.recommender import FadingMean
from models.behaviour.whitening import fit_whitening
from tests.models.behaviour.small_world import EACH, ITEMS, KINDS, USERS, events, later_changed, texts

EVERY: tuple[Counting, ...] = ("cooccurrence", "transitions", "ease", "l3ae")


def white() -> Tensor:
    llm_NE = texts()
    found: Tensor = fit_whitening(llm_NE, 12)(llm_NE)
    return found


def test_counting_puts_items_of_one_history_together_and_leaves_cold_ones_at_zero() -> None:
    logs = events()
    weight_VD = counting_items(logs, KINDS).weight
    counts_V = train_counts(logs)
    assert float(weight_VD[counts_V == 0].abs().max()) < 1e-6
    warm_N = (counts_V[1:] > 0).nonzero().flatten()
    kind_N = warm_N // EACH
    near_NN = weight_VD[1:][warm_N] @ weight_VD[1:][warm_N].T
    same_NN = kind_N[:, None] == kind_N[None]
    assert float(near_NN[same_NN].mean()) > 10 * float(near_NN[~same_NN].abs().mean())


def test_cosines_of_cooccurrence_are_rebuilt_when_no_direction_is_left_out() -> None:
    logs = events()
    place_2P, times_P = cooccurrence(logs)
    total_V = torch.zeros(ITEMS + 1).index_add_(0, place_2P[0], times_P)
    cosine_VV = torch.zeros(ITEMS + 1, ITEMS + 1)
    cosine_VV[place_2P[0], place_2P[1]] = times_P / (total_V[place_2P[0]] * total_V[place_2P[1]]).sqrt()
    value, _ = torch.linalg.eigh(cosine_VV)
    weight_VD = counting_items(logs, KINDS).weight
    # the six kinds are the six leading eigenvalues
    assert torch.linalg.eigvalsh(weight_VD.T @ weight_VD).flip(0).tolist() == pytest.approx(
        value.flip(0)[:KINDS].tolist(), rel=0.02
    )


def had(logs: Histories) -> Tensor:
    """had_UV float64: who had what in train rows."""
    train_N = logs.position_N < logs.train_end_U[logs.user_N]
    had_UV = torch.zeros(USERS, ITEMS + 1, dtype=torch.float64)
    had_UV[logs.user_N[train_N], logs.items_N[train_N]] = 1
    return had_UV


def test_the_gram_matrix_counts_users_with_both_items_in_chunks_too() -> None:
    logs = events()
    wanted_VV = had(logs).T @ had(logs)
    for at_once in (4096, 7):
        assert torch.equal(counting.gram(logs, at_once), wanted_VV)


def test_partial_correlations_hold_eases_weights() -> None:
    logs = events()
    had_UV = had(logs)
    gram_VV = had_UV.T @ had_UV
    ridge = counting.RIDGE * counting.mean_count(gram_VV)
    item, others = 5, torch.tensor([column for column in range(ITEMS + 1) if column != 5])
    # EASE's column by its definition: the ridge regression of an item on all others
    ease_M = torch.linalg.solve(gram_VV[others][:, others] + ridge * torch.eye(ITEMS, dtype=torch.float64), gram_VV[others, item])
    inverse_V = torch.linalg.inv(gram_VV + ridge * torch.eye(ITEMS + 1, dtype=torch.float64)).diagonal()
    found_M = counting.partial_correlations(logs)[others, item].double() * (inverse_V[others] / inverse_V[item]).sqrt()
    torch.testing.assert_close(found_M, ease_M, atol=1e-6, rtol=1e-4)


def test_l3ae_is_the_minimum_of_its_loss() -> None:
    logs, white_NK = events(), white()
    had_UV = had(logs)
    mean = counting.mean_count(had_UV.T @ had_UV)
    text_VV = counting.text_weights(white_NK)
    assert not text_VV.diagonal().any()
    free_VV = counting.pulled_to_text(logs, white_NK).double().requires_grad_()
    loss = (
        (had_UV - had_UV @ free_VV).square().sum()
        + counting.RIDGE * mean * free_VV.square().sum()
        + counting.TEXT_PULL * mean * (free_VV - text_VV).square().sum()
    )
    loss.backward()
    assert free_VV.grad is not None
    off_VV = free_VV.grad.clone().fill_diagonal_(0)
    size = float((2 * (counting.RIDGE + counting.TEXT_PULL) * mean * free_VV.detach()).abs().max())
    assert float(off_VV.abs().max()) < 1e-4 * size


def test_texts_weigh_one_another_as_the_ridge_of_their_definition_does() -> None:
    white_NK = white()
    text_NK = F.normalize(white_NK, dim=1).double()
    gram_NN = text_NK @ text_NK.T + counting.TEXT_RIDGE * torch.eye(ITEMS, dtype=torch.float64)
    inverse_NN = torch.linalg.inv(gram_NN)
    wanted_NN = (-inverse_NN / inverse_NN.diagonal()[None]).fill_diagonal_(0)
    torch.testing.assert_close(counting.text_weights(white_NK)[1:, 1:], wanted_NN)


@pytest.mark.parametrize("kind", ["transitions", "l3ae"])
def test_a_directed_table_is_rebuilt_by_its_two_sides_the_right_way_round(kind: Counting) -> None:
    logs = events()
    table_VV = counting.following(logs).to_dense() if kind == "transitions" else counting.pulled_to_text(logs, white())
    weight_VD = counting_items(logs, 2 * ITEMS, kind, white()).weight
    found_VR, read_VR = weight_VD.chunk(2, dim=1)
    torch.testing.assert_close(read_VR @ found_VR.T, table_VV, atol=2e-5, rtol=0)
    assert float((table_VV - table_VV.T).abs().max()) > 2e-4


def test_a_fading_mean_of_two_sides_reads_one_and_asks_for_the_other() -> None:
    emb_BLD = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    valid_BL = torch.tensor([[True, True, True], [False, False, True]])
    user_BD = FadingMean(0.5, 3, sides=True)(emb_BLD, valid_BL)[:, -1]
    torch.testing.assert_close(user_BD[:, :3], FadingMean(0.5, 3)(emb_BLD[..., 3:], valid_BL)[:, -1])
    assert not user_BD[:, 3:].any()


@pytest.mark.parametrize("kind", EVERY)
def test_every_kind_is_the_same_each_time_and_blind_to_what_comes_after_training(kind: Counting) -> None:
    logs, white_NK = events(), white()
    first, again, later = (counting_items(some, 8, kind, white_NK).weight for some in (logs, logs, later_changed(logs)))
    assert first.shape == (ITEMS + 1, 8) and first[1:].any() and not first[0].any()
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(first, later)


def test_without_two_train_events_of_a_user_there_is_nothing_to_count() -> None:
    logs = events()
    none = Histories(**{**vars(logs), "train_end_U": torch.zeros_like(logs.train_end_U)})
    for kind in EVERY[:3]:
        assert not counting_items(none, 8, kind).weight.any()


def test_what_cannot_be_counted_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'svd' is none of cooccurrence"):
        counting_items(events(), 8, "svd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reads whitened text"):
        counting_items(events(), 8, "l3ae")
    monkeypatch.setattr(counting, "DENSE", ITEMS - 1)
    with pytest.raises(ValueError, match="120 items are more than 119"):
        counting_items(events(), 8, "ease")
