"""DELRec's re-ranker: scores by hand, no soft token is the plain prompt, and soft tokens learn what they are taught."""

from pathlib import Path

import pytest
import torch

from models.text import rerank
from models.text.rerank import Distilling, Question, Reranker, distil, load_reranker, step_loss
from tests.models import tiny

CPU = torch.device("cpu")
DOMAIN = "Films:"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


def reranker(base: Path, tokens: int, seed: int = 0) -> Reranker:
    return load_reranker(str(base), Distilling(tokens=tokens), domain=DOMAIN, device=CPU, seed=seed)


def question(*candidates: str, target: int = -1) -> Question:
    return Question(history=("Alien", "Heat"), candidates=candidates, target=target)


def test_a_score_is_the_mean_log_probability_of_the_title_after_the_prompt(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in BF16, which some processors take by themselves, another length of the batch is another rounding
    monkeypatch.setattr(rerank, "default_dtype", lambda device: torch.float32)
    model = reranker(base, 0)
    prompt, title = model.ids("Films:\nAlien\nHeat\n"), model.ids("Up")
    with torch.no_grad():
        hidden = model.base(input_ids=torch.tensor([prompt + title])).last_hidden_state[0]
    logp = (hidden @ model.words.T).float().log_softmax(-1)
    by_hand = sum(float(logp[len(prompt) - 1 + place, token]) for place, token in enumerate(title)) / len(title)
    # beside a longer title, behind which the shorter one is padded
    score_M = model(question("Up", "The Long Goodbye")).detach()
    assert float(score_M[0]) == pytest.approx(by_hand, abs=1e-5)
    torch.testing.assert_close(model(question("The Long Goodbye")).detach()[0], score_M[1], atol=1e-5, rtol=0)


def test_no_soft_token_is_the_plain_prompt_and_soft_tokens_change_it(base: Path) -> None:
    plain, soft = reranker(base, 0), reranker(base, 3)
    asked = question("Up", "Jaws")
    assert plain.soft_SE.shape == (0, 32)
    assert not torch.allclose(plain(asked), soft(asked))
    soft.soft_SE.data = soft.soft_SE.data[:0]
    assert torch.equal(plain(asked), soft(asked))


def test_soft_tokens_learn_a_pick_and_the_base_stays_as_it_is(base: Path) -> None:
    model = reranker(base, 4)
    before = {name: value.clone() for name, value in model.base.state_dict().items()}
    asked = [question("Up", "Jaws", "Heat", target=2)]
    config = Distilling(tokens=4, steps=30, batch=1, learning_rate=0.05, pick=0.0)
    first = float(step_loss(model, asked[0], config).detach())
    distil(model, asked, config, seed=0)
    assert float(step_loss(model, asked[0], config).detach()) < 0.8 * first
    assert all(torch.equal(value, before[name]) for name, value in model.base.state_dict().items())


def test_equal_seeds_learn_alike(base: Path) -> None:
    config, asked = Distilling(tokens=2, steps=3, batch=2), [question("Up", "Jaws", target=1), question("Heat", "Up")]
    found = []
    for _ in range(2):
        model = reranker(base, 2)
        distil(model, asked, config, seed=1)
        found.append(model.soft_SE.detach().clone())
    assert torch.equal(*found)


def test_a_target_outside_the_list_teaches_the_pick_alone(base: Path) -> None:
    model, config = reranker(base, 2), Distilling(tokens=2, pick=0.25)
    logp_M = (model(question("Up", "Jaws")) / config.temperature).log_softmax(0).detach()
    assert float(step_loss(model, question("Up", "Jaws"), config).detach()) == pytest.approx(-0.25 * float(logp_M[0]), abs=1e-5)


def test_what_can_not_be_asked_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    model = reranker(base, 1)
    with pytest.raises(ValueError, match="title '' holds no token that the base knows"):
        model(question("Up", ""))
    model.tokenizer.unk_token = model.tokenizer.convert_ids_to_tokens(model.ids("x")[0])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="title 'xx' holds no token that the base knows: it is outside its vocabulary"):
        model(question("Up", "xx"))
    with pytest.raises(ValueError, match="no question to learn from"):
        distil(model, [], Distilling(tokens=1), seed=0)
    with pytest.raises(ValueError, match="take one with tied embeddings"):
        load_reranker(str(tiny.llama(tmp_path / "own")), Distilling(), domain="", device=CPU, seed=0)
    with pytest.raises(ValueError, match="take a decoder"):
        load_reranker(str(tiny.bert(tmp_path / "bert")), Distilling(), domain="", device=CPU, seed=0)
    with pytest.raises(ValueError, match="tokens at least 0"):
        Distilling(tokens=-1)
