"""The text floor: whitened TF-IDF read by a fading mean, from texts alone."""

import torch

from models.judge import text_floor
from models.judge.evaluation import make_cases
from models.judge.metrics import by_rank
from models.judge.text_floor import tfidf_table
from tests.models.behaviour.small_world import EACH, ITEMS, events


def texts(seed: int = 0) -> list[str]:
    """Of each item a few of its kind's words, and words that all kinds have."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for item in range(ITEMS):
        own = [f"k{item // EACH}w{number}" for number in torch.randint(6, (4,), generator=generator).tolist()]
        shared = [f"word{number}" for number in torch.randint(30, (2,), generator=generator).tolist()]
        found.append(" ".join([*own, *shared]))
    return found


def test_items_of_like_words_lie_together_and_have_length_one() -> None:
    table_VD = tfidf_table(texts())
    assert table_VD is not None and table_VD.shape == (ITEMS + 1, ITEMS // 8) and not table_VD[0].any()
    torch.testing.assert_close(table_VD[1:].norm(dim=1), torch.ones(ITEMS))
    near_NN = table_VD[1:] @ table_VD[1:].T
    near_NN.fill_diagonal_(-2)
    kind_N = torch.arange(ITEMS) // EACH
    assert float((kind_N[near_NN.argmax(1)] == kind_N).float().mean()) > 0.9


def test_it_ranks_what_a_user_keeps_to_and_words_of_other_items_do_not() -> None:
    logs = events()
    cases = make_cases(logs, "test", negatives=5, paper_tail=4, chunk=64, seed=0, unseen=True)
    own, shuffled = texts(), texts()
    shuffled = [shuffled[row] for row in torch.randperm(ITEMS, generator=torch.Generator().manual_seed(1)).tolist()]
    found = []
    for said in (own, shuffled):
        table_VD = tfidf_table(said)
        assert table_VD is not None
        found.append(float(by_rank(text_floor.text_ranks(cases, table_VD)[0])["ndcg"].mean()))
    assert found[0] > 2 * found[1]


def test_it_is_the_same_each_time() -> None:
    one, other = tfidf_table(texts()), tfidf_table(texts())
    assert one is not None and other is not None
    torch.testing.assert_close(one, other)


def test_too_few_items_or_texts_without_a_common_word_have_no_such_floor() -> None:
    assert tfidf_table(texts()[: text_floor.LEAST - 1]) is None
    assert tfidf_table([f"only{number}" for number in range(ITEMS)]) is None
    assert tfidf_table([""] * ITEMS) is None
