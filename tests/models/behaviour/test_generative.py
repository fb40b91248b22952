"""TTDS's writer: the tree of items' tokens, prompts by hand, and beams that are items, found as by an exhaustive search."""

import itertools

import pytest
import torch

from models.behaviour.generative import Generative, Tree, Writer, beam_search, train_writer, vocabulary, written

TOKENS = torch.tensor([[0, 4, 8], [0, 5, 8], [1, 4, 8], [1, 4, 9], [2, 6, 8]])
SMALL = Generative(width=16, layers=1, heads=2, dropout=0.0, history=2, steps=60, batch=16, learning_rate=1e-2, beams=3)


def writer(words: int = 12, seed: int = 0, text: int = 0) -> Writer:
    torch.manual_seed(seed)
    return Writer(words, SMALL, 2 + 3 * 3, text).eval()


def test_every_path_of_the_tree_is_an_item_and_every_item_is_a_path() -> None:
    tree = Tree(TOKENS)
    found = {}
    for path in itertools.product(range(10), repeat=3):
        node_1 = torch.zeros(1, dtype=torch.int64)
        for depth, token in enumerate(path):
            allowed_1X, next_1X = tree.allowed(depth, node_1)
            if not bool(allowed_1X[0, token]):
                break
            node_1 = next_1X[:, token]
        else:
            found[path] = int(tree.item_P[node_1])
    assert found == {tuple(row): place for place, row in enumerate(TOKENS.tolist(), start=1)}


def test_items_of_the_same_tokens_are_refused_by_count() -> None:
    with pytest.raises(ValueError, match="1 items share all their tokens with another"):
        Tree(torch.cat([TOKENS, TOKENS[:1]]))


def test_a_vocabulary_keeps_books_and_numbers_apart() -> None:
    token_NT, words = vocabulary(torch.tensor([[0, 1], [1, 1], [1, 1]]), torch.tensor([0, 0, 1]), 2)
    assert token_NT.tolist() == [[0, 3, 4], [1, 3, 4], [1, 3, 5]] and words == 6


def test_a_prompt_is_the_user_then_the_items_padded_on_the_left() -> None:
    history_BH, user_BK = torch.tensor([[0, 3], [1, 2], [0, 0]]), torch.tensor([[10, 11], [12, 13], [14, 15]])
    found = written(history_BH, user_BK, TOKENS, 99)
    assert found.tolist() == [[99, 99, 99, 10, 11, 1, 4, 8], [12, 13, 0, 4, 8, 0, 5, 8], [99] * 6 + [14, 15]]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_beam_as_wide_as_the_catalogue_finds_what_an_exhaustive_search_finds(seed: int) -> None:
    model, prompt_BL = writer(seed=seed), torch.tensor([[10, 11, 0, 4, 8, 1, 4, 9], [10, 10, 2, 6, 8, 0, 5, 8]])
    item_BW, score_BW = beam_search(model, prompt_BL, Tree(TOKENS), 5)
    for prompt, items, scores in zip(prompt_BL, item_BW.tolist(), score_BW.tolist(), strict=True):
        by_hand = []
        for item, row in enumerate(TOKENS, start=1):
            with torch.no_grad():
                logp = model(torch.cat([prompt, row])[None])[0, :, :10].log_softmax(1)
            by_hand.append((sum(float(logp[len(prompt) - 1 + place, token]) for place, token in enumerate(row)), item))
        expected = sorted(by_hand, reverse=True)
        assert items == [item for _, item in expected]
        assert scores == pytest.approx([score for score, _ in expected], abs=1e-4)


def test_every_beam_is_an_item_each_once_and_missing_ones_are_told() -> None:
    prompt_BL = torch.randint(10, (6, 8), generator=torch.Generator().manual_seed(0))
    item_BW, score_BW = beam_search(writer(), prompt_BL, Tree(TOKENS), 8)
    assert bool(((item_BW > 0) == score_BW.isfinite()).all())
    for items in item_BW.tolist():
        kept = [item for item in items if item]
        assert sorted(kept) == [1, 2, 3, 4, 5]


def test_the_writer_is_causal() -> None:
    model, token_BL = writer(), torch.randint(10, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = token_BL.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 10
    torch.testing.assert_close(model(token_BL)[:, :5], model(changed)[:, :5])
    assert not torch.allclose(model(token_BL)[:, 5:], model(changed)[:, 5:])


def test_padding_on_the_left_changes_nothing_but_the_place() -> None:
    model = writer()
    model.position.data.zero_()
    token_BL = torch.tensor([[10, 11, 0, 4, 8]])
    padded_BL = torch.tensor([[12, 12, 12, 10, 11, 0, 4, 8]])
    torch.testing.assert_close(model(token_BL), model(padded_BL)[:, 3:])


def test_it_learns_what_comes_next_and_writes_it() -> None:
    order = torch.tensor([1, 2, 3, 4, 5])
    history_UH = torch.stack([order.roll(-start)[:3] for start in range(5)])
    model = writer(text=4)
    text_NE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    user_UK = torch.full((5, 2), 10)
    train_writer(model, history_UH, user_UK, TOKENS, text_NE, SMALL, seed=0)
    prompt_BL = written(history_UH[:, :2], user_UK, TOKENS, 12)
    assert beam_search(model, prompt_BL, Tree(TOKENS), 3)[0][:, 0].tolist() == history_UH[:, 2].tolist()


def test_equal_seeds_train_alike_and_short_histories_teach_nothing() -> None:
    history_UH, user_UK = torch.tensor([[0, 1, 2], [0, 0, 3]]), torch.full((2, 2), 10)
    found = []
    for _ in range(2):
        model = writer()
        train_writer(model, history_UH, user_UK, TOKENS, None, SMALL, seed=0)
        found.append(model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with pytest.raises(ValueError, match="no user has two train events"):
        train_writer(writer(), history_UH[1:], user_UK[1:], TOKENS, None, SMALL, seed=0)


def test_items_of_equal_codes_are_no_negatives_of_each_other() -> None:
    model = writer(text=4)
    token_BT = TOKENS[[0, 0, 2]]
    text_BE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    coded_BE = torch.nn.functional.normalize(model.to_text(model.words(token_BT).mean(1)), dim=1)  # type: ignore[misc]
    logit_BB = coded_BE @ torch.nn.functional.normalize(text_BE, dim=1).T / 0.1
    kept = [logit_BB[0, [0, 2]], logit_BB[1, [1, 2]], logit_BB[2]]
    own = (0, 0, 2)
    expected = sum(float(-row.log_softmax(0)[place].detach()) for row, place in zip(kept, own, strict=True)) / 3
    assert float(model.text_loss(token_BT, text_BE, 0.1).detach()) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"text": -0.1}, {"temperature": 0.0}])
def test_settings_that_write_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="generative"):
        Generative(**wrong)  # type: ignore[arg-type]
