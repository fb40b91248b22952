"""Training of recommenders on a GPU: steps replayed as CUDA graphs, and compiled, come to what plain steps come to.

Needs torch, NumPy, safetensors and pytest, and no data. `make test-gpu` runs it.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from models.behaviour.losses import LOSSES
from models.behaviour.progress import Trained
from models.behaviour.recommender import Recommender
from models.behaviour.training import WARM_UP, Stepper, Training, train
from tests.models.behaviour.test_training import cyclic, fresh, silent

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
DEVICE = "cuda"
EXACT = Training(epochs=12, patience=99, batch=24, loss="full", precision="fp32", learning_rate=1e-2)
"""Nothing in it is drawn at random: 24 rows are one batch, so that every epoch is one step."""


def trained(recommender: Recommender, config: Training, device: str = DEVICE, *, seed: int = 1, **more: Any) -> Trained:
    return train(recommender, cyclic().to(device), config, max_len=6, seed=seed, log=more.pop("log", silent), **more)


def losses(done: Trained) -> list[float]:
    return [figures["loss"] for figures in done.history]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each replay of a graph."""
    found: list[int] = []
    plain = torch.cuda.CUDAGraph.replay

    def replay(self: torch.cuda.CUDAGraph) -> None:
        found.append(1)
        plain(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    return found


@pytest.mark.parametrize("adjustment", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sasrec", "gru4rec"])
def test_replayed_steps_have_the_losses_of_plain_ones_and_of_the_cpu(replays: list[int], name: str, adjustment: float) -> None:
    config = dataclasses.replace(EXACT, logit_adjustment=adjustment)
    replayed = losses(trained(fresh(name), config))
    # one shape, every epoch a step
    assert len(replays) == EXACT.epochs - WARM_UP
    plain = losses(trained(fresh(name), dataclasses.replace(config, graph=False)))
    assert len(replays) == EXACT.epochs - WARM_UP
    assert replayed == pytest.approx(plain, rel=1e-3)
    assert replayed == pytest.approx(losses(trained(fresh(name), config, "cpu")), rel=1e-2)


def test_replayed_steps_leave_the_weights_of_plain_ones() -> None:
    one, two = fresh(), fresh()
    trained(one, EXACT)
    trained(two, dataclasses.replace(EXACT, graph=False))
    for name, value in one.state_dict().items():
        other = two.state_dict()[name]
        assert float((value - other).norm()) <= 0.02 * float(other.norm()) + 1e-3


def test_every_replay_draws_dropout_anew(replays: list[int]) -> None:
    # no weight moves: without dropout every epoch has the same loss
    still = dataclasses.replace(EXACT, learning_rate=0.0)
    same, drawn = losses(trained(fresh(), still)), losses(trained(fresh(dropout=0.5), still))
    assert replays
    assert same == pytest.approx([same[0]] * EXACT.epochs, rel=1e-4)
    replayed = sorted(drawn[WARM_UP:])
    assert all(two - one > 1e-7 for one, two in itertools.pairwise(replayed))


@pytest.mark.parametrize("per", ["batch", "position"])
@pytest.mark.parametrize("loss", ["full", *LOSSES])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_loss_learns_under_graphs(loss: str, per: str, precision: str) -> None:
    config = Training(epochs=60, patience=99, batch=8, learning_rate=2e-2, loss=loss, negatives=4, negatives_per=per,  # type: ignore[arg-type]
                      precision=precision)  # type: ignore[arg-type]  # fmt: skip
    assert trained(fresh(), config).ndcg > 0.6


@pytest.mark.parametrize("name", ["gru4rec", "bert4rec"])
def test_other_backbones_learn_under_graphs_in_bf16(name: str) -> None:
    config = Training(epochs=150, patience=150, batch=8, learning_rate=1e-2, loss="full")
    assert trained(fresh(name), config).ndcg > 0.6


def test_a_training_under_graphs_that_was_killed_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def dies(figures: dict[str, float], epoch: int) -> None:
        if epoch == 7:
            raise Killed

    path, whole = tmp_path / "run.safetensors", losses(trained(fresh(), EXACT))
    with pytest.raises(Killed):
        trained(fresh(), EXACT, log=dies, checkpoint=path)
    resumed = losses(trained(fresh(seed=99), EXACT, checkpoint=path))
    assert resumed == pytest.approx(whole, rel=1e-3)
    # another seed starts from other weights: the comparison can tell
    assert losses(trained(fresh(seed=99), EXACT)) != pytest.approx(whole, rel=1e-3)


def test_batches_of_many_shapes_have_a_graph_each(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Stepper] = []
    plain = Stepper.__init__

    def init(self: Stepper, *arguments: Any) -> None:
        plain(self, *arguments)
        made.append(self)

    monkeypatch.setattr(Stepper, "__init__", init)
    config = dataclasses.replace(EXACT, batch=5, epochs=20)
    replayed = losses(trained(fresh(), config))
    assert len(made[0].graphs) >= 2
    assert replayed == pytest.approx(losses(trained(fresh(), dataclasses.replace(config, graph=False))), rel=0.02)


def test_a_compiled_sequence_encoder_has_the_losses_of_a_plain_one() -> None:
    plain = losses(trained(fresh(), dataclasses.replace(EXACT, graph=False)))
    for graph in (False, True):
        compiled = losses(trained(fresh(), dataclasses.replace(EXACT, graph=graph, compile=True)))
        assert compiled == pytest.approx(plain, rel=1e-2)
