"""A step of SCFT: which views are no negatives, which dropout a step has, and what a killed run takes up again.

Each fixture holds two of what could be mixed up: seeds, steps, processes, micro-batches.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.text import scft
from models.text.encoder import Encoder
from models.text.lora import Lora, lora_state
from models.text.objectives import Signals
from models.text.prompts import Attributes
from models.text.scft import Interrupted, Scft, Trainer, Tuned, fine_tune
from models.text.scft_batches import Pairs
from models.text.view_retrieval import hold_out_views
from models.text.views import views
from tests.models import tiny

STEADY = Scft(steps=6, batch=8, ratio=0.0, learning_rate=5e-3, validate_every=1, patience=99, validation_items=8, candidates=20,
              compile=False)  # fmt: skip
RISE_AND_FALL = (0.0, 0.1, 0.5, 0.3, 0.2, 0.1, 0.1)
"""mrr of each step's validation, the base model's first: the second step is the best."""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    return tiny.llama(tmp_path / "base")


def moved(base: Path, dropout: float) -> Encoder:
    """An encoder whose LoRA weights change something, so that their dropout shows."""
    encoder = tiny.encoder(base, lora=Lora(dropout=dropout))
    torch.manual_seed(3)
    for name, value in encoder.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    return encoder


# -------------------------------------------------------------------------------------------------------- false negatives


def twins() -> list[Attributes]:
    """Eight items, two and two of which read the same."""
    return [item for item in tiny.items(4) for _ in range(2)]


def poor() -> list[Attributes]:
    """Eight different items of which a view that loses one attribute reads like another item's."""
    return [[("kind", "ab"[number % 2]), ("title", f"film {number}")] for number in range(8)]


@pytest.mark.parametrize("kind", ["texts", "views", "partners"])
def test_a_steps_loss_leaves_out_negatives_that_read_the_same(base: Path, kind: str) -> None:
    items = twins() if kind == "texts" else poor()
    config = dataclasses.replace(STEADY, ratio=0.5 if kind == "views" else 0.0, pair_share=0.5 * (kind == "partners"))
    # every odd item was taken right after item 0
    pairs = Pairs(pair_P2=np.asarray([[0, odd] for odd in (1, 3, 5, 7)]), user_P=np.arange(4)) if kind == "partners" else None
    encoder = moved(base, dropout=0.0)
    trainer = Trainer(encoder, encoder.tokenize(items), np.arange(8), config, 1, Signals(pairs=pairs))
    drawn = trainer.batches.draw(0)
    with torch.no_grad():
        all_RE = trainer.forward(drawn.rows, 0)
    alike = np.zeros((8, 8), dtype=bool)
    text, partner = trainer.texts.text_I[drawn.items], trainer.texts.text_I[drawn.partners]
    for one, other in itertools.product(range(8), repeat=2):
        alike[one, other] = text[one] == text[other] or partner[one] == partner[other] or text[one] == partner[other]
        alike[one, other] |= drawn.keys[2 * one] == drawn.keys[2 * other + 1]
    assert (alike & ~np.eye(8, dtype=bool)).any(), "the fixture has no false negative"
    often_B = None if pairs is None else np.log([0.5 / 4 * (item % 2) + 0.5 / 8 for item in drawn.partners.tolist()])
    wanted, blind = (expected(all_RE, config.temperature, mask, often_B) for mask in (alike, np.eye(8, dtype=bool)))
    assert trainer.train_step() == pytest.approx(wanted, rel=1e-3)
    assert abs(blind - wanted) > 0.02 * wanted, "the loss can't tell"


def expected(all_RE: Tensor, temperature: float, alike: np.ndarray, often_B: np.ndarray | None) -> float:
    """InfoNCE row by row: in both directions, or for pairs from the first to the second alone, freed of popularity."""
    logits = F.normalize(all_RE[0::2], dim=1) @ F.normalize(all_RE[1::2], dim=1).T / temperature
    if often_B is not None:
        logits = logits - torch.from_numpy(often_B).float()
    losses = []
    for own in range(len(logits)):
        ways = ((logits[own], alike[own]), (logits[:, own], alike[:, own]))
        for seen, mask in ways if often_B is None else ways[:1]:
            others = [other for other in range(len(logits)) if other == own or not mask[other]]
            losses.append(float(seen[others].logsumexp(0) - seen[own]))
    return float(np.mean(losses))


# --------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_one_within_a_step_and_another_at_every_step_seed_process_and_micro_batch(base: Path) -> None:
    encoder = moved(base, dropout=0.5)
    texts = encoder.tokenize(tiny.items(40))
    trainer = Trainer(encoder, texts, np.arange(40), STEADY, 1)
    rows, _ = views(texts, np.arange(6), 0.0, encoder.limit, np.random.default_rng(0))
    encoder.train()

    def seen(*, seed: int = 1, step: int = 0, rank: int = 0, number: int = 0) -> Tensor:
        trainer.seed, trainer.losses, trainer.rank = seed, [0.0] * step, rank
        with torch.no_grad():
            return trainer.forward(rows, number)

    first = seen()
    torch.testing.assert_close(seen(), first, rtol=1e-5, atol=1e-5)
    others = [seen(step=1), seen(step=2), seen(seed=2), seen(rank=1), seen(number=1)]
    for one, other in itertools.combinations([first, *others], 2):
        assert float((one - other).norm() / one.norm()) > 0.01


def test_the_steps_of_a_training_have_masks_of_their_own(base: Path) -> None:
    # no weight moves and every step has the same views: what is left is dropout
    losses: dict[float, list[float]] = {}
    for dropout in (0.0, 0.5):
        encoder = moved(base, dropout)
        trainer = Trainer(encoder, encoder.tokenize(tiny.items(8)), np.arange(8), STEADY, 1)
        same = trainer.batches.draw(0)
        draw = {"draw": lambda step, same=same: dataclasses.replace(same, step=step)}
        trainer.batches = SimpleNamespace(**draw)  # type: ignore[assignment]
        trainer.update = lambda: None  # type: ignore[method-assign]
        losses[dropout] = [trainer.train_step() for _ in range(3)]
    assert losses[0.0] == pytest.approx([losses[0.0][0]] * 3, rel=1e-5)
    for one, other in itertools.combinations(losses[0.5], 2):
        assert abs(one - other) > 1e-3


# ---------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation says what RISE_AND_FALL says, whatever was learned."""
    plain, step = scft.validate_together, [0]

    def validate_together(encoder: Encoder, validation: Any, log: Any = None) -> dict[str, float]:
        return plain(encoder, validation, log) | {"mrr": RISE_AND_FALL[step[0]]}

    def validate(self: Trainer, validation: Any, log: Any) -> None:
        step[0] = self.step
        whole(self, validation, log)

    whole = Trainer.validate
    monkeypatch.setattr(scft, "validate_together", validate_together)
    monkeypatch.setattr(Trainer, "validate", validate)


def run(base: Path, steps: int, *, seed: int, **more: Any) -> tuple[Tuned, Encoder]:
    """A training over the same learning rates, ended after some of the six steps."""
    encoder, ended = tiny.encoder(base, lora=Lora(dropout=0.1)), iter(range(99))
    texts = encoder.tokenize(tiny.items(40))
    stop = {"stop": lambda: next(ended) >= steps - 1} if steps < STEADY.steps else {}
    return fine_tune(encoder, texts, STEADY, seed=seed, log=lambda *_: None, **(stop | more)), encoder


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.usefixtures("scripted")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_training_killed_after_its_best_step_ends_with_the_best_weights(base: Path, tmp_path: Path, seed: int) -> None:
    whole, encoder = run(base, 6, seed=seed)
    assert (whole.best_step, whole.steps) == (2, 6)
    assert same(whole.learned, lora_state(encoder.model)), "the encoder is left with other weights than those it reports"
    file = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        run(base, 4, seed=seed, checkpoint=file)
    resumed, left = run(base, 6, seed=seed, checkpoint=file)
    assert resumed.best_step == 2
    assert same(whole.learned, resumed.learned) and same(whole.learned, lora_state(left.model))


@pytest.mark.usefixtures("scripted")
def test_the_weights_left_are_those_of_the_best_step_and_not_the_last(base: Path, tmp_path: Path) -> None:
    whole, _ = run(base, 6, seed=1)
    kept = {}
    for steps in (2, 5):
        file = tmp_path / f"{steps}.safetensors"
        with pytest.raises(Interrupted):
            run(base, steps, seed=1, checkpoint=file)
        trainer = Trainer(*fresh(base), STEADY, 1)
        trainer.load(file.read_bytes())
        kept[steps] = lora_state(trainer.encoder.model)
    assert same(whole.learned, kept[2])
    assert not same(whole.learned, kept[5])


def fresh(base: Path) -> tuple[Encoder, Any, Any]:
    """What a trainer is made of."""
    encoder = tiny.encoder(base, lora=Lora(dropout=0.1))
    texts = encoder.tokenize(tiny.items(40))
    return encoder, texts, hold_out_views(texts, STEADY, encoder.limit, 1)[1]
