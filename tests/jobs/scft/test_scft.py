"""scft: trains when due, judges what it wrote, keeps what passes, and says why not."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import scft
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.items import bury, content_hash
from jobs.lake.partitions import write_json
from jobs.lake.tables import ATTRIBUTES, ITEMS
from jobs.run import InputError, Refused, Run, as_json
from jobs.scft import judge, tuning
from models.text import base_model, fp8
from models.text.encoder import load_encoder
from models.text.lora import Lora
from models.text.prompts import FieldPolicy
from models.text.scft import Scft
from models.text.view_retrieval import Gates
from tests.jobs.small_lake import remember
from tests.models import tiny

DS = "2026-03-10"
FAST = Scft(steps=12, batch=8, learning_rate=5e-3, validate_every=6, validation_items=10, candidates=30, compile=False, ratio=0.1)


LENIENT = Gates(effective_rank=1.0, mean_cosine=1.0, recall_drop=1.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))


def write_items(lake: Path, ds: str, items: list[list[tuple[str, str]]]) -> None:
    """A snapshot of `items`."""
    attributes = [[{"name": name, "value": value} for name, value in item] for item in items]
    rows = {
        "item_id": [f"i{number:04d}" for number in range(len(items))],
        "attributes": pa.array(attributes, ATTRIBUTES),
        "content_hash": [content_hash(item) for item in items],
        "first_seen_ds": [ds] * len(items),
    }
    partitions.write(lake, ITEMS, f"ds={ds}", [pa.table(rows)])


@pytest.fixture
def config(tmp_path: Path) -> scft.Config:
    """A small model over a catalogue of 50 items."""
    lake = tmp_path / "lake"
    write_items(lake, DS, tiny.items(50))
    base = tiny.llama(tmp_path / "base")
    run = Run(ds=DS, lake=lake, device="cpu")
    return scft.Config(run=run, base=str(base), policy=tiny.POLICY, training=FAST, max_tokens=256, lora=Lora(dropout=0.0),
                       gates=LENIENT)  # fmt: skip


def changed(config: scft.Config, **more: Any) -> scft.Config:
    return dataclasses.replace(config, **more)


def on(config: scft.Config, ds: str, **more: Any) -> scft.Config:
    return changed(config, run=dataclasses.replace(config.run, ds=ds), **more)


def test_the_encoder_is_kept_with_its_figures_and_loads(config: scft.Config) -> None:
    result = scft.run(config)
    assert result.due
    assert 0 <= result.figures["recall_1"] <= result.figures["recall_10"] <= 1
    assert result.base_figures["step"] == 0
    assert result.moved > 1e-3
    path = artifacts.find(config.run.lake, "encoder", result.encoder_id)
    assert load_encoder(path, device=tiny.CPU).spec.policy == tiny.POLICY
    assert {file.name for file in path.iterdir()} == {"adapter_model.safetensors", "encoder.json"}
    assert result.inputs["items"] == partitions.read_commit(config.run.lake, "items", f"ds={DS}").digest
    assert json.dumps(as_json(result))
    assert not list((config.run.lake / "models" / "encoder").glob(".staged*"))
    assert not list((config.run.lake / "checkpoints").glob("scft*"))


def test_a_rerun_leaves_the_same_encoder(config: scft.Config) -> None:
    assert scft.run(config).encoder_id == scft.run(config).encoder_id


def test_no_steps_keep_the_base_model_as_a_zero_shot_encoder(config: scft.Config) -> None:
    result = scft.run(changed(config, training=dataclasses.replace(FAST, steps=0)))
    path = artifacts.find(config.run.lake, "encoder", result.encoder_id)
    assert [file.name for file in path.iterdir()] == ["encoder.json"]
    assert json.loads((path / "encoder.json").read_text())["lora"] is None
    assert (result.steps, result.moved, result.update_norm) == (0, 0.0, 0.0)
    assert load_encoder(path, device=tiny.CPU).spec.lora is None


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("steps", [0, 12])
def test_an_encoder_trained_on_a_base_in_few_bits_is_judged_in_full(
    config: scft.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, bits: int
) -> None:
    config = changed(config, base=str(tiny.llama(tmp_path / "wider", hidden_size=64, intermediate_size=128)))
    monkeypatch.setattr(fp8, "check_device", lambda device: None)
    monkeypatch.setattr(base_model, "default_dtype", lambda device: torch.bfloat16)
    training = dataclasses.replace(FAST, steps=steps)
    exact = scft.run(changed(config, training=training))
    few = {"training": dataclasses.replace(training, fp8=True)} if bits == 8 else {"training": training, "four_bit": True}
    near = scft.run(changed(config, **few))
    # against the base in few bits an encoder without a step would have moved too
    assert near.moved == pytest.approx(exact.moved, rel=0.8)
    assert near.losses == pytest.approx(exact.losses, rel=0.2 if bits == 8 else 0.5)


def test_shuffled_texts_make_another_encoder(config: scft.Config) -> None:
    plain, control = (scft.run(changed(config, shuffle_texts=flag)) for flag in (False, True))
    assert plain.encoder_id != control.encoder_id


def test_of_two_dates_the_run_s_own_is_trained_on(config: scft.Config) -> None:
    write_items(config.run.lake, "2026-03-11", tiny.items(55))
    result = scft.run(changed(config, training=dataclasses.replace(FAST, steps=0)))
    assert (result.snapshot, result.rows["texts"]) == (f"ds={DS}", 50)
    assert result.inputs["items"] == partitions.read_commit(config.run.lake, "items", f"ds={DS}").digest
    remember(on(config, "2026-03-11").run, "scft", result, config)
    assert scft.due(config, f"ds={DS}") == ("there is no encoder, or the items that it was trained on are gone", None)


# ------------------------------------------------------------------------------------------------------------- is it due


def test_an_encoder_is_due_by_share_of_new_texts_by_age_and_by_recipe_and_otherwise_stays(config: scft.Config) -> None:
    first = scft.run(config)
    remember(config.run, "scft", first, config)
    items = tiny.items(50)
    write_items(config.run.lake, "2026-03-11", [*items[:-2], *[[("title", f"new {number}")] for number in range(2)]])
    again = scft.run(on(config, "2026-03-11"))
    assert (again.due, again.encoder_id) == (False, first.encoder_id)
    assert "4.0% of the items are new" in again.reason
    assert "new or changed" in scft.due(on(config, "2026-03-11", refresh_share=0.03), "ds=2026-03-11")[0]
    assert "31 days old" in scft.due(on(config, "2026-04-10"), "ds=2026-03-11")[0]
    assert scft.due(on(config, "2026-03-11", pooling="last"), "ds=2026-03-11")[0] == "the recipe has changed"
    assert scft.due(on(config, "2026-03-11", max_age_days=0), "ds=2026-03-11")[1] is None


def test_after_an_experiment_the_recipe_s_own_encoder_is_found_again(config: scft.Config) -> None:
    zero = changed(config, training=dataclasses.replace(FAST, steps=0))
    own = scft.run(config)
    remember(config.run, "scft", own, config)
    # not even named: it is the newest run, and would have made the recipe look changed
    remember(config.run, "scft", scft.run(zero), zero)
    assert manifests.latest(config.run, "scft")["steps"] == 0
    again = scft.run(config)
    assert (again.due, again.encoder_id) == (False, own.encoder_id)
    remember(config.run, "scft", again, config)
    assert manifests.latest(config.run, "scft")["encoder_id"] == own.encoder_id


def test_what_shapes_no_weights_makes_no_encoder_due(config: scft.Config, tmp_path: Path) -> None:
    remember(config.run, "scft", scft.run(config), config)
    shutil.copytree(config.base, tmp_path / "moved")
    fast = dataclasses.replace(FAST, tokens=99, compile=True)
    for same in (
        {"training": fast}, {"gates": Gates()}, {"base": str(tmp_path / "moved")}, {"teacher": "t" * 16}, {"validation": "full"},
    ):  # fmt: skip
        assert scft.due(changed(config, **same), f"ds={DS}")[1] is not None, same
    for other in (
        {"training": dataclasses.replace(FAST, batch=16)}, {"lora": Lora(r=4, dropout=0.0)}, {"four_bit": True},
        {"policy": dataclasses.replace(tiny.POLICY, cap=9)}, {"run": dataclasses.replace(config.run, seed=1)},
        {"base": str(tiny.llama(tmp_path / "other", hidden_size=64, intermediate_size=128))},
    ):  # fmt: skip
        assert scft.due(changed(config, **other), f"ds={DS}") == ("the recipe has changed", None), other


def test_a_base_model_that_was_changed_in_its_place_makes_an_encoder_due(config: scft.Config, tmp_path: Path) -> None:
    remember(config.run, "scft", scft.run(config), config)
    shutil.rmtree(config.base)
    tiny.llama(Path(config.base), hidden_size=64, intermediate_size=128)
    assert scft.due(config, f"ds={DS}") == ("the recipe has changed", None)


def test_without_a_step_what_only_trains_shapes_nothing(config: scft.Config) -> None:
    zero = changed(config, training=dataclasses.replace(FAST, steps=0))
    shapes = {
        scft.recipe_digest(changed(zero, **same))
        for same in ({}, {"lora": Lora(r=4)}, {"training": Scft(steps=0)}, {"run": dataclasses.replace(config.run, seed=7)})
    }
    assert len(shapes) == 1
    assert scft.recipe_digest(changed(zero, pooling="last")) not in shapes


def test_a_lake_that_is_older_finds_its_encoder(config: scft.Config) -> None:
    result = scft.run(config)
    settings = as_json(config)
    del settings["run"]["variant"]
    old = {"ds": DS, "status": "done", "result": {**as_json(result), "recipe_digest": "of another code"}, "config": settings}
    write_json(manifests.path_of(config.run.lake, DS, "scft"), old)
    assert scft.run(config).encoder_id == result.encoder_id
    assert not scft.run(config).due


def test_drift_that_a_report_found_since_the_training_makes_an_encoder_due(config: scft.Config) -> None:
    same = changed(config, training=dataclasses.replace(FAST, steps=0))
    remember(config.run, "scft", scft.run(same), same)
    for ds, due in ((DS, False), ("2026-03-12", True)):
        manifest = {"status": "done", "ds": ds, "result": {"refresh_encoder": "token length drifted"}}
        write_json(manifests.path_of(config.run.lake, ds, "report"), manifest)
        why, previous = scft.due(on(same, "2026-03-12"), f"ds={DS}")
        assert (why == "token length drifted", previous is None) == (due, due)
    # the training that it asked for was refused on that night: until the next report there is nothing new
    write_json(manifests.path_of(config.run.lake, "2026-03-12", "scft"), {"status": "refused", "error": "recall fell"})
    assert scft.due(on(same, "2026-03-13"), f"ds={DS}")[1] is not None


def test_an_encoder_that_is_gone_is_trained_again(config: scft.Config) -> None:
    same = changed(config, training=dataclasses.replace(FAST, steps=0))
    remember(config.run, "scft", scft.run(same), same)
    for file in (config.run.lake / "models" / "encoder").glob("*/*"):
        file.unlink()
    for folder in (config.run.lake / "models" / "encoder").iterdir():
        folder.rmdir()
    assert scft.due(same, f"ds={DS}")[0].startswith("there is no encoder")


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("gates", "why"),
    [
        (dataclasses.replace(LENIENT, mean_cosine=-1.0), "mean cosine"),
        (dataclasses.replace(LENIENT, moved=1e9), "are the base model's"),
    ],
)
def test_a_refused_encoder_is_not_kept_and_the_figures_are_given(config: scft.Config, gates: Gates, why: str) -> None:
    with pytest.raises(Refused, match=why):
        scft.run(changed(config, gates=gates))
    assert not [path for path in (config.run.lake / "models" / "encoder").iterdir() if not path.name.startswith(".")]


def test_an_encoder_worse_than_the_base_model_is_refused(config: scft.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = judge.validate_views

    def worse(encoder: Any, validation: Any) -> Any:
        quality, emb_CE = validate(encoder, validation)
        return {**quality, "recall_1": -0.1}, emb_CE

    monkeypatch.setattr(judge, "validate_views", worse)
    with pytest.raises(Refused, match="less often than the base model"):
        scft.run(changed(config, gates=dataclasses.replace(LENIENT, recall_drop=0.0)))


def test_embeddings_that_are_not_finite_are_refused(config: scft.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = judge.validate_views
    monkeypatch.setattr(judge, "validate_views", lambda *given: ({**validate(*given)[0], "mrr": np.nan}, validate(*given)[1]))
    with pytest.raises(Refused, match="not finite"):
        scft.run(config)


def test_a_field_that_leaks_popularity_stops_the_job_unless_admitted(config: scft.Config) -> None:
    items = [[*item, ("stars", "5")] for item in tiny.items(50)]
    write_items(config.run.lake, DS, items)
    with pytest.raises(ValueError, match=r"policy\.admit"):
        scft.run(config)
    zero_shot = dataclasses.replace(FAST, steps=0)
    assert scft.run(changed(config, training=zero_shot, policy=FieldPolicy(domain="Item:", admit=("stars",)))).encoder_id


def test_forgotten_items_are_not_trained_on_and_large_catalogues_are_sampled(config: scft.Config) -> None:
    bury(config.run.lake, "i0003", DS)
    assert len(scft.read_texts(config, f"ds={DS}")[2]) == 49
    assert 4 <= len(scft.read_texts(changed(config, max_items=20), f"ds={DS}")[2]) <= 35


@pytest.mark.parametrize("wrong", [{"max_items": 1}, {"layers": -1}, {"refresh_share": 2.0}])
def test_settings_out_of_range_are_refused(config: scft.Config, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="scft"):
        changed(config, **wrong)


def test_4_bits_without_their_library_are_refused(config: scft.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs bitsandbytes"):
        scft.run(changed(config, four_bit=True))


def test_4_and_8_bits_at_once_are_refused(config: scft.Config) -> None:
    with pytest.raises(InputError, match=r"four_bit or training\.fp8"):
        changed(config, four_bit=True, training=dataclasses.replace(FAST, fp8=True))


# ----------------------------------------------------------------------------------------------------------- preemption


def test_sigterm_saves_and_the_next_run_ends_with_the_bytes_of_an_uninterrupted_one(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scft.run(config)
    shutil.rmtree(artifacts.find(config.run.lake, "encoder", whole.encoder_id))
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "progress", lambda _: lambda metrics, step: step == 4 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as left:
            scft.run(config)
    assert left.value.code == 143
    assert len(list((config.run.lake / "checkpoints").glob("scft*.safetensors"))) == 1
    resumed = scft.run(config)
    assert (resumed.encoder_id, resumed.losses) == (whole.encoder_id, whole.losses)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_checkpoint_is_not_taken_up_once_its_items_have_changed(config: scft.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "progress", lambda _: lambda metrics, step: step == 4 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            scft.run(config)
    write_items(config.run.lake, DS, tiny.items(60)[10:])
    after = scft.run(config)
    shutil.rmtree(config.run.lake / "checkpoints")
    assert after.losses == pytest.approx(scft.run(config).losses, rel=1e-4)


def test_a_registered_encoder_embeds_raw_records(config: scft.Config, tmp_path: Path) -> None:
    import mlflow

    from models.text.embedding import embed_items

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result = scft.run(changed(config, run=dataclasses.replace(config.run, tracking_uri=uri)))
    assert result.version == "1"
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/llmemb-encoder/1")
    records = [{"title": "film 7", "year": None, "kind": ["a", "b"]}, {"title": "film 8", "year": "1990", "kind": []}]
    encoder = load_encoder(artifacts.find(config.run.lake, "encoder", result.encoder_id), device=tiny.CPU)
    wanted = embed_items(encoder, [[("title", "film 7"), ("kind", "a, b")], [("title", "film 8"), ("year", "1990")]])
    np.testing.assert_allclose(model.predict(records), wanted, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ validation


def test_a_cpu_validates_on_fewer_items_unless_the_recipe_says_full(config: scft.Config) -> None:
    wide = changed(config, training=Scft())
    small = tuning.sized(wide, tiny.CPU)
    assert (small.validation_items, small.candidates) == (tuning.CPU_HELD_OUT, tuning.CPU_CANDIDATES)
    assert tuning.sized(wide, torch.device("cuda")) == wide.training
    assert tuning.sized(changed(wide, validation="full"), tiny.CPU) == wide.training
    assert tuning.sized(config, tiny.CPU) == FAST


def test_how_a_device_validates_makes_no_encoder_due(config: scft.Config) -> None:
    assert scft.recipe_digest(config) == scft.recipe_digest(changed(config, validation="full"))


def test_without_steps_the_base_is_measured_once_and_says_how_far_it_is(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    whole = judge.validate_views
    monkeypatch.setattr(judge, "validate_views", lambda *given: (calls.append(1), whole(*given))[1])
    result = scft.run(changed(config, training=dataclasses.replace(FAST, steps=0)))
    assert len(calls) == 1
    assert result.history == ({"step": 0.0, **result.figures},)
    # two views of ten held-out items, thirty candidates
    assert capsys.readouterr().err.count("validation: 50 texts") == 1


def test_every_validation_of_a_training_says_that_it_began(config: scft.Config, capsys: pytest.CaptureFixture[str]) -> None:
    scft.run(config)
    told = capsys.readouterr().err
    # of the base, at steps 6 and 12, and of the artifact
    assert told.count("validation: 50 texts") == 4
    assert "s to go at most" in told
