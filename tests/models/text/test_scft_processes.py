"""SCFT in several processes: the weights, validations and stops of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from models.processes import any_process, from_first
from models.text import view_retrieval
from models.text.embedding import embed, embed_together
from models.text.encoder import Encoder
from models.text.lora import Lora
from models.text.objectives import Signals
from models.text.packing import Step
from models.text.prompts import prompts
from models.text.scft import Interrupted, fine_tune
from models.text.users import users_of
from tests.forked import in_two_processes
from tests.models import tiny
from tests.models.text.test_scft import SMALL, tuned
from tests.models.text.test_scft import base as base  # for pytest, which looks fixtures up here
from tests.models.text.test_scft import own_cache as own_cache


def connected(work: Callable[..., None], *paths: Path) -> None:
    """Runs a function of this file in a process that knows the other one."""
    dist.init_process_group("gloo")
    work(*paths)
    dist.destroy_process_group()


def keep_weights(base: Path, file: Path) -> None:
    result, _ = tuned(base, dropout=0.0)
    if dist.get_rank() == 0:
        save_file(result.learned, file)


def test_two_processes_give_the_weights_of_one_at_the_same_global_batch(base: Path, tmp_path: Path) -> None:
    whole, _ = tuned(base, dropout=0.0)
    in_two_processes(connected, keep_weights, base, tmp_path / "two.safetensors")
    # a sum in another order turns the step of an entry whose gradient is next to nothing, so weights are compared whole
    shared = load_file(tmp_path / "two.safetensors")
    other = tuned(base, dataclasses.replace(SMALL, batch=4), dropout=0.0)[0].learned
    for name, value in whole.learned.items():
        assert float((shared[name] - value).norm() / value.norm()) < 0.02
        assert "lora_B" not in name or float((other[name] - value).norm() / value.norm()) > 0.2


def learn_all(base: Path, file: Path) -> None:
    """A training on views, a teacher's clusters and vectors, and users' titles; leaves its checkpoint."""
    config = dataclasses.replace(SMALL, cluster_weight=0.5, teacher_weight=0.5, user_weight=0.5, title_weight=0.5, user_share=0.5)
    encoder = tiny.encoder(base, lora=Lora(dropout=0.0))
    users = users_of(encoder, np.arange(36), np.repeat(np.arange(9), 4), [f"film {number}" for number in range(40)])
    vector_ID = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    signals = Signals(users=users, cluster_I=np.arange(40) % 3, teacher_ID=vector_ID)
    texts = encoder.tokenize(tiny.items(40))
    result = fine_tune(encoder, texts, config, seed=1, log=lambda *_: None, signals=signals, checkpoint=file)
    if dist.is_initialized():
        told = torch.tensor(result.losses, dtype=torch.float64)
        others = [torch.empty_like(told) for _ in range(2)]
        dist.all_gather(others, told)
        assert torch.equal(others[0], others[1])


def test_two_processes_learn_from_teachers_and_users_what_one_learns(tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "tied", tie_word_embeddings=True)
    learn_all(base, tmp_path / "one.safetensors")
    in_two_processes(connected, learn_all, base, tmp_path / "two.safetensors")
    whole, shared = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    names = [name for name in whole if name.startswith(("learned.", "heads."))]
    assert {"heads.user", "heads.cluster", "heads.teacher"} <= set(names)
    for name in names:
        assert float((shared[name] - whole[name]).norm() / whole[name].norm()) < 0.02, name


def stop_in_one_and_resume(base: Path, file: Path) -> None:
    """The second process alone is told to stop, after step 4; and it alone can't see the checkpoint afterwards."""
    rank, steps = dist.get_rank(), iter(range(99))
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        tuned(base, checkpoint=file, stop=lambda: next(steps) >= 3 and rank == 1)
    dist.barrier()
    resumed, logged = tuned(base, checkpoint=file.with_name("not there") if rank else file)
    assert len(resumed.losses) == 6 and sum("loss" in metrics for metrics in logged) == 2


def test_a_stop_that_reaches_one_process_stops_all_and_all_go_on_from_the_first_ones_checkpoint(
    base: Path, tmp_path: Path
) -> None:
    in_two_processes(connected, stop_in_one_and_resume, base, tmp_path / "state.safetensors")
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


def test_processes_take_the_first_ones_validation_and_each_embeds_its_share(base: Path, tmp_path: Path) -> None:
    in_two_processes(connected, judge_differently, base, tmp_path)
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


def test_processes_embed_prompts_together_in_their_order_however_few(base: Path, tmp_path: Path) -> None:
    in_two_processes(connected, embed_some, base, tmp_path)


def fail_in_the_first(base: Path, folder: Path) -> None:
    def fails() -> bytes:
        raise OSError("no such disk")

    with pytest.raises(RuntimeError if dist.get_rank() else OSError):
        from_first(fails)
    assert from_first(lambda: b"") == b""
    assert any_process(dist.get_rank() == 1) and not any_process(False)


def test_a_failure_of_the_first_process_fails_in_all_instead_of_hanging(base: Path, tmp_path: Path) -> None:
    in_two_processes(connected, fail_in_the_first, base, tmp_path)
