"""Training: learns, stops, resumes to equal losses, agrees over processes, and never looks where it must not."""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.behaviour import losses, rat_step, training
from models.behaviour.data import Histories, histories, leave_one_out, targets, train_counts
from models.behaviour.items import IdItems, MlpAdapter, TextItems
from models.behaviour.llm_esr import Distiller
from models.behaviour.losses import LOSSES
from models.behaviour.progress import Trained, make_validation, rounded, validate
from models.behaviour.rat_step import step_loss
from models.behaviour.recommender import Backbone, Recommender, build_sequence, score
from models.behaviour.training import Aligner, Training, batches, train
from models.processes import same_everywhere
from tests.forked import in_two_processes

ITEMS = 12
QUICK = Training(epochs=3, patience=99, batch=8, loss="full")


def cyclic(users: int = 24, length: int = 9) -> Histories:
    """Every user walks the items in order, whatever the length: the next item is certain."""
    lists = [[1 + (user + step) % ITEMS for step in range(length - user // 8 % 3)] for user in range(users)]
    lengths = torch.tensor([len(events) for events in lists])
    flat = torch.tensor([item for events in lists for item in events])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return leave_one_out(
        histories(
            offsets=offsets, items=flat, timestamps=torch.zeros_like(flat), train_end=lengths, valid_end=lengths, catalogue=ITEMS
        )
    )


def fresh(name: str = "sasrec", dropout: float = 0.0, seed: int = 0) -> Recommender:
    torch.manual_seed(seed)
    backbone = Backbone(name=name, width=16, dropout=dropout, max_len=6)  # type: ignore[arg-type]
    return Recommender(IdItems(ITEMS + 1, 16), build_sequence(backbone))


def silent(figures: dict[str, float], epoch: int) -> None:
    """A log that nobody reads."""


def trained(recommender: Recommender, config: Training = QUICK, **more: Any) -> Trained:
    return train(recommender, more.pop("events", cyclic()), config, max_len=6, seed=1, log=silent, **more)


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "bert4rec"])
def test_each_backbone_learns_a_walk_that_is_certain(name: str) -> None:
    # masks show Bert4Rec fewer labels an epoch; chance is 0.38
    epochs = 150 if name == "bert4rec" else 30
    done = trained(fresh(name), dataclasses.replace(QUICK, epochs=epochs, learning_rate=1e-2))
    assert done.ndcg > 0.6


@pytest.mark.parametrize("loss", ["full", *LOSSES])
@pytest.mark.parametrize("per", ["batch", "position"])
def test_each_loss_learns(loss: str, per: str) -> None:
    # four negatives for a whole batch teach gBCE slowest; chance is 0.38
    config = dataclasses.replace(QUICK, epochs=40, learning_rate=2e-2, loss=loss, negatives=4, negatives_per=per)
    done = trained(fresh(), config)
    assert done.ndcg > 0.6
    assert done.history[-1]["loss"] < 0.8 * done.history[0]["loss"]


@pytest.mark.parametrize("loss", ["full", *LOSSES])
def test_logit_adjustment_leaves_out_of_the_scores_what_popularity_alone_explains(loss: str) -> None:
    # whatever came before, one item follows in seven events of eight: no history says more than that
    torch.manual_seed(2)
    items = torch.where(torch.rand(60, 30) < 7 / 8, 1, torch.randint(2, ITEMS + 1, (60, 30))).flatten()
    lengths = torch.full((60,), 30)
    events = leave_one_out(
        histories(offsets=torch.arange(0, 1801, 30), items=items, timestamps=torch.zeros_like(items), train_end=lengths,
                  valid_end=lengths, catalogue=ITEMS)
    )  # fmt: skip
    # validated once, at the end: nearly every case asks for the same item, so that rounding decides which epoch is the best
    config = dataclasses.replace(QUICK, epochs=30, validate_every=30, batch=60, learning_rate=3e-2, loss=loss, negatives=32,
                                 windows="all")  # fmt: skip
    ahead = []
    for strength in (0.0, 1.0):
        recommender = fresh()
        trained(recommender, dataclasses.replace(config, logit_adjustment=strength), events=events)
        with torch.no_grad():
            scores_BV = score(recommender.encode(torch.randint(1, ITEMS + 1, (50, 6))), recommender.item_table())
        ahead.append(float((scores_BV[:, 1] - scores_BV[:, 2:].mean(1)).mean()))
    # both would be the log of the shares' ratio, 4.3, less what few events and negatives leave of it
    assert ahead[0] > 1
    assert ahead[0] - ahead[1] > 1


def test_the_weights_left_are_those_of_the_best_epoch() -> None:
    recommender, events = fresh(), cyclic()
    done = trained(recommender, dataclasses.replace(QUICK, epochs=12, learning_rate=3e-2), events=events)
    validation = make_validation(events, torch.arange(1, ITEMS + 1), 99, 6)
    again = validate(recommender, validation, nullcontext)
    assert again["ndcg"] == pytest.approx(done.ndcg, abs=1e-6)
    assert done.ndcg == max(figures["ndcg"] for figures in done.history)


def test_training_stops_when_validation_stops_improving() -> None:
    done = trained(fresh(), dataclasses.replace(QUICK, epochs=500, patience=3, learning_rate=1e-2))
    assert done.epochs == done.best_epoch + 3


def test_a_killed_training_resumes_to_equal_losses_and_weights(tmp_path: Path) -> None:
    config = dataclasses.replace(QUICK, epochs=6, loss="sampled", negatives=4)
    straight = fresh(dropout=0.3)
    whole = trained(straight, config)

    class Killed(Exception):
        pass

    def dies(figures: dict[str, float], epoch: int) -> None:
        if epoch == 4:
            raise Killed

    path = tmp_path / "deep" / "run.safetensors"
    with pytest.raises(Killed):
        train(fresh(dropout=0.3), cyclic(), config, max_len=6, seed=1, log=dies, checkpoint=path)
    resumed = fresh(dropout=0.3, seed=99)
    rest = trained(resumed, config, checkpoint=path)
    assert rest.history == whole.history
    assert all(torch.equal(straight.state_dict()[name], value) for name, value in resumed.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["run.safetensors"]


def test_the_same_seed_gives_the_same_losses_and_another_seed_others() -> None:
    first, second = trained(fresh(dropout=0.2)), trained(fresh(dropout=0.2))
    assert first.history == second.history
    other = train(fresh(dropout=0.2), cyclic(), QUICK, max_len=6, seed=2, log=silent)
    assert other.history != first.history


def test_padding_stays_zero_through_training() -> None:
    recommender = fresh()
    trained(recommender, dataclasses.replace(QUICK, weight_decay=0.1))
    assert (recommender.item_table()[0] == 0).all()


def make(recommender: Recommender, events: Histories, config: Training = QUICK) -> training.Task:
    return training.make_task(recommender, events, config, 6, torch.arange(1, ITEMS + 1), None, 1)[0]


def test_the_loss_does_not_depend_on_padding_or_on_the_room_for_labels() -> None:
    task = make(fresh(), cyclic())
    rows = torch.tensor([0, 3, 5])
    tight = step_loss(task, rows, 6, 18)
    assert torch.allclose(step_loss(task, torch.tensor([0, 3, 5, 24, 24]), 6, 30), tight, atol=1e-6)


def test_a_batch_cut_to_its_longest_row_has_the_loss_of_the_full_width() -> None:
    events = cyclic(length=5)
    task = make(fresh(), events)
    rows = torch.arange(6)
    assert torch.allclose(step_loss(task, rows, 2, 12), step_loss(task, rows, 6, 36), atol=1e-6)


def test_test_and_validation_events_do_not_reach_training() -> None:
    events = cyclic()
    changed = dataclasses.replace(events, items_N=events.items_N.clone())
    later = changed.position_N >= changed.train_end_U[changed.user_N]
    changed.items_N[later] = 1
    rows = torch.arange(8)
    assert torch.equal(step_loss(make(fresh(), events), rows, 6, 48), step_loss(make(fresh(), changed), rows, 6, 48))


def test_items_held_out_are_no_negatives_no_targets_and_take_no_gradient() -> None:
    recommender, events = fresh(), cyclic()
    warm = torch.tensor([item for item in range(1, ITEMS + 1) if item != 5])
    chunks = make_validation(events, warm, 99, 6).chunks
    seen = torch.cat([targets(events, users, position) for users, position, _ in chunks])
    assert 5 not in seen.tolist()
    hidden, label = torch.randn(40, 16), warm[torch.arange(40) % len(warm)]
    for loss in ("full", *LOSSES):
        config = dataclasses.replace(QUICK, loss=loss, negatives=64)
        task = dataclasses.replace(make(recommender, events, config), candidates_M=warm)
        recommender.zero_grad()
        rat_step.recommendation(task, hidden, label, recommender.items).sum().backward()
        assert recommender.items.weight.grad[5].abs().max() == 0


def test_the_full_loss_in_chunks_equals_the_loss_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, table = torch.randn(10, 4, requires_grad=True), torch.randn(7, 4)
    label = torch.arange(10) % 7
    whole = rat_step.full(hidden, table, label)
    (gradient,) = torch.autograd.grad(whole.sum(), hidden)
    monkeypatch.setattr(rat_step, "LOGITS", 21)
    parts = rat_step.full(hidden, table, label)
    (again,) = torch.autograd.grad(parts.sum(), hidden)
    assert torch.allclose(parts, whole)
    assert torch.allclose(again, gradient)


def aligned(weight_V: Tensor, alpha: float = 1.0) -> tuple[Recommender, Aligner]:
    torch.manual_seed(0)
    recommender = Recommender(
        TextItems(torch.randn(ITEMS, 10), MlpAdapter(10, 32, 16)), build_sequence(Backbone(width=16, dropout=0.0, max_len=6))
    )
    return recommender, Aligner(teacher_VD=torch.randn(ITEMS + 1, 16), weight_V=weight_V, alpha=alpha, temperature=0.1)


def test_alignment_counts_each_item_of_a_batch_once_and_no_padding() -> None:
    recommender, aligner = aligned(torch.cat([torch.zeros(1), torch.rand(ITEMS) + 0.1]))
    batch = torch.tensor([[0, 0, 3, 3, 3], [0, 3, 7, 9, 7]])
    items = torch.tensor([3, 7, 9])
    expected = losses.alignment(recommender.items(items), aligner.teacher_VD[items], aligner.weight_V[items], 0.1)
    assert torch.allclose(rat_step.align(aligner, batch, recommender.items, 8), expected, atol=1e-5)


def test_training_with_a_teacher_turns_vectors_towards_it() -> None:
    counts = train_counts(cyclic())
    apart, aligner = aligned(counts / (counts + 1), alpha=0.0)
    together, _ = aligned(counts)
    config = dataclasses.replace(QUICK, epochs=15, learning_rate=1e-2)
    trained(apart, config, aligner=aligner)
    trained(together, config, aligner=dataclasses.replace(aligner, alpha=1.0))

    def cosine(recommender: Recommender) -> float:
        table = recommender.item_table().detach()
        return float(torch.cosine_similarity(table[1:], aligner.teacher_VD[1:]).mean())

    assert cosine(together) > cosine(apart) + 0.2


def test_every_row_is_in_exactly_one_batch_of_an_epoch_over_all_processes() -> None:
    length = torch.arange(1, 22)
    rows = [
        row
        for rank in range(2)
        for row_B, width, labels in batches(length, QUICK, 5, rank, 2, torch.device("cpu"))
        for row in row_B.tolist()
        if labels >= 1 and width >= 1
    ]
    assert sorted(row for row in rows if row < 21) == list(range(21))
    assert len(rows) == 24


def test_shapes_are_few_and_large_enough() -> None:
    shapes = {rounded(value, 1000) for value in range(1, 1001)}
    assert all(rounded(value, 1000) >= value for value in range(1, 1001))
    assert len(shapes) < 22


@pytest.mark.parametrize("bad", ["no rows", "no validation"])
def test_nothing_to_train_or_validate_on_is_refused_with_a_remedy(bad: str) -> None:
    events = cyclic()
    ends = torch.zeros_like(events.train_end_U) if bad == "no rows" else events.length_U
    broken = dataclasses.replace(events, train_end_U=ends, valid_end_U=torch.maximum(ends, events.valid_end_U))
    with pytest.raises(ValueError, match=r"nothing to train on|no user has an event to validate on"):
        trained(fresh(), events=broken)


@pytest.mark.parametrize("values", [{"epochs": 0}, {"batch": 0}, {"negatives": 0}, {"patience": 2, "validate_every": 3}])
def test_settings_that_make_no_sense_are_refused_by_name(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        Training(**values)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_training() -> None:
    recommender = fresh()
    recommender.items.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="loss is nan"):
        trained(recommender)


def process(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    recommender = fresh(seed=rank)
    done = trained(recommender)
    text = same_everywhere(f"from {rank}", torch.device("cpu"))
    torch.distributed.destroy_process_group()
    lines = [str(figures["loss"]) for figures in done.history] + [text, str(float(recommender.item_table().detach().sum()))]
    (folder / str(rank)).write_text("\n".join(lines))


def test_two_processes_train_the_model_that_one_trains(tmp_path: Path) -> None:
    in_two_processes(process, tmp_path)
    first, second = ((tmp_path / str(rank)).read_text().split("\n") for rank in range(2))
    # what one process sums in another order than the other may round differently; another model is far away
    assert list(map(float, first[:3])) == pytest.approx(list(map(float, second[:3])), rel=1e-5)
    assert float(first[4]) == pytest.approx(float(second[4]), abs=1e-3)
    assert first[3] == second[3] == "from 0"
    alone = trained(fresh(seed=0))
    assert [float(loss) for loss in first[:3]] == pytest.approx([figures["loss"] for figures in alone.history], rel=1e-4)


def aligner() -> Aligner:
    teacher_VD = torch.randn(ITEMS + 1, 16, generator=torch.Generator().manual_seed(3))
    weight_V = torch.ones(ITEMS + 1)
    weight_V[0] = 0
    return Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=1.0, temperature=0.2)


def aligned_process(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    done = trained(fresh(seed=rank), aligner=aligner())
    torch.distributed.destroy_process_group()
    (folder / str(rank)).write_text("\n".join(str(figures["loss"]) for figures in done.history))


def test_two_processes_align_the_items_that_one_aligns(tmp_path: Path) -> None:
    """Each process's own items alone would be other, easier softmaxes."""
    in_two_processes(aligned_process, tmp_path)
    losses = [float(line) for line in (tmp_path / "0").read_text().split("\n")]
    alone = trained(fresh(seed=0), aligner=aligner())
    assert losses == pytest.approx([figures["loss"] for figures in alone.history], rel=1e-3)


def test_a_killed_training_remembers_the_users_that_others_learn_from(tmp_path: Path) -> None:
    """LLM-ESR's distiller holds each user's last vector; a resumed run without them learns from nobody for an epoch."""

    def run(epochs: int, file: Path | None) -> list[float]:
        events = cyclic()
        like_US = torch.stack([torch.arange(24).roll(1), torch.arange(24).roll(2)], dim=1)
        distiller = Distiller(events, like_US, 16, 5.0)
        config = dataclasses.replace(QUICK, epochs=epochs, patience=99)
        return [
            figures["loss"] for figures in trained(fresh(), config, events=events, distiller=distiller, checkpoint=file).history
        ]

    whole = run(4, None)
    run(2, tmp_path / "state.safetensors")
    assert run(4, tmp_path / "state.safetensors") == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("unseen", [False, True])
def test_validation_ranks_among_unseen_items_where_serving_does(unseen: bool) -> None:
    """A model whose best guess is what users have had: among unseen items it is right, among all it never is."""
    lists = [[1 + (user + step) % ITEMS for step in range(5)] for user in range(30)]
    flat = torch.tensor([item for items in lists for item in items])
    events = leave_one_out(histories(
        offsets=torch.arange(0, 151, 5), items=flat, timestamps=torch.zeros_like(flat), train_end=torch.full((30,), 5),
        valid_end=torch.full((30,), 5), catalogue=ITEMS,
    ))  # fmt: skip

    class Echo(torch.nn.Module):
        """Scores all that was had highest, then what comes next."""

        mask_share = 0.0

        def forward(self, emb_BLD: torch.Tensor, valid_BL: torch.Tensor) -> torch.Tensor:
            had_BD = (emb_BLD * valid_BL[..., None]).sum(1)
            return (had_BD * 3 + emb_BLD[:, -1].roll(1, dims=1))[:, None]

    items = IdItems(ITEMS + 1, ITEMS)
    items.weight.data = torch.nn.functional.pad(torch.eye(ITEMS), (0, 0, 1, 0))
    validation = make_validation(events, torch.arange(1, ITEMS + 1), 99, 6, unseen)
    found = validate(Recommender(items, Echo()), validation, nullcontext)
    assert (found["ndcg"] == pytest.approx(1.0)) is unseen


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_a_cosine_softmax_learns_whatever_the_size_of_the_vectors(loss: str) -> None:
    config = dataclasses.replace(QUICK, epochs=40, learning_rate=1e-2, loss=loss, cosine=0.1)
    torch.manual_seed(0)
    white_NK = torch.eye(ITEMS)
    items = TextItems(white_NK, MlpAdapter(ITEMS, 32, 16), unit=True)
    recommender = Recommender(items, build_sequence(Backbone(width=16, dropout=0.0, max_len=6)))
    done = trained(recommender, config)
    torch.testing.assert_close(recommender.item_table()[1:].norm(dim=1), torch.ones(ITEMS))
    assert done.ndcg > 0.6


def test_a_loss_that_is_none_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"training\.loss is 'hinges': there are full, sampled, gbce, bce"):
        Training(loss="hinges")
