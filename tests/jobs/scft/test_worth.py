"""scft weighs an encoder by what it foretells without training: refuses what is worse, and says what it can't tell."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist

from jobs import scft
from jobs.lake import partitions
from jobs.lake.items import content_hash
from jobs.lake.tables import ATTRIBUTES, ITEMS, SEQUENCES
from jobs.run import InputError, Refused, Run
from jobs.scft import judge, worth
from models.judge import untrained
from models.text.lora import Lora
from models.text.scft import Scft
from models.text.view_retrieval import Gates
from tests.forked import in_two_processes
from tests.jobs.small_lake import remember
from tests.models import tiny
from tests.models.text.test_scft_processes import connected

DS, LATER = "2026-03-10", "2026-05-10"
FAST = Scft(steps=4, batch=8, learning_rate=5e-3, validate_every=2, validation_items=10, candidates=30, compile=False, ratio=0.1)
LENIENT = Gates(effective_rank=1.0, mean_cosine=1.0, recall_drop=1.0)
ITEMS_N = 60


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> scft.Config:
    """A small model over 60 items and 120 users who stay among neighbours."""
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    lake = tmp_path / "lake"
    for ds in (DS, LATER):
        write(lake, ds, users=120)
    run = Run(ds=DS, lake=lake, device="cpu")
    return scft.Config(run=run, base=str(tiny.llama(tmp_path / "base")), policy=tiny.POLICY, training=FAST, max_tokens=256,
                       lora=Lora(dropout=0.0), gates=LENIENT)  # fmt: skip


def write(lake: Path, ds: str, users: int) -> None:
    items = tiny.items(ITEMS_N)
    ids = [f"i{number:04d}" for number in range(ITEMS_N)]
    attributes = [[{"name": name, "value": value} for name, value in item] for item in items]
    hashes = [content_hash(item) for item in items]
    rows = {
        "item_id": ids,
        "attributes": pa.array(attributes, ATTRIBUTES),
        "content_hash": hashes,
        "first_seen_ds": [ds] * ITEMS_N,
    }
    partitions.write(lake, ITEMS, f"ds={ds}", [pa.table(rows)])
    taken = [[ids[(start + step) % ITEMS_N] for step in range(6)] for start in range(users)]
    logs = {"user_id": [f"u{number}" for number in range(users)], "item_ids": taken, "timestamps": [list(range(6))] * users,
            "train_end": pa.array([4] * users, pa.int32()), "valid_end": pa.array([5] * users, pa.int32())}  # fmt: skip
    partitions.write(lake, SEQUENCES, f"ds={ds}", [pa.table(logs)])


def changed(config: scft.Config, **more: Any) -> scft.Config:
    return dataclasses.replace(config, **more)


def on(config: scft.Config, ds: str, **more: Any) -> scft.Config:
    return changed(config, run=dataclasses.replace(config.run, ds=ds), **more)


def weigh_as(monkeypatch: pytest.MonkeyPatch, overall: tuple[float, float], users: int = 500) -> None:
    """The comparison says this of overall NDCG, whatever was embedded."""

    def found(trial: object, encoders: dict[str, torch.Tensor], seed: int) -> untrained.Worth:
        less = {f"new - {name}": {"overall": (sum(overall) / 2, *overall)} for name in encoders if name != "new"}
        return untrained.Worth(users=users, ndcg={name: {"overall": 0.1} for name in encoders}, less=less)

    monkeypatch.setattr(worth.untrained, "weigh", found)


def test_figures_stand_beside_the_base_and_the_encoder_before(config: scft.Config) -> None:
    first = scft.run(config)
    assert first.worth["verdict"] in ("better", "no different") and first.worth["users"] == 120
    assert set(first.worth["ndcg"]) == {"new", "base"} and set(first.worth["ndcg"]["base"]) >= {"overall", "tail"}
    remember(config.run, "scft", first, config)
    second = scft.run(on(config, LATER, training=dataclasses.replace(FAST, temperature=0.5)))
    assert set(second.worth["less"]) == {"new - base", "new - before"}


def test_an_encoder_before_that_cannot_be_loaded_any_more_costs_no_training(
    config: scft.Config, caplog: pytest.LogCaptureFixture
) -> None:
    remember(config.run, "scft", scft.run(config), config)
    shutil.rmtree(config.base)
    tiny.llama(Path(config.base), seed=7)  # another model in its place
    with caplog.at_level(logging.WARNING):
        again = scft.run(config)
    assert again.due and again.worth["less"].keys() == {"new - base"}
    assert "the encoder before is left out of the comparison: base model" in caplog.text


def test_the_one_before_is_the_champions_encoder_where_there_is_a_champion(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion = scft.run(config)
    remember(config.run, "scft", champion, config)
    since = changed(config, training=dataclasses.replace(FAST, temperature=0.5))
    newest = scft.run(since)
    remember(config.run, "scft", newest, since)
    assert judge.in_use(config) == newest.encoder_id != champion.encoder_id
    monkeypatch.setattr(judge.registry, "champion", lambda run: {"encoder_id": champion.encoder_id})
    assert judge.in_use(config) == champion.encoder_id
    again = scft.run(changed(config, training=dataclasses.replace(FAST, temperature=0.5), max_age_days=0))
    assert again.worth["ndcg"]["before"] == champion.worth["ndcg"]["new"] != again.worth["ndcg"]["new"]


@pytest.mark.parametrize("steps", [0, 4])
def test_attention_both_ways_is_no_base_model_as_it_is_and_stands_beside_that(config: scft.Config, steps: int) -> None:
    plain = scft.run(changed(config, training=dataclasses.replace(FAST, steps=0)))
    both = scft.run(changed(config, attention="both", training=dataclasses.replace(FAST, steps=steps)))
    assert both.worth["verdict"] != "base" and set(both.worth["ndcg"]) == {"new", "base"}
    assert both.moved > 1e-3 and both.figures != both.base_figures
    # its base is read as it was trained
    assert both.base_figures == pytest.approx(plain.figures | {"step": 0.0})


def test_an_encoder_whose_embeddings_are_not_finite_is_refused_by_name_and_at_each_validation(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worth.embed

    def broken(encoder: Any, source: Any, **options: Any) -> np.ndarray:
        emb = whole(encoder, source, **options)
        emb[3] = np.nan
        return emb

    monkeypatch.setattr(worth, "embed", broken)
    with pytest.raises(Refused, match=r"embeddings of the new encoder are not finite \(1 of 60 texts\)"):
        scft.run(config)
    monkeypatch.setattr(worth, "embed_together", broken)
    with pytest.raises(ValueError, match=r"embeddings of the weights of now are not finite .*learning_rate"):
        scft.run(changed(config, training=dataclasses.replace(FAST, whiten=True)))


def test_an_encoder_that_is_surely_worse_than_its_base_is_refused_and_not_kept(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    weigh_as(monkeypatch, (-0.02, -0.01))
    with pytest.raises(Refused, match=r"worse than its base: NDCG@10 overall -0\.0150.*steps = 0"):
        scft.run(config)
    assert not list((config.run.lake / "models/encoder").glob("[!.]*"))


@pytest.mark.parametrize(("overall", "said"), [((0.01, 0.02), "better"), ((-0.01, 0.02), "no different")])
def test_what_can_not_be_told_apart_is_kept_as_such_unless_only_better_ones_are_wanted(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch, overall: tuple[float, float], said: str
) -> None:
    weigh_as(monkeypatch, overall)
    assert scft.run(config).worth["verdict"] == said
    strict = changed(config, accept="better")
    if said == "better":
        scft.run(strict)
    else:
        with pytest.raises(Refused, match="not surely better"):
            scft.run(strict)


def test_too_few_users_are_said_and_not_guessed_from(config: scft.Config) -> None:
    write(config.run.lake, DS, users=30)
    told = scft.run(config).worth
    assert told["verdict"] == "unknown" and "30 users" in told["why"]
    with pytest.raises(Refused, match='"better"'):
        scft.run(changed(config, accept="better"))


def test_an_encoder_in_use_that_is_not_what_the_recipe_now_accepts_is_refused_and_not_trained_again(config: scft.Config) -> None:
    write(config.run.lake, DS, users=30)
    kept = scft.run(config)
    remember(config.run, "scft", kept, config)
    assert not scft.run(config).due
    strict = changed(config, accept="better")
    with pytest.raises(Refused, match=f"in use, {kept.encoder_id}, is refused: .*unknown: .*30 users"):
        scft.run(strict)
    for verdict in ("better", "base"):
        told = dataclasses.replace(kept, worth={"verdict": verdict, "why": ""})
        remember(config.run, "scft", told, config)
        assert not scft.run(strict).due


def test_titles_alone_are_said_unless_pairs_teach(config: scft.Config, caplog: pytest.LogCaptureFixture) -> None:
    def told(**more: Any) -> bool:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            scft.run(changed(config, **more))
        return "60 of 60 texts have one attribute" in caplog.text

    titles = dataclasses.replace(config.policy, allow=("title",))
    assert told(policy=titles)
    assert not told(policy=titles, training=dataclasses.replace(FAST, pair_share=1.0))
    assert not told(policy=titles, training=dataclasses.replace(FAST, steps=0))
    assert not told()


def measure_together(config: scft.Config, folder: Path) -> None:
    """What each of two processes embeds of the sample, and what all come to."""
    sample, encoder, rows = worth.sample_of(config, f"ds={DS}", tiny.CPU), tiny.encoder(Path(config.base)), [0]
    encoder.register_forward_hook(lambda _, given, emb: rows.append(len(emb)))
    assert not isinstance(sample, str)
    facts = {"ndcg": sample.ndcg(encoder), "rows": sum(rows)}
    (folder / f"{dist.get_rank() if dist.is_initialized() else 'alone'}.json").write_text(json.dumps(facts))


def test_processes_share_the_sample_and_come_to_one_figure(config: scft.Config, tmp_path: Path) -> None:
    measure_together(config, tmp_path)
    in_two_processes(connected, measure_together, config, tmp_path)
    alone, one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert one["ndcg"] == other["ndcg"] == pytest.approx(alone["ndcg"], abs=1e-4)
    assert one["rows"] == other["rows"] == alone["rows"] / 2 == ITEMS_N / 2


def test_no_logs_at_all_are_said(config: scft.Config, tmp_path: Path) -> None:
    lake = tmp_path / "other"
    write(lake, DS, users=120)
    for folder in (lake / "sequences").iterdir():
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    told = scft.run(changed(config, run=dataclasses.replace(config.run, lake=lake))).worth
    assert told["verdict"] == "unknown" and "sequences" in told["why"]


def test_the_base_model_as_it_is_needs_no_comparison(config: scft.Config) -> None:
    assert scft.run(changed(config, training=dataclasses.replace(FAST, steps=0))).worth["verdict"] == "base"


@pytest.mark.parametrize(("overall", "again"), [((-0.01, 0.02), False), ((0.01, 0.02), True)])
def test_age_alone_trains_no_encoder_again_that_was_no_better_than_its_base(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch, overall: tuple[float, float], again: bool
) -> None:
    weigh_as(monkeypatch, overall)
    remember(config.run, "scft", scft.run(config), config)
    later = scft.run(on(config, LATER))
    assert later.due is again
    assert again or "age alone" in later.reason


def test_what_users_teach_is_validated_by_what_it_foretells(config: scft.Config) -> None:
    paired = dataclasses.replace(FAST, pair_share=1.0, whiten=True, ratio=0.0)
    result = scft.run(changed(config, training=paired))
    assert all(0 <= entry["worth"] <= 1 for entry in result.history) and len(result.history) == 3
    plain = scft.run(config)
    assert all("worth" not in entry for entry in plain.history)


def test_items_that_users_teach_nothing_of_are_cold_in_the_trial(config: scft.Config) -> None:
    sample = worth.sample_of(changed(config, cold_share=0.3), f"ds={DS}", torch.device("cpu"))
    assert not isinstance(sample, str) and len(sample.items) == ITEMS_N and all(sample.items)
    cold = sample.trial.cases.slices_SC[untrained.SLICES.index("cold")]
    assert 0.15 < cold.float().mean() < 0.5
    none = worth.sample_of(changed(config, cold_share=0.0), f"ds={DS}", torch.device("cpu"))
    assert not isinstance(none, str) and not none.trial.cases.slices_SC[untrained.SLICES.index("cold")].any()
    small = worth.sample_of(changed(config, worth_items=20), f"ds={DS}", torch.device("cpu"))
    assert not isinstance(small, str) and len(small.items) == ITEMS_N  # never below a hundred items


def test_of_an_item_its_own_text_is_embedded(config: scft.Config) -> None:
    sample = worth.sample_of(config, f"ds={DS}", torch.device("cpu"))
    assert not isinstance(sample, str)
    assert [dict(item) for item in sample.items] == [dict(item) for item in tiny.items(ITEMS_N)]
    assert np.array_equal(sample.trial.rows_N, np.arange(ITEMS_N))


@pytest.mark.parametrize("wrong", [{"cold_share": 1.0}, {"cold_share": -0.1}, {"worth_items": -1}, {"max_age_days": -1}])
def test_settings_out_of_range_are_refused(config: scft.Config, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cold_share"):
        changed(config, **wrong)
