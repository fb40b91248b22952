"""What an encoder learns from a teacher and from users' titles: targets, prompts, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from models.text.encoder import Encoder
from models.text.lora import Lora
from models.text.objectives import Heads, Signals, directions, ridge
from models.text.prompts import Attributes
from models.text.scft import Interrupted, Scft, Trainer, Tuned, fine_tune
from models.text.users import UserPrompts, Users, prompt_of, users_of
from tests.models import tiny
from tests.models.text.test_scft import SMALL
from tests.models.text.test_scft import own_cache as own_cache

COUNT = 40
MARKS = ("red", "blue", "dull", "loud")


def alone(**more: Any) -> Scft:
    """A training without the loss over views."""
    return dataclasses.replace(SMALL, contrast_weight=0.0, ratio=0.0, patience=99, **more)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "base", tie_word_embeddings=True)


def marked() -> list[Attributes]:
    """Items of four kinds, which their texts tell."""
    return [[("title", f"{MARKS[number % 4]} {number * 7919}")] for number in range(COUNT)]


def titles() -> list[str]:
    return [dict(item)["title"] for item in marked()]


def some_users(encoder: Encoder, named: list[str] | None = None) -> Users:
    """Twelve users: each had eight items of one kind."""
    item_N = np.concatenate([np.arange(8) * 4 + user % 4 for user in range(12)])
    return users_of(encoder, item_N, np.repeat(np.arange(12), 8), named or titles())


def trained(base: Path, config: Scft, signals: Any, *, dropout: float = 0.1, **more: Any) -> tuple[Tuned, Encoder]:
    encoder = tiny.encoder(base, lora=Lora(dropout=dropout), **more.pop("shape", {}))
    texts = encoder.tokenize(marked())
    return fine_tune(encoder, texts, config, seed=1, log=lambda *_: None, signals=signals(encoder), **more), encoder


def resumes(base: Path, config: Scft, signals: Any, file: Path) -> None:
    whole, _ = trained(base, config, signals)
    steps = iter(range(99))
    with pytest.raises(Interrupted):
        trained(base, config, signals, checkpoint=file, stop=lambda: next(steps) >= 3)
    resumed, _ = trained(base, config, signals, checkpoint=file)
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, whole.learned[name]) for name, value in resumed.learned.items())


# --------------------------------------------------------------------------------------------------- a teacher's vectors


def vectors() -> np.ndarray:
    """A vector of each item by its kind and a little noise; every fifth has none."""
    random = np.random.default_rng(0)
    made = random.normal(size=(4, 6))[np.arange(COUNT) % 4] + 0.1 * random.normal(size=(COUNT, 6)) + 3
    made[::5] = np.nan
    return made.astype(np.float32)


def test_the_ridge_is_the_closed_form_and_the_first_loss_is_its_own(base: Path) -> None:
    random = torch.Generator().manual_seed(0)
    emb_NE, weight_ED = torch.randn(300, 8, generator=random) * torch.arange(1, 9) + 5, torch.randn(8, 3, generator=random)
    mean_E, map_EE, weight_DE, bias_D = ridge(emb_NE, emb_NE @ weight_ED, strength=1e-6)
    found_ND = F.linear((emb_NE - mean_E) @ map_EE, weight_DE, bias_D)
    torch.testing.assert_close(found_ND, emb_NE @ weight_ED, atol=1e-2, rtol=1e-3)
    config = alone(teacher_weight=2.0)
    told, _ = trained(base, config, lambda _: Signals(teacher_ID=vectors()), dropout=0.0)
    # without the ridge a head of zeros would leave 1 - cosine = 1
    assert 0 < told.losses[0] < 2 * 0.6


def test_telling_a_teachers_vectors_lowers_the_loss_and_resumes(base: Path, tmp_path: Path) -> None:
    config = alone(teacher_weight=1.0, steps=30)
    told, _ = trained(base, config, lambda _: Signals(teacher_ID=vectors()), dropout=0.0)
    assert np.mean(told.losses[-5:]) < 0.8 * np.mean(told.losses[:5])
    resumes(base, dataclasses.replace(config, steps=6), lambda _: Signals(teacher_ID=vectors()), tmp_path / "state.safetensors")


def test_items_without_a_vector_teach_nothing(base: Path) -> None:
    encoder = tiny.encoder(base, lora=Lora(dropout=0.0))
    texts, config = encoder.tokenize(marked()), alone(teacher_weight=1.0)
    heads = Heads(encoder, config, Signals(teacher_ID=vectors()))
    heads.fit(encoder, texts, np.arange(COUNT), 1)
    all_RE = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    both = heads.item_loss(all_RE, np.array([1, 1, 2, 2]), torch.tensor(20.0))
    # items 0 and 5 have none: what their rows are is the same to the loss
    padded = heads.item_loss(torch.cat([all_RE, 9 * all_RE]), np.array([1, 1, 2, 2, 0, 0, 5, 5]), torch.tensor(20.0))
    torch.testing.assert_close(both, padded)
    assert float(heads.item_loss(all_RE, np.array([0, 0, 5, 5]), torch.tensor(20.0)).detach()) == 0.0


def test_directions_leave_out_what_all_have_in_common() -> None:
    found = directions(vectors())
    known = np.isfinite(vectors()[:, 0])
    assert np.isnan(found[~known]).all()
    np.testing.assert_allclose(np.linalg.norm(found[known], axis=1), 1, atol=1e-5)
    assert np.abs(found[known].mean(0)).max() < 0.3 < np.abs(vectors()[known].mean(0)).max()


def test_a_teacher_that_knows_no_item_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="no item to train on has a vector"):
        trained(base, alone(teacher_weight=1.0),
                lambda _: Signals(teacher_ID=np.full((COUNT, 6), np.nan, np.float32)))  # fmt: skip


# -------------------------------------------------------------------------------------------------------- users' clusters


def clusters() -> np.ndarray:
    """The kind of each item, every fifth unknown."""
    return np.where(np.arange(COUNT) % 5, np.arange(COUNT) % 4, -1)


def test_a_users_clusters_are_told_from_titles_and_resume(base: Path, tmp_path: Path) -> None:
    config = alone(user_weight=1.0, steps=40, user_share=1.0)

    def signals(encoder: Encoder) -> Signals:
        return Signals(users=some_users(encoder), cluster_I=clusters())

    told, _ = trained(base, config, signals, dropout=0.0)
    # each user has one kind: before the head knows anything the divergence is log 4
    assert told.losses[0] == pytest.approx(math.log(4), rel=1e-4)
    assert np.mean(told.losses[-5:]) < 0.8 * math.log(4)
    resumes(base, dataclasses.replace(config, steps=6), signals, tmp_path / "state.safetensors")


def test_a_users_histogram_counts_train_items_with_a_cluster_alone(base: Path) -> None:
    users = Users(item_N=np.array([0, 1, 2, 6, 3, 3]), start_U1=np.array([0, 4, 6]), titles=some_users(tiny.encoder(base)).titles)
    cluster_I = np.array([-1, 0, 2, 0, 1, 1, 2])
    np.testing.assert_allclose(users.histogram(0, cluster_I), [1 / 3, 0, 2 / 3])
    np.testing.assert_allclose(users.histogram(1, cluster_I), [1, 0, 0])
    assert not users.histogram(1, np.full(7, -1)).any()


def test_a_user_is_read_as_their_newest_titles_in_order(base: Path) -> None:
    encoder = tiny.encoder(base)
    users, limit = some_users(encoder), prompt_of(encoder)[1]
    made = UserPrompts(users=users, size=5, newest=3, limit=limit, seed=1, following=False)
    seen = []
    for step in range(3):
        drawn = made.draw(step)
        assert np.array_equal(drawn.rows.length_B, drawn.context_B)
        seen += encoder.tokenizer.batch_decode(np.split(drawn.rows.token_T, drawn.rows.length_B.cumsum()[:-1]))
        again = made.draw(step)
        assert np.array_equal(again.rows.token_T, drawn.rows.token_T)
    wanted = {"".join(f" {MARKS[kind]} {(kind + 4 * n) * 7919};" for n in (5, 6, 7)) for kind in range(4)}
    assert set(seen) == wanted
    # 12 users in passes of 12: each came at least once
    counts = {text: seen[:12].count(text) for text in wanted}
    assert set(counts.values()) == {3}


def test_a_prompt_is_cut_at_its_oldest_titles_and_items_without_titles_and_short_users_are_left_out(base: Path) -> None:
    encoder = tiny.encoder(base, max_tokens=80)
    users = some_users(encoder)
    head, room = prompt_of(encoder)
    assert room == 80 - len(head)
    drawn = UserPrompts(users=users, size=4, newest=8, limit=room, seed=1, following=True).draw(0)
    assert drawn.rows.length_B.max() <= room and drawn.context_B.min() > 0 and (drawn.rows.length_B > drawn.context_B).all()
    few = users_of(encoder, np.array([0, 1, 2, 3, 4]), np.array([7, 7, 7, 8, 8]), ["a", "", "c", "", "e"])
    assert few.item_N.tolist() == [0, 2] and few.start_U1.tolist() == [0, 2]
    with pytest.raises(ValueError, match="for a user's titles: give"):
        some_users(tiny.encoder(base, max_tokens=50))
    with pytest.raises(ValueError, match="no user had two items"):
        users_of(encoder, np.array([0, 1]), np.array([0, 1]), ["a", "b"])


# ------------------------------------------------------------------------------------------------------------ next titles


def test_the_loss_of_a_next_title_is_that_of_transformers_own_model(base: Path, tmp_path: Path) -> None:
    own = tiny.llama(tmp_path / "own")
    torch.manual_seed(4)
    whole = LlamaForCausalLM.from_pretrained(own, dtype=torch.float32)
    torch.nn.init.normal_(whole.lm_head.weight, std=0.2)
    whole.save_pretrained(own)
    for folder in (base, own):
        encoder = tiny.encoder(folder)
        config = alone(title_weight=1.0)
        users = some_users(encoder)
        heads = Heads(encoder, config, Signals(users=users))
        head, room = prompt_of(encoder)
        drawn = UserPrompts(users=users, size=3, newest=4, limit=room, seed=1, following=True).draw(0)
        step = encoder.step(drawn.rows, head)
        with torch.no_grad():
            found = heads.user_loss(encoder.states(step), step, drawn, torch.tensor(20.0))[1]
        model, wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), 0.0
        for user in range(3):
            row = drawn.some(np.array([user])).rows.token_T.tolist()
            label = [-100] * (len(head) + int(drawn.context_B[user])) + row[int(drawn.context_B[user]) :]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*head, *row]])).logits[0]
            wanted += float(F.cross_entropy(logits[:-1], torch.tensor(label[1:]), ignore_index=-100, reduction="sum"))
        assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_telling_next_titles_lowers_the_loss_and_resumes(base: Path, tmp_path: Path) -> None:
    config = alone(title_weight=1.0, steps=30, user_share=1.0)

    def signals(encoder: Encoder) -> Signals:
        return Signals(users=some_users(encoder))

    told, _ = trained(base, config, signals, dropout=0.0)
    assert np.mean(told.losses[-5:]) < 0.9 * np.mean(told.losses[:5])
    resumes(base, dataclasses.replace(config, steps=6), signals, tmp_path / "state.safetensors")


def test_views_clusters_and_users_are_learned_from_together_and_in_micro_batches(base: Path) -> None:
    config = dataclasses.replace(SMALL, cluster_weight=0.5, user_weight=0.5, title_weight=0.5, teacher_weight=0.5, user_share=0.5)

    def signals(encoder: Encoder) -> Signals:
        return Signals(users=some_users(encoder), cluster_I=clusters(), teacher_ID=vectors())

    whole, _ = trained(base, config, signals, dropout=0.0)
    parts, _ = trained(base, dataclasses.replace(config, tokens=150), signals, dropout=0.0)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-3)
    plain, _ = trained(base, SMALL, signals, dropout=0.0)
    assert whole.losses[0] > plain.losses[0]


def test_what_cannot_be_learned_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    told = alone(title_weight=1.0)

    def users(encoder: Encoder) -> Signals:
        return Signals(users=some_users(encoder))

    with pytest.raises(ValueError, match="reads both ways, so it can't tell what comes next"):
        trained(tiny.bert(tmp_path / "bert"), told, users)
    with pytest.raises(ValueError, match="holds no language head"):
        trained(tiny.llama(tmp_path / "headless"), told, users)
    with pytest.raises(ValueError, match='needs attention = "base"'):
        trained(base, told, users, shape={"attention": "both"})
    for name in ("teacher_weight", "user_weight", "title_weight"):
        with pytest.raises(ValueError, match=f"{name} needs"):
            trained(base, alone(**{name: 1.0}), lambda _: Signals())


@pytest.mark.parametrize(
    "wrong", [{"contrast_weight": 0.0}, {"title_weight": -1.0}, {"user_share": 0.0}, {"user_share": 1.5}, {"user_titles": 0}]
)
def test_weights_that_leave_nothing_to_learn_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)


def test_nobody_pays_for_what_is_not_asked(base: Path) -> None:
    encoder = tiny.encoder(base, lora=Lora())
    signals = Signals(users=some_users(encoder), cluster_I=clusters(), teacher_ID=vectors())
    trainer = Trainer(encoder, encoder.tokenize(marked()), np.arange(COUNT), SMALL, 1, signals)
    assert trainer.user_prompts is None and not trainer.heads.learned and not trainer.heads.told_of_items
    assert trainer.draw(0)[1] is None
