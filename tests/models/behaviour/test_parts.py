"""Parts without a gradient: directions of agreement, counting, a teacher shrunk to text. Train rows alone teach."""

import pytest
import torch
import torch.nn.functional as F

from models.behaviour import parts
from models.behaviour.data import train_counts
from models.behaviour.whitening import fit_whitening
from tests.models.behaviour.small_world import COLD, EACH, ITEMS, KINDS, events, later_changed, texts


def same_kind(emb_ND: torch.Tensor) -> float:
    """Share of the nearest other items, by cosine, that are of the same kind."""
    near_NN = F.normalize(emb_ND, dim=1) @ F.normalize(emb_ND, dim=1).T
    near_NN.fill_diagonal_(-torch.inf)
    kind_N = torch.arange(len(emb_ND)) // EACH
    return float((kind_N[near_NN.argmax(1)] == kind_N).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_directions_of_agreement_keep_what_behaviour_follows_and_drop_louder_noise(seed: int) -> None:
    llm_NE = texts(width=40, seed=seed, noise=0.5)
    white_NK = fit_whitening(llm_NE, 40)(llm_NE)
    row_N = torch.zeros(ITEMS, dtype=torch.long)
    found = {
        kind: same_kind(parts.text_items(white_NK, events(seed), KINDS, kind).project(white_NK, row_N))
        for kind in ("agreement", "random")
    }
    assert found["agreement"] > found["random"] + 0.2
    assert found["agreement"] > 0.6


def test_a_random_map_keeps_lengths_and_is_the_same_every_time() -> None:
    white_NK = torch.randn(ITEMS, 12, generator=torch.Generator().manual_seed(0))
    one, other = (parts.text_items(white_NK, events(), 12, "random").map_KD for _ in range(2))
    assert torch.equal(one, other)
    torch.testing.assert_close(one.T @ one, torch.eye(12), atol=1e-5, rtol=0)


def test_text_vectors_have_length_one_and_need_no_index() -> None:
    llm_NE = texts()
    white_NK = fit_whitening(llm_NE, 12)(llm_NE)
    items = parts.text_items(white_NK, events(), 6)
    torch.testing.assert_close(items.project(white_NK, torch.zeros(ITEMS).long()).norm(dim=1), torch.ones(ITEMS))


def test_another_word_for_directions_is_refused() -> None:
    with pytest.raises(ValueError, match="none of agreement, random, strongest"):
        parts.text_items(torch.randn(ITEMS, 4), events(), 2, "best")


def test_what_comes_after_training_teaches_nothing() -> None:
    logs, llm_NE = events(), texts()
    white_NK = fit_whitening(llm_NE, 12)(llm_NE)
    other = later_changed(logs)
    assert not torch.equal(logs.items_N, other.items_N)
    one, two = (parts.text_items(white_NK, some, 6).map_KD for some in (logs, other))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("k", [0.5, 4.0])
def test_a_shrunk_vector_lies_between_the_teachers_and_the_prediction_by_train_count(k: float) -> None:
    logs, llm_NE = events(), texts()
    white_NK = fit_whitening(llm_NE, 12)(llm_NE)
    counts_V = train_counts(logs)
    teacher_VD = torch.randn(ITEMS + 1, 8, generator=torch.Generator().manual_seed(0))
    items = parts.shrunk_items(teacher_VD, counts_V, white_NK, k)
    guess_ND = items.predicted(white_NK)
    for item in (1 + 1, COLD[0]):
        share = float(counts_V[item] / (counts_V[item] + k))
        torch.testing.assert_close(items.weight[item], share * teacher_VD[item] + (1 - share) * guess_ND[item - 1])
    torch.testing.assert_close(items.weight[COLD[0]], guess_ND[COLD[0] - 1])
    assert not items.weight[0].any()


def test_text_foretells_the_vector_of_an_item_that_nobody_met() -> None:
    logs, llm_NE = events(), texts(noise=0.1)
    white_NK = fit_whitening(llm_NE, 12)(llm_NE)
    teacher_VD = F.pad(torch.eye(KINDS)[torch.arange(ITEMS) // EACH], (0, 0, 1, 0))
    items = parts.shrunk_items(teacher_VD, train_counts(logs), white_NK, 1.0)
    for item in COLD:
        assert int(items.weight[item].argmax()) == (item - 1) // EACH


def test_without_any_train_event_there_is_nothing_to_shrink() -> None:
    with pytest.raises(ValueError, match="no item has a train event"):
        parts.shrunk_items(torch.randn(5, 2), torch.zeros(5), torch.randn(4, 3), 1.0)
