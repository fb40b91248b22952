"""GRU4Rec: causal, blind to padding, equal to torch's GRU on the events alone."""

import torch

from models.behaviour.gru4rec import GRU4Rec, roll_rows


def encoder() -> GRU4Rec:
    torch.manual_seed(0)
    return GRU4Rec(width=8, layers=2, heads=1, dropout=0.5, max_len=6).eval()


def test_left_padding_does_not_push_the_state_off_zero() -> None:
    emb = torch.randn(2, 3, 8)
    padded = torch.cat([torch.zeros(2, 3, 8), emb], dim=1)
    valid = torch.tensor([[False] * 3 + [True] * 3] * 2)
    assert torch.allclose(encoder()(emb, torch.ones(2, 3, dtype=torch.bool)), encoder()(padded, valid)[:, 3:], atol=1e-5)


def test_it_is_the_gru_over_the_events_alone() -> None:
    model, emb = encoder(), torch.randn(1, 4, 8)
    state = emb * model.scale
    for layer in model.recurrent:
        state = layer(state)[0]
    assert torch.allclose(model(emb, torch.ones(1, 4, dtype=torch.bool)), model.norm(state), atol=1e-5)


def test_position_t_does_not_see_any_later_item() -> None:
    emb, valid = torch.randn(2, 6, 8), torch.tensor([[False] + [True] * 5] * 2)
    other = emb.clone()
    other[:, 4:] = 0.0
    assert torch.allclose(encoder()(emb, valid)[:, 1:4], encoder()(other, valid)[:, 1:4], atol=1e-5)


def test_a_row_of_nothing_but_padding_is_finite() -> None:
    assert encoder()(torch.zeros(1, 6, 8), torch.zeros(1, 6, dtype=torch.bool)).isfinite().all()


def test_rows_roll_left_each_by_its_own_shift_and_back() -> None:
    rows = torch.arange(8.0).view(2, 4, 1)
    rolled = roll_rows(rows, torch.tensor([1, 3]))
    assert rolled[..., 0].tolist() == [[1, 2, 3, 0], [7, 4, 5, 6]]
    assert torch.equal(roll_rows(rolled, torch.tensor([-1, -3])), rows)
