"""Whitening and adapters: unit variance, fixed signs, frozen text, clear errors."""

import pytest
import torch

from models.behaviour.items import MlpAdapter, NullSpaceItems, ResidualItems, TextItems
from models.behaviour.whitening import fit_whitening


def embeddings(items: int = 200, width: int = 12) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(items, width) @ torch.randn(width, width) + 5.0


def test_whitened_embeddings_have_mean_zero_and_unit_covariance() -> None:
    llm = embeddings()
    white = fit_whitening(llm, 8)(llm)
    assert white.shape == (200, 8)
    assert torch.allclose(white.mean(0), torch.zeros(8), atol=1e-4)
    assert torch.allclose(white.T @ white / 200, torch.eye(8), atol=1e-3)


def test_explained_variance_is_the_share_of_the_kept_directions() -> None:
    llm = torch.zeros(400, 3)
    torch.manual_seed(0)
    llm[:, 0], llm[:, 1], llm[:, 2] = 3 * torch.randn(400), 2 * torch.randn(400), torch.randn(400)
    variance = torch.linalg.eigvalsh(torch.cov(llm.T)).flip(0)
    assert fit_whitening(llm, 2).explained == pytest.approx(float(variance[:2].sum() / variance.sum()), rel=1e-4)
    assert fit_whitening(llm, 9).explained == pytest.approx(1.0)


def test_directions_without_variance_are_dropped_instead_of_blown_up() -> None:
    llm = embeddings(width=6)
    llm = torch.cat([llm, llm[:, :2], torch.ones(200, 1)], dim=1)
    whitening = fit_whitening(llm, 100)
    assert whitening.map_EK.shape == (9, 6)
    assert whitening(llm).abs().max() < 20


def test_fewer_items_than_dimensions_keep_the_items_own_rank() -> None:
    assert fit_whitening(embeddings(items=5), 12).map_EK.shape[1] == 4


def test_items_of_one_text_get_one_vector() -> None:
    llm = embeddings()
    llm[7] = llm[3]
    white = fit_whitening(llm, 8)(llm)
    assert torch.allclose(white[3], white[7], atol=1e-5)
    assert not torch.allclose(white[3], white[4], atol=1e-2)


def test_the_fit_does_not_depend_on_the_order_of_the_items() -> None:
    llm = embeddings()
    first, second = fit_whitening(llm, 6), fit_whitening(llm.flip(0), 6)
    assert torch.allclose(first.map_EK, second.map_EK, atol=1e-4)


def test_a_collapsed_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="same LLM embedding"):
        fit_whitening(torch.full((50, 8), 0.3), 8)


def test_a_value_that_is_not_finite_is_refused_with_its_row() -> None:
    llm = embeddings()
    llm[17, 2] = torch.nan
    with pytest.raises(ValueError, match="row 17"):
        fit_whitening(llm, 8)


def test_a_single_item_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 items"):
        fit_whitening(torch.randn(1, 8), 8)


def test_half_precision_embeddings_whiten_as_their_float_values() -> None:
    llm = embeddings().half()
    assert torch.allclose(fit_whitening(llm, 6)(llm), fit_whitening(llm.float(), 6)(llm.float()))


def test_the_adapter_bends_and_is_no_single_linear_map() -> None:
    torch.manual_seed(0)
    adapter, left, right = MlpAdapter(6, 16, 4), torch.randn(1, 6), torch.randn(1, 6)
    assert not torch.allclose(adapter(left + right), adapter(left) + adapter(right), atol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "residual", "null_space"])
def test_only_the_padding_row_is_zero_and_every_index_has_its_own_vector(kind: str) -> None:
    white = torch.randn(5, 6)
    made = {
        "mlp": lambda: TextItems(white, MlpAdapter(6, 8, 4)),
        "residual": lambda: ResidualItems(white, MlpAdapter(6, 8, 4), 4),
        "null_space": lambda: NullSpaceItems(white, 4, 2),
    }
    items = made[kind]()
    table = items.table()
    assert table.shape == (6, 4)
    assert (table == 0).all(1).tolist() == [True] + [False] * 5
    assert torch.allclose(items(torch.tensor([[0, 3], [5, 1]])), table[torch.tensor([[0, 3], [5, 1]])], atol=1e-5)


def test_the_text_of_null_space_items_is_frozen_and_the_rest_learns() -> None:
    items = NullSpaceItems(torch.randn(5, 6), 4, 2)
    items.table().square().sum().backward()
    assert [name for name, _ in items.named_parameters()] == ["learned"]
    items.learned.data.normal_()
    items.learned.grad = None
    items(torch.tensor([2, 0])).sum().backward()
    assert items.learned.grad is not None
    assert (items.learned.grad != 0).any(1).tolist() == [False, False, True, False, False, False]


def test_the_id_part_of_null_space_items_is_added_in_the_last_columns_and_a_cold_item_is_its_text() -> None:
    white = torch.randn(5, 6)
    items = NullSpaceItems(white, 4, 3)
    items.learned.data[1:] = 7.0
    found = items.project(white, torch.tensor([1, 2, 3, 4, 0]))
    assert torch.equal(found[:, :3], white[:, :3])
    assert torch.allclose(found[:, 3], white[:, 3] + torch.tensor([7.0, 7, 7, 7, 0]))
    assert torch.equal(items.table()[1:5], found[:4])
    # fewer whitened directions than columns: zeros stand there
    assert torch.equal(NullSpaceItems(white[:, :2], 4, 3).table()[1:], torch.cat([white[:, :2], torch.zeros(5, 2)], 1))


def test_null_space_items_of_before_keep_their_layout() -> None:
    white = torch.randn(5, 6)
    items = NullSpaceItems(white, 4, 3, added=False)
    items.learned.data[1:] = 7.0
    assert torch.allclose(items.table()[1:], torch.cat([white[:, :3] * 0.05, torch.full((5, 1), 7.0)], 1))


@pytest.mark.parametrize("kind", ["mlp", "residual", "null_space"])
def test_vectors_for_a_cosine_softmax_have_length_one_wherever_they_are_asked_for(kind: str) -> None:
    white, adapter = torch.randn(5, 6), MlpAdapter(6, 8, 4)
    items = {
        "mlp": lambda: TextItems(white, adapter, unit=True),
        "residual": lambda: ResidualItems(white, adapter, 4, unit=True),
        "null_space": lambda: NullSpaceItems(white, 4, 2, unit=True),
    }[kind]()
    if kind != "mlp":
        items.learned.data[1:].normal_()
    table, row = items.table(), torch.arange(1, 6)
    assert not table[0].any()
    for found in (table[1:], items(row), items.project(white, row)):
        assert torch.allclose(found.norm(dim=1), torch.ones(5), atol=1e-5)
        assert torch.allclose(found, table[1:], atol=1e-5)


def test_a_residual_item_starts_as_its_text_and_learns_an_id_part() -> None:
    white = torch.randn(5, 6)
    items = ResidualItems(white, MlpAdapter(6, 8, 4), 4)
    assert torch.equal(items.table(), TextItems(white, items.adapter).table())
    items(torch.tensor([2, 0])).sum().backward()
    assert items.learned.grad is not None
    assert (items.learned.grad != 0).any(1).tolist() == [False, False, True, False, False, False]


def test_training_alone_drops_id_parts_and_never_text() -> None:
    white = torch.randn(400, 6)
    items = ResidualItems(white, MlpAdapter(6, 8, 4), 4, drop=0.5)
    items.learned.data[1:] = 100.0
    text = TextItems(white, items.adapter).table()[1:]
    for table in (items.table()[1:], items(torch.arange(1, 401))):
        dropped = torch.isclose(table, text, atol=1e-4).all(1)
        assert 100 < int(dropped.sum()) < 300
        assert torch.allclose(table[~dropped], text[~dropped] + 100, atol=1e-3)
    assert torch.allclose(items.eval().table()[1:], text + 100, atol=1e-3)


def test_null_space_items_need_room_for_both_parts() -> None:
    with pytest.raises(ValueError, match="room for both"):
        NullSpaceItems(torch.randn(5, 6), 4, 4)


def test_the_text_table_is_no_part_of_the_weights() -> None:
    assert set(TextItems(torch.randn(5, 6), MlpAdapter(6, 8, 4)).state_dict()) == {
        "adapter.net.0.weight", "adapter.net.0.bias", "adapter.net.2.weight", "adapter.net.2.bias",
        "adapter.net.3.weight", "adapter.net.3.bias",
    }  # fmt: skip
