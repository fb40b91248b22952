"""SCFT: training that resumes and fits without changing its numbers; several processes: test_scft_processes.py."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.text.lora import Lora, lora_state
from models.text.moments import whitening
from models.text.objectives import Signals
from models.text.prompts import Attributes, prompts
from models.text.scft import Interrupted, Scft, Trainer, Tuned, fine_tune
from models.text.scft_batches import Batches, Pairs, Partners, shuffle_texts
from models.text.view_retrieval import hold_out_views, validate_views
from tests.models import tiny

SMALL = Scft(steps=6, batch=8, learning_rate=5e-3, validate_every=3, validation_items=8, candidates=20, compile=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.llama(tmp_path / "base")


def tuned(
    base: Path, config: Scft = SMALL, *, items: list[Attributes] | None = None, dropout: float = 0.1, **more: Any
) -> tuple[Tuned, list[dict[str, float]]]:
    """A training on 40 small items, and what it logged."""
    encoder = tiny.encoder(base, lora=Lora(dropout=dropout))
    logged: list[dict[str, float]] = []
    texts = encoder.tokenize(items or tiny.items(40))
    return fine_tune(encoder, texts, config, seed=1, log=lambda metrics, _: logged.append(metrics), **more), logged


def test_training_lowers_the_loss_and_reports_the_base_model_first(base: Path) -> None:
    config = dataclasses.replace(SMALL, steps=25, validate_every=5, ratio=0.1)
    result, logged = tuned(base, config, dropout=0.0)
    assert np.mean(result.losses[-5:]) < 0.8 * np.mean(result.losses[:5])
    assert [entry["step"] for entry in result.history] == [0, 5, 10, 15, 20, 25]
    untrained = tiny.encoder(base)
    of_base, _ = validate_views(untrained, hold_out_views(untrained.tokenize(tiny.items(40)), config, untrained.limit, 1)[0])
    assert {name: result.history[0][name] for name in of_base} == pytest.approx(of_base, rel=1e-3, abs=1e-4)
    assert result.history[-1]["alignment"] != pytest.approx(of_base["alignment"], rel=0.01)
    assert result.best_step == max(result.history[1:], key=lambda entry: entry["mrr"])["step"]
    assert {"loss", "learning_rate", "tokens_per_s"} <= set(logged[1])


def test_the_same_seed_gives_the_same_weights_to_the_bit(base: Path) -> None:
    one, two = tuned(base)[0], tuned(base)[0]
    assert one.losses == two.losses
    assert all(torch.equal(value, two.learned[name]) for name, value in one.learned.items())


def test_a_killed_and_resumed_training_has_the_losses_of_an_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    whole, _ = tuned(base)
    steps = iter(range(99))
    file = tmp_path / "deep" / "state.safetensors"
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        tuned(base, checkpoint=file, stop=lambda: next(steps) >= 3)
    resumed, _ = tuned(base, checkpoint=file)
    assert resumed.losses == whole.losses
    assert resumed.history == whole.history
    assert all(torch.equal(value, whole.learned[name]) for name, value in resumed.learned.items())


def test_a_learned_temperature_is_saved_with_the_state(base: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, learn_temperature=True)
    whole, _ = tuned(base, config)
    assert whole.temperature != pytest.approx(config.temperature, abs=1e-6)
    file = tmp_path / "state.safetensors"
    steps = iter(range(99))
    with pytest.raises(Interrupted):
        tuned(base, config, checkpoint=file, stop=lambda: next(steps) >= 3)
    assert tuned(base, config, checkpoint=file)[0].temperature == whole.temperature


def test_the_second_signal_tells_clusters_from_texts_and_resumes(base: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, cluster_weight=1.0, steps=40, patience=100)
    decades = [[("decade", "1950" if number % 2 else "2000")] for number in range(40)]
    items = [[*own, *item[:1]] for own, item in zip(decades, tiny.items(40), strict=True)]
    cluster_I = np.where(np.arange(40) % 5, np.arange(40) % 2, -1)
    told, _ = tuned(base, config, items=items, signals=Signals(cluster_I=cluster_I))
    plain, _ = tuned(base, dataclasses.replace(config, cluster_weight=0.0), items=items, signals=Signals(cluster_I=cluster_I))
    before, after = (np.subtract(told.losses[part], plain.losses[part]).mean() for part in (slice(1), slice(-5, None)))
    assert before == pytest.approx(math.log(2), rel=1e-5)
    assert after < 0.8 * before
    file, steps = tmp_path / "state.safetensors", iter(range(99))
    with pytest.raises(Interrupted):
        tuned(base, config, items=items, signals=Signals(cluster_I=cluster_I), checkpoint=file, stop=lambda: next(steps) >= 3)
    assert tuned(base, config, items=items, signals=Signals(cluster_I=cluster_I), checkpoint=file)[0].losses == told.losses
    with pytest.raises(ValueError, match="none were given"):
        tuned(base, config)


def test_pairs_bring_together_what_users_took_together_and_resume(base: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, pair_share=1.0, steps=60, patience=100, ratio=0.0)
    # red goes with dull and blue with loud, which no text says
    marks = [[("mark", ("red", "dull", "blue", "loud")[number % 4])] for number in range(40)]
    items = [[*own, *item[:1]] for own, item in zip(marks, tiny.items(40), strict=True)]
    pairs = Pairs(pair_P2=np.stack([np.arange(0, 40, 2), np.arange(1, 40, 2)], axis=1), user_P=np.arange(20))
    told = Signals(pairs=pairs)
    paired, _ = tuned(base, config, items=items, signals=told, dropout=0.0)
    assert np.mean(paired.losses[-20:]) < 0.8 * math.log(8)
    file, steps = tmp_path / "state.safetensors", iter(range(99))
    with pytest.raises(Interrupted):
        tuned(base, config, items=items, signals=told, dropout=0.0, checkpoint=file, stop=lambda: next(steps) >= 3)
    assert tuned(base, config, items=items, signals=told, dropout=0.0, checkpoint=file)[0].losses == paired.losses
    with pytest.raises(ValueError, match="none were given"):
        tuned(base, config, items=items)


def test_pairs_are_drawn_user_by_user_and_never_with_items_kept_for_validation() -> None:
    pair_P2 = np.array([[0, 1], [0, 1], [0, 1], [2, 0], [3, 0], [4, 5]])
    partners = Partners(pair_P2, np.array([0, 1, 2, 4, 6]), np.arange(7), user_P=np.array([7, 7, 7, 8, 8, 9]))
    drawn_B2 = partners.draw(4000, np.random.default_rng(0))
    # three pairs of one user weigh as much as the one that is left of another's
    assert set(map(tuple, drawn_B2.tolist())) == {(0, 1), (2, 0)}
    assert (drawn_B2[:, 0] == 0).mean() == pytest.approx(0.5, abs=0.03)
    assert partners.share_of(7).tolist() == [0.5, 0.5, 0, 0, 0, 0, 0]


def test_a_batch_holds_its_share_of_pairs_in_their_order_and_reads_them_whole(base: Path) -> None:
    encoder = tiny.encoder(base)
    texts = encoder.tokenize(tiny.items(40))
    pair_P2 = np.array([[3, 8], [8, 5]])
    partners = Partners(pair_P2, np.arange(40), texts.text_I)
    made = Batches(texts=texts, items=np.arange(40), size=8, ratio=0.5, limit=encoder.limit, seed=1, partners=partners,
                   pair_share=0.25)  # fmt: skip
    drawn = made.draw(3)
    assert len(drawn.items) == 8 and np.array_equal(drawn.items[:6], drawn.partners[:6])
    assert all([first, second] in pair_P2.tolist() for first, second in zip(drawn.items[6:], drawn.partners[6:], strict=True))
    whole, _ = prompts(texts, np.stack([drawn.items[6:], drawn.partners[6:]], axis=1).ravel(), encoder.limit)
    assert np.array_equal(drawn.rows.token_T[-len(whole.token_T) :], whole.token_T)
    assert len(drawn.rows.length_B) == len(drawn.keys) == 16 and len(drawn.rows.token_T) == drawn.rows.length_B.sum()
    again = made.draw(3)
    assert np.array_equal(again.rows.token_T, drawn.rows.token_T) and np.array_equal(again.items, drawn.items)


def test_pairs_that_too_few_users_took_are_left_out() -> None:
    pair_P2, user_P = np.array([[0, 1], [0, 1], [2, 0], [2, 0]]), np.array([7, 8, 9, 9])
    assert len(Partners(pair_P2, np.arange(3), np.arange(3), user_P)) == 4
    kept = Partners(pair_P2, np.arange(3), np.arange(3), user_P, support=2)
    assert kept.pair_P2.tolist() == [[0, 1], [0, 1]]
    assert not len(Partners(pair_P2, np.arange(3), np.arange(3), user_P, support=3))


def test_an_item_stands_in_pairs_for_all_items_with_its_text() -> None:
    # items 1 and 4 read the same, as do 2 and 3: training takes 1 and 2
    text_I = np.array([0, 1, 2, 2, 1])
    pair_P2 = np.array([[0, 4], [3, 0], [1, 4], [4, 3]])
    partners = Partners(pair_P2, np.array([0, 1, 2]), text_I)
    assert partners.pair_P2.tolist() == [[0, 1], [2, 0], [1, 2]]


def test_a_loss_on_whitened_embeddings_is_another_one_and_resumes_between_two_takes(base: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, whiten=True, whiten_every=4)
    told, _ = tuned(base, config)
    assert told.losses != tuned(base)[0].losses
    file, steps = tmp_path / "state.safetensors", iter(range(99))
    with pytest.raises(Interrupted):
        tuned(base, config, checkpoint=file, stop=lambda: next(steps) >= 1)
    assert tuned(base, config, checkpoint=file)[0].losses == told.losses


def test_whitening_gives_every_strong_direction_variance_one_and_names_what_is_not_finite() -> None:
    emb_NE = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 2, 1, 1]) + 7
    mean_E, map_EE = whitening(emb_NE)
    white_NE = (emb_NE - mean_E) @ map_EE
    torch.testing.assert_close(white_NE.T @ white_NE / 4000, torch.eye(6), atol=0.2, rtol=0)
    torch.testing.assert_close(map_EE, map_EE.T)
    with pytest.raises(ValueError, match="not finite"):
        whitening(emb_NE.index_fill(0, torch.tensor([5]), float("inf")))


def test_the_weights_kept_are_those_that_are_worth_most(base: Path) -> None:
    values = iter([0.5, 0.1, 0.3, 0.2])
    config = dataclasses.replace(SMALL, steps=9, patience=9)
    kept, _ = tuned(base, config, worth=lambda _: next(values))
    assert kept.best_step == 6 and [entry["worth"] for entry in kept.history] == [0.5, 0.1, 0.3, 0.2]


def test_pairs_none_of_which_is_left_are_refused_by_name(base: Path) -> None:
    pairs = Pairs(pair_P2=np.array([[0, 1], [2, 3]]), user_P=np.array([0, 1]))
    with pytest.raises(ValueError, match="taken by 2 users"):
        tuned(base, dataclasses.replace(SMALL, pair_share=0.5, pair_support=2), signals=Signals(pairs=pairs))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_of_pairs_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="pair_share"):
        Scft(pair_share=share)


def test_micro_batches_with_dropout_give_the_losses_of_the_whole_batch_without(base: Path) -> None:
    whole, _ = tuned(base, dropout=0.0)
    parts, _ = tuned(base, dataclasses.replace(SMALL, tokens=120), dropout=0.0)
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-4)
    assert tuned(base, dataclasses.replace(SMALL, tokens=120))[0].losses != whole.losses


def test_recomputed_layers_give_the_same_losses_and_memory_that_is_too_small_is_shared_out(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = tuned(base)
    gradient, failures = Trainer.gradient, [0]

    def tight(self: Trainer, *arguments: Any) -> float:
        if self.memory.recomputed < self.memory.layers:
            failures[0] += 1
            raise torch.OutOfMemoryError("no room")
        return gradient(self, *arguments)

    monkeypatch.setattr(Trainer, "gradient", tight)
    again, _ = tuned(base)
    assert failures[0] == 2
    np.testing.assert_allclose(again.losses, whole.losses, rtol=1e-5)


def test_training_stops_when_validation_does_and_keeps_the_best_weights(base: Path) -> None:
    config = dataclasses.replace(SMALL, steps=40, validate_every=1, patience=2, learning_rate=1e-9)
    result, _ = tuned(base, config)
    assert result.steps == result.best_step + 2 < 40


def test_a_loss_that_is_not_finite_stops_training_and_names_the_remedy(base: Path) -> None:
    with pytest.raises(ValueError, match=r"loss is nan at step .*lower learning_rate"):
        tuned(base, dataclasses.replace(SMALL, learning_rate=1e30, clip=1e30, warm_up=0.0, validate_every=99))


def test_items_of_one_attribute_or_none_and_thousands_of_equal_texts_train(base: Path) -> None:
    strange: list[Attributes] = [[("title", f"film {number}")] for number in range(12)]
    strange += [[], [("title", "same")]] * 500
    result, _ = tuned(base, items=strange)
    assert all(math.isfinite(loss) for loss in result.losses)


def test_a_catalogue_of_equal_texts_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match="1 different texts"):
        tuned(base, items=[[("title", "same")]] * 1000)


def test_a_catalogue_smaller_than_the_batch_and_an_odd_last_batch_train(base: Path) -> None:
    result, _ = tuned(base, dataclasses.replace(SMALL, batch=1000), items=tiny.items(9))
    assert result.steps == 6
    assert tuned(base, dataclasses.replace(SMALL, batch=7), items=tiny.items(23))[0].steps == 6


NOTHING_TO_SHAPE = {"contrast_weight": 0.0, "title_weight": 1.0}
WRONG: list[dict[str, Any]] = [
    {"batch": 1}, {"ratio": 1.0}, {"ratio": -0.1}, {"temperature": 0.0}, {"steps": -1}, {"validate_every": 0}, {"patience": 0},
    {"tokens": -1}, {"validation_items": 0}, {"candidates": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan},
    {"clip": 0.0}, {"warm_up": 1.1}, {"weight_decay": -0.1}, {"pair_share": 0.5, **NOTHING_TO_SHAPE},
    {"whiten": True, **NOTHING_TO_SHAPE},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_settings_that_cannot_learn_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_lora_that_cannot_learn_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Lora(**wrong)


def test_a_batch_that_processes_cannot_share_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.text.scft.dist.is_initialized", lambda: True)
    monkeypatch.setattr("models.text.scft.dist.get_rank", lambda: 0)
    monkeypatch.setattr("models.text.scft.dist.get_world_size", lambda: 3)
    encoder = tiny.encoder(base, lora=Lora())
    with pytest.raises(ValueError, match="give a multiple"):
        Trainer(encoder, encoder.tokenize(tiny.items(40)), np.arange(40), SMALL, 0)


def test_shuffled_texts_keep_every_fields_values_and_belong_to_other_items() -> None:
    items = tiny.items(60)
    control = shuffle_texts(items, 3)
    for column in range(3):
        assert sorted(item[column] for item in control) == sorted(item[column] for item in items)
    assert sum(one[0] == other[0] for one, other in zip(items, control, strict=True)) < 6
    assert shuffle_texts(items, 3) == control


def test_an_untrained_lora_is_the_base_model(base: Path) -> None:
    encoder = tiny.encoder(base, lora=Lora())
    assert all(not value.any() for name, value in lora_state(encoder.model).items() if "lora_B" in name)
