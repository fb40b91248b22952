"""SASRec: causal, blind to padding, finite on empty rows."""

import pytest
import torch

from models.behaviour.items import IdItems
from models.behaviour.recommender import Recommender
from models.behaviour.sasrec import Block, SASRec, attention_mask


def encoder(max_len: int = 6) -> SASRec:
    torch.manual_seed(0)
    return SASRec(width=8, layers=2, heads=2, dropout=0.5, max_len=max_len).eval()


def test_position_t_does_not_see_any_later_item() -> None:
    emb, valid = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    other = emb.clone()
    other[:, 4:] = torch.randn(3, 2, 8)
    before, after = encoder()(emb, valid), encoder()(other, valid)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-5)
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


def test_what_stands_in_padding_changes_nothing() -> None:
    emb, valid = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    valid[:, :3] = False
    other = emb.clone()
    other[:, :3] = 100.0
    assert torch.allclose(encoder()(emb, valid)[:, 3:], encoder()(other, valid)[:, 3:], atol=1e-5)


def test_more_padding_on_the_left_changes_nothing() -> None:
    emb = torch.randn(2, 3, 8)
    padded = torch.cat([torch.zeros(2, 3, 8), emb], dim=1)
    valid = torch.tensor([[False] * 3 + [True] * 3] * 2)
    short = encoder()(emb, torch.ones(2, 3, dtype=torch.bool))
    assert torch.allclose(short, encoder()(padded, valid)[:, 3:], atol=1e-5)


def test_a_row_of_nothing_but_padding_is_finite_and_gives_finite_gradients() -> None:
    model = encoder().train()
    hidden = model(torch.zeros(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool))
    hidden.square().sum().backward()
    assert hidden.isfinite().all()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_mask_lets_each_query_see_valid_keys_up_to_itself() -> None:
    mask = attention_mask(torch.tensor([[False, True, True]]), causal=True)
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_order_of_the_history_matters() -> None:
    emb, valid = torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    model, swapped = encoder(), emb[:, [1, 0, 2, 3]]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    assert not torch.allclose(model(emb, valid)[:, -1], model(swapped, valid)[:, -1], atol=1e-4)


def test_attention_equals_a_plain_softmax_written_out() -> None:
    torch.manual_seed(1)
    block = Block(4, 1, 0.0).eval()
    x, mask = torch.randn(1, 3, 4), attention_mask(torch.ones(1, 3, dtype=torch.bool), causal=True)
    query, key, value = block.query_key_value(x)[0].split(4, dim=1)
    weights = (query @ key.T / 2).masked_fill(~mask[0, 0], -torch.inf).softmax(1)
    assert torch.allclose(block.attend(x, mask)[0], block.attend_out(weights @ value), atol=1e-5)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        SASRec(width=8, layers=1, heads=3, dropout=0.0, max_len=4)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_newest_position_alone_is_that_of_all(layers: int) -> None:
    torch.manual_seed(0)
    model = SASRec(width=8, layers=layers, heads=2, dropout=0.5, max_len=6).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # biases begin as zeros, which hide what is left out
    emb, valid = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
    valid[1, :3], valid[2, :] = False, False
    whole = model(emb, valid)[:, -1]
    torch.testing.assert_close(model.newest(emb, valid), whole)
    torch.testing.assert_close(model.served().newest(emb[:1], valid[:1]), whole[:1])  # without any padding
    assert not torch.allclose(whole, model(emb, valid)[:, -2], atol=1e-2)


def test_a_recommender_asks_for_the_newest_position_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recommender(IdItems(9, 8), encoder())
    history = torch.tensor([[0, 1, 2], [3, 4, 5]])
    wanted = model(history)[:, -1]
    monkeypatch.setattr(model.sequence, "forward", lambda *_: pytest.fail("all positions were encoded"))
    torch.testing.assert_close(model.encode(history), wanted)
