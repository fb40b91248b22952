"""Bert4Rec: masked items are hidden, padding unseen, the next item predicted behind a mask."""

import torch

from models.behaviour.bert4rec import Bert4Rec


def encoder() -> Bert4Rec:
    torch.manual_seed(0)
    return Bert4Rec(width=8, layers=2, heads=2, dropout=0.5, max_len=6).eval()


def test_a_masked_item_is_hidden_from_every_position() -> None:
    emb, valid = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.bool)
    masked = torch.zeros_like(valid)
    masked[:, 2] = True
    other = emb.clone()
    other[:, 2] = 50.0
    assert torch.allclose(encoder()(emb, valid, masked), encoder()(other, valid, masked), atol=1e-5)


def test_a_masked_position_sees_both_sides() -> None:
    emb, valid = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    masked = torch.zeros_like(valid)
    masked[:, 2] = True
    for place in (0, 4):
        other = emb.clone()
        other[:, place] = torch.randn(8)
        assert not torch.allclose(encoder()(emb, valid, masked)[:, 2], encoder()(other, valid, masked)[:, 2], atol=1e-4)


def test_the_next_item_is_predicted_behind_a_mask_after_the_newest_event() -> None:
    emb, valid = torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    explicit = torch.cat([emb, torch.zeros(1, 1, 8)], dim=1)
    masked = torch.tensor([[False] * 4 + [True]])
    behind = encoder()(explicit, torch.ones(1, 5, dtype=torch.bool), masked)[:, -1]
    assert torch.allclose(encoder()(emb, valid)[:, -1], behind, atol=1e-5)


def test_a_full_history_keeps_all_its_events() -> None:
    emb, valid = torch.randn(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    other = emb.clone()
    other[:, 0] = torch.randn(8)
    assert not torch.allclose(encoder()(emb, valid)[:, -1], encoder()(other, valid)[:, -1], atol=1e-4)


def test_padding_changes_nothing_and_empty_rows_are_finite() -> None:
    emb = torch.randn(2, 3, 8)
    padded = torch.cat([torch.full((2, 3, 8), 9.0), emb], dim=1)
    valid = torch.tensor([[False] * 3 + [True] * 3] * 2)
    short = encoder()(emb, torch.ones(2, 3, dtype=torch.bool))[:, -1]
    assert torch.allclose(short, encoder()(padded, valid)[:, -1], atol=1e-5)
    assert encoder()(torch.zeros(1, 6, 8), torch.zeros(1, 6, dtype=torch.bool)).isfinite().all()
