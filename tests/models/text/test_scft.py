"""SCFT: training that resumes, shares and fits without changing its numbers, and refuses an encoder that is not better."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from models.processes import any_process, from_first
from models.text import view_retrieval
from models.text.embedding import embed, embed_together
from models.text.encoder import Encoder
from models.text.lora import Lora, lora_state
from models.text.moments import whitening
from models.text.packing import Step
from models.text.prompts import Attributes, Texts, prompts, tokenize
from models.text.scft import Interrupted, Scft, Trainer, Tuned, fine_tune
from models.text.scft_batches import Batches, Pairs, Partners, shuffle_texts
from models.text.view_retrieval import Gates, effective_rank, hold_out_views, refusals, target_ranks, validate_views, view_figures
from tests.models import tiny

SMALL = Scft(steps=6, batch=8, learning_rate=5e-3, validate_every=3, validation_items=8, candidates=20, compile=False)
GOOD = {
    "recall_1": 0.5,
    "recall_10": 0.8,
    "mrr": 0.6,
    "alignment": 0.1,
    "uniformity": -2.0,
    "mean_cosine": 0.3,
    "effective_rank": 40.0,
}


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
    of_base, _ = validate_views(untrained, hold_out_views(some_texts(40), config, untrained.limit, 1)[0])
    assert {name: result.history[0][name] for name in of_base} == pytest.approx(of_base, rel=1e-3, abs=1e-4)
    assert result.history[-1]["alignment"] != pytest.approx(of_base["alignment"], rel=0.01)
    assert result.best_step == max(result.history[1:], key=lambda entry: entry["mrr"])["step"]
    assert {"loss", "learning_rate", "tokens_per_s"} <= set(logged[1])


def test_the_same_seed_gives_the_same_weights_to_the_bit(base: Path) -> None:
    one, two = tuned(base)[0], tuned(base)[0]
    assert one.losses == two.losses
    assert all(torch.equal(value, two.lora[name]) for name, value in one.lora.items())


def test_a_killed_and_resumed_training_has_the_losses_of_an_uninterrupted_one(base: Path, tmp_path: Path) -> None:
    whole, _ = tuned(base)
    steps = iter(range(99))
    file = tmp_path / "deep" / "state.safetensors"
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        tuned(base, checkpoint=file, stop=lambda: next(steps) >= 3)
    resumed, _ = tuned(base, checkpoint=file)
    assert resumed.losses == whole.losses
    assert resumed.history == whole.history
    assert all(torch.equal(value, whole.lora[name]) for name, value in resumed.lora.items())


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
    told, _ = tuned(base, config, items=items, cluster_I=cluster_I)
    plain, _ = tuned(base, dataclasses.replace(config, cluster_weight=0.0), items=items, cluster_I=cluster_I)
    before, after = (np.subtract(told.losses[part], plain.losses[part]).mean() for part in (slice(1), slice(-5, None)))
    assert before == pytest.approx(math.log(2), rel=1e-5)
    assert after < 0.8 * before
    file, steps = tmp_path / "state.safetensors", iter(range(99))
    with pytest.raises(Interrupted):
        tuned(base, config, items=items, cluster_I=cluster_I, checkpoint=file, stop=lambda: next(steps) >= 3)
    assert tuned(base, config, items=items, cluster_I=cluster_I, checkpoint=file)[0].losses == told.losses
    with pytest.raises(ValueError, match="none were given"):
        tuned(base, config)


def test_pairs_bring_together_what_users_took_together_and_resume(base: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, pair_share=1.0, steps=60, patience=100, ratio=0.0)
    # red goes with dull and blue with loud, which no text says
    marks = [[("mark", ("red", "dull", "blue", "loud")[number % 4])] for number in range(40)]
    items = [[*own, *item[:1]] for own, item in zip(marks, tiny.items(40), strict=True)]
    pairs = Pairs(pair_P2=np.stack([np.arange(0, 40, 2), np.arange(1, 40, 2)], axis=1), user_P=np.arange(20))
    paired, _ = tuned(base, config, items=items, pairs=pairs, dropout=0.0)
    assert np.mean(paired.losses[-20:]) < 0.8 * math.log(8)
    file, steps = tmp_path / "state.safetensors", iter(range(99))
    with pytest.raises(Interrupted):
        tuned(base, config, items=items, pairs=pairs, dropout=0.0, checkpoint=file, stop=lambda: next(steps) >= 3)
    assert tuned(base, config, items=items, pairs=pairs, dropout=0.0, checkpoint=file)[0].losses == paired.losses
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
        tuned(base, dataclasses.replace(SMALL, pair_share=0.5, pair_support=2), pairs=pairs)


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


@pytest.mark.parametrize("wrong", [{"batch": 1}, {"ratio": 1.0}, {"ratio": -0.1}, {"temperature": 0.0}])
def test_settings_that_cannot_learn_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(SMALL, **wrong)


# ------------------------------------------------------------------------------------------------------------ processes

WORKER = """
import sys
from pathlib import Path
import torch.distributed as dist
from tests.models.text import test_scft
dist.init_process_group("gloo")
getattr(test_scft, sys.argv[1])(*map(Path, sys.argv[2:]))
dist.destroy_process_group()
"""


def in_two_processes(work: Callable[..., None], *paths: Path, port: int) -> None:
    """Runs a function of this file in two processes that know each other; fails where one fails or they hang."""
    known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(Path(__file__).parents[3])}  # fmt: skip
    command = [sys.executable, "-c", WORKER, work.__name__, *map(str, paths)]
    workers = [subprocess.Popen(command, env={**os.environ, **known, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [worker.wait(timeout=250) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()


def keep_weights(base: Path, file: Path) -> None:
    result, _ = tuned(base, dropout=0.0)
    if dist.get_rank() == 0:
        save_file(result.lora, file)


def test_two_processes_give_the_weights_of_one_at_the_same_global_batch(base: Path, tmp_path: Path, free_port: int) -> None:
    whole, _ = tuned(base, dropout=0.0)
    in_two_processes(keep_weights, base, tmp_path / "two.safetensors", port=free_port)
    # a sum in another order turns the step of an entry whose gradient is next to nothing, so weights are compared whole
    shared = load_file(tmp_path / "two.safetensors")
    other = tuned(base, dataclasses.replace(SMALL, batch=4), dropout=0.0)[0].lora
    for name, value in whole.lora.items():
        assert float((shared[name] - value).norm() / value.norm()) < 0.02
        assert "lora_B" not in name or float((other[name] - value).norm() / value.norm()) > 0.2


def stop_in_one_and_resume(base: Path, file: Path) -> None:
    """The second process alone is told to stop, after step 4; and it alone can't see the checkpoint afterwards."""
    rank, steps = dist.get_rank(), iter(range(99))
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        tuned(base, checkpoint=file, stop=lambda: next(steps) >= 3 and rank == 1)
    dist.barrier()
    resumed, logged = tuned(base, checkpoint=file.with_name("not there") if rank else file)
    assert len(resumed.losses) == 6 and sum("loss" in metrics for metrics in logged) == 2


def test_a_stop_that_reaches_one_process_stops_all_and_all_go_on_from_the_first_ones_checkpoint(
    base: Path, tmp_path: Path, free_port: int
) -> None:
    in_two_processes(stop_in_one_and_resume, base, tmp_path / "state.safetensors", port=free_port)
    assert (tmp_path / "state.safetensors").exists()


def judge_differently(base: Path, folder: Path) -> None:
    """In the second process every validation but the first looks worse, as it could on another kind of device."""
    rank, seen = dist.get_rank(), [0]
    plain, forward = view_retrieval.view_figures, Encoder.forward

    def figures(*given: torch.Tensor) -> dict[str, float]:
        seen.append(len(seen))
        return {**plain(*given), "mrr": float(len(seen) if rank == 0 else -len(seen))}

    rows = [0]

    def counted(self: Encoder, step: Step) -> torch.Tensor:
        rows[0] += 0 if self.training else len(step.length_B)
        return forward(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view_retrieval, "view_figures", figures)
        patch.setattr(Encoder, "forward", counted)
        result, _ = tuned(base, dataclasses.replace(SMALL, steps=8, validate_every=1, patience=2))
    facts = {"steps": result.steps, "best": result.best_step, "mrr": [entry["mrr"] for entry in result.history], "rows": rows[0]}
    (folder / f"{rank}.json").write_text(json.dumps(facts))


def test_processes_take_the_first_ones_validation_and_each_embeds_its_share(base: Path, tmp_path: Path, free_port: int) -> None:
    in_two_processes(judge_differently, base, tmp_path, port=free_port)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (one["steps"], one["best"], one["mrr"]) == (other["steps"], other["best"], other["mrr"]) == (8, 8, one["mrr"])
    # 9 validations of 8 + 8 + 20 prompts
    assert one["rows"] == other["rows"] == 9 * 18


def embed_some(base: Path, folder: Path) -> None:
    encoder = tiny.encoder(base)
    for count in (1, 7):
        source = prompts(encoder.tokenize(tiny.items(count)), np.arange(count), encoder.limit)[0]
        found, alone = embed_together(encoder, source), embed(encoder, source)
        assert found is None if dist.get_rank() else np.allclose(found, alone, atol=1e-5)


def test_processes_embed_prompts_together_in_their_order_however_few(base: Path, tmp_path: Path, free_port: int) -> None:
    in_two_processes(embed_some, base, tmp_path, port=free_port)


def fail_in_the_first(base: Path, folder: Path) -> None:
    def fails() -> bytes:
        raise OSError("no such disk")

    with pytest.raises(RuntimeError if dist.get_rank() else OSError):
        from_first(fails)
    assert from_first(lambda: b"") == b""
    assert any_process(dist.get_rank() == 1) and not any_process(False)


def test_a_failure_of_the_first_process_fails_in_all_instead_of_hanging(base: Path, tmp_path: Path, free_port: int) -> None:
    in_two_processes(fail_in_the_first, base, tmp_path, port=free_port)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_batch_that_processes_cannot_share_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.text.scft.dist.is_initialized", lambda: True)
    monkeypatch.setattr("models.text.scft.dist.get_rank", lambda: 0)
    monkeypatch.setattr("models.text.scft.dist.get_world_size", lambda: 3)
    encoder = tiny.encoder(base, lora=Lora())
    with pytest.raises(ValueError, match="give a multiple"):
        Trainer(encoder, encoder.tokenize(tiny.items(40)), np.arange(40), SMALL, 0)


# ----------------------------------------------------------------------------------------------------------- validation


def some_texts(count: int) -> Texts:
    return tokenize(tiny.items(count), tiny.tokenizer(), tiny.POLICY)


def test_held_out_items_are_not_trained_on_and_stand_first_among_the_candidates() -> None:
    validation, rest = hold_out_views(some_texts(50), SMALL, 200, 0)
    assert len(validation.items) == 8
    assert not set(validation.items) & set(rest)
    assert len(validation.items) + len(rest) == 50
    assert len(validation.candidates.length_B) == 20
    assert hold_out_views(some_texts(50), SMALL, 200, 0)[0].view_a.token_T.tolist() == validation.view_a.token_T.tolist()


def test_validation_reports_its_progress_and_gives_the_same_figures(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, told = tiny.encoder(base), []
    validation, _ = hold_out_views(encoder.tokenize(tiny.items(200)), dataclasses.replace(SMALL, candidates=200), 200, 0)
    monkeypatch.setattr(view_retrieval, "QUIET", 0.0)
    monkeypatch.setattr(view_retrieval, "CPU_TOKENS", 500)
    figures, items_CE = validate_views(encoder, validation, lambda done, total: told.append((done, total)))
    assert len(told) > 5 and told == sorted(told) and told[-1] == (216, 216)
    plain, plain_CE = validate_views(encoder, validation)
    np.testing.assert_allclose(items_CE, plain_CE, atol=1e-5)
    assert figures == pytest.approx(plain, rel=1e-4)
    monkeypatch.setattr(view_retrieval, "QUIET", 1e9)
    told.clear()
    validate_views(encoder, validation, lambda done, total: told.append((done, total)))
    assert told == []


def test_ties_take_their_expected_rank() -> None:
    items = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert target_ranks(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), items, torch.tensor([1, 2])).tolist() == [2.0, 1.0]


def test_a_query_that_is_not_finite_has_no_rank() -> None:
    assert math.isnan(float(target_ranks(torch.tensor([[math.nan, 0.0]]), torch.eye(2), torch.tensor([0]))[0]))


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_the_effective_rank_counts_the_directions_in_use(directions: int) -> None:
    emb_NE = torch.zeros(4000, 8)
    emb_NE[:, :directions] = torch.randn(4000, directions, generator=torch.Generator().manual_seed(0))
    assert effective_rank(emb_NE) == pytest.approx(directions, rel=0.01)


def test_perfect_views_are_found_and_aligned() -> None:
    items = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    found = view_figures(items[:10], items[:10], items, torch.arange(10))
    assert (found["recall_1"], found["mrr"], found["alignment"]) == (1.0, 1.0, 0.0)
    assert abs(found["mean_cosine"]) < 0.1


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(moved: float = 0.5, *, zero_shot: bool = False, **changed: float) -> list[str]:
    return refusals({**GOOD, **changed}, GOOD, moved, Gates(), candidates=1000, zero_shot=zero_shot)


def test_an_encoder_as_good_as_the_base_model_passes() -> None:
    assert refused() == []


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: refused(mean_cosine=0.99), "mean cosine 0.9900"),
        (lambda: refused(effective_rank=1.5), "effective rank 1.50"),
        (lambda: refused(moved=1e-6), "are the base model's"),
        (lambda: refused(recall_1=0.49), "0.4900 < 0.5000"),
        (lambda: refused(uniformity=math.nan), "not finite"),
        (lambda: refused(moved=math.nan), "not finite"),
    ],
)
def test_each_gate_refuses_its_kind_of_bad_encoder_with_the_figures(make: Callable[[], list[str]], why: str) -> None:
    reasons = make()
    assert len(reasons) == 1
    assert why in reasons[0]


def test_a_zero_shot_encoder_need_not_have_moved_and_a_tiny_catalogue_needs_less_rank() -> None:
    assert refused(moved=0.0, zero_shot=True) == []
    assert refusals({**GOOD, "effective_rank": 2.0}, GOOD, 0.5, Gates(), candidates=8) == []


def test_a_collapsed_space_is_refused_from_its_embeddings() -> None:
    generator = torch.Generator().manual_seed(0)
    items = torch.ones(50, 16) + 1e-3 * torch.randn(50, 1, generator=generator) * torch.ones(16)
    quality = view_figures(items[:10], items[:10], items, torch.arange(10))
    assert any("collapsed" in reason for reason in refusals(quality, {**GOOD, "recall_1": 0.0}, 0.5, Gates(), candidates=50))


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
