"""rat: embeddings bent to the logs, aligned to a teacher of the same kind, cold items untouched by behaviour."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from jobs import pretrain, rat
from jobs.lake import artifacts, partitions
from jobs.lake.items import bury
from jobs.lake.tables import SEQUENCES, llm_embeddings
from jobs.lake.tensors import Catalogue, read_catalogue, read_embeddings
from jobs.rat import read
from jobs.rat.make import make_aligner, make_items
from jobs.run import InputError, Run
from models.behaviour.artifact import load_recommender
from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.data import held_out
from models.behaviour.recommender import Backbone
from models.behaviour.training import Aligner, Training
from models.behaviour.whitening import Whitening
from tests.jobs.small_lake import DS, ENCODER, LATER, keep_encoder, make, remember, sequence_rows

SMALL: dict[str, Any] = {"backbone": Backbone(width=8, max_len=6), "training": Training(epochs=2, batch=8, negatives=4)}


@pytest.fixture
def small_lake(tmp_path: Path) -> Run:
    """The run of a lake in which `extract`, `scft` and `embed` have run."""
    return make(tmp_path)


def taught(run: Run, **more: Any) -> str:
    result = pretrain.run(pretrain.Config(run=run, **{**SMALL, **more}))
    remember(run, "pretrain", result)
    return result.teacher_id


def config(run: Run, **more: Any) -> rat.Config:
    known = {"hidden": 16, "whitened_width": 8, "fusion": Fusion(parts=("llmemb",)), "item_codes": Codes(books=2, entries=4)}
    return rat.Config(run=run, **{**SMALL, **known, **more})


@pytest.mark.parametrize("teacher", ["latest", "none"])
def test_by_default_the_recommender_is_of_parts_side_by_side(small_lake: Run, teacher: str) -> None:
    taught(small_lake)
    result = rat.run(config(small_lake, teacher=teacher, fusion=Fusion(text_width=5, counting_width=4)))
    loaded = load_recommender(artifacts.find(small_lake.lake, "recommender", result.recommender_id))
    assert {"llmemb", "text", "counting"} <= set(result.fused.weights)
    assert ("collaborative" in result.fused.weights) is (teacher == "latest")
    # so few validation cases choose nothing, and that is said
    assert "too few to choose weights" in result.fused.note
    assert [part.name for part in loaded.parts] == list(result.fused.widths)
    assert loaded.width == sum(result.fused.widths.values())
    vectors = loaded.project(torch.randn(2, 12), ["i00", "never seen"])
    assert vectors.shape == (2, loaded.width) and vectors.isfinite().all()


@pytest.mark.parametrize("adapter", ["mlp", "residual", "null_space", "codes", "llm_esr"])
def test_the_recommender_names_its_encoder_and_teacher_and_projects_every_item(small_lake: Run, adapter: str) -> None:
    teacher_id = taught(small_lake)
    result = rat.run(config(small_lake, adapter=adapter, text_width=4))
    assert (result.encoder_id, result.teacher_id) == (ENCODER, teacher_id)
    assert set(result.inputs) == {"items", "sequences", "encoder", "llm_embeddings", "teacher"}
    assert 0 < result.explained_variance < 1
    assert result.whitened_width == 8
    loaded = load_recommender(artifacts.find(small_lake.lake, "recommender", result.recommender_id))
    assert loaded.meta["encoder_id"] == ENCODER
    vectors = loaded.project(torch.randn(2, 12), ["i00", "never seen"])
    assert vectors.shape == (2, 8)
    assert vectors.isfinite().all()


def test_a_recommender_on_codes_keeps_its_books_and_codes_what_it_never_met(small_lake: Run) -> None:
    """The item of the same text has the same vector, and so has one of a near text; the artifact holds entries, not items."""
    taught(small_lake)
    result = rat.run(config(small_lake, adapter="codes"))
    folder = artifacts.find(small_lake.lake, "recommender", result.recommender_id)
    loaded = load_recommender(folder)
    catalogue = read_catalogue(small_lake)
    llm_NE = read_embeddings(small_lake, ENCODER, catalogue.content_hashes)
    vectors = loaded.project(llm_NE, catalogue.item_ids)
    assert 1 < len(torch.unique(vectors, dim=0)) <= 16
    torch.testing.assert_close(loaded.project(llm_NE[3:4] + 1e-3, ["never seen"]), vectors[3:4])
    shapes = {name: tuple(value.shape) for name, value in load_file(folder / "recommender.safetensors").items()}
    assert shapes["recommender.items.learned.weight"] == (8, 8) and shapes["recommender.items.books.entry_KCD"] == (2, 4, 8)
    assert not any(len(catalogue.item_ids) + 1 in shape for shape in shapes.values())


@pytest.mark.parametrize("adapter", ["mlp", "residual", "null_space", "codes", "llm_esr"])
@pytest.mark.parametrize("cosine", [0.0, 0.07])
def test_vectors_of_length_one_are_served_where_they_were_trained(small_lake: Run, adapter: str, cosine: float) -> None:
    taught(small_lake)
    training = dataclasses.replace(SMALL["training"], cosine=cosine)
    result = rat.run(config(small_lake, adapter=adapter, text_width=4, training=training))
    loaded = load_recommender(artifacts.find(small_lake.lake, "recommender", result.recommender_id))
    vectors = loaded.project(torch.randn(2, 12), ["i00", "never seen"])
    # LLM-ESR has dot products, as published
    unit = bool(torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5))
    assert unit == (cosine > 0 and adapter != "llm_esr")


@pytest.mark.parametrize("name", ["gru4rec", "bert4rec"])
def test_other_backbones_train_under_their_own_teacher(small_lake: Run, name: str) -> None:
    backbone = Backbone(name=name, width=8, max_len=6)  # type: ignore[arg-type]
    taught(small_lake, backbone=backbone)
    assert rat.run(config(small_lake, backbone=backbone)).epochs == 2


def test_a_rerun_leaves_the_same_recommender(small_lake: Run) -> None:
    taught(small_lake)
    assert rat.run(config(small_lake)).recommender_id == rat.run(config(small_lake)).recommender_id


def test_a_teacher_of_another_backbone_is_refused(small_lake: Run) -> None:
    taught(small_lake, backbone=Backbone(name="gru4rec", width=8, max_len=6))
    with pytest.raises(InputError, match=r"gru4rec of width 8, rat\.backbone is a sasrec"):
        rat.run(config(small_lake))


def test_a_teacher_that_saw_the_items_held_out_is_refused(small_lake: Run) -> None:
    taught(small_lake)
    with pytest.raises(InputError, match="has seen items"):
        rat.run(config(small_lake, cold_share=0.3))
    taught(small_lake, cold_share=0.3)
    result = rat.run(config(small_lake, cold_share=0.3))
    meta = load_recommender(artifacts.find(small_lake.lake, "recommender", result.recommender_id)).meta
    assert (meta["cold_share"], meta["seed"]) == (0.3, 42)


def test_an_encoder_that_learned_from_the_items_held_out_is_refused(small_lake: Run) -> None:
    taught(small_lake, cold_share=0.3)
    keep_encoder(small_lake.lake, from_users=True)
    with pytest.raises(InputError, match="learned from users' histories"):
        rat.run(config(small_lake, cold_share=0.3))
    taught(small_lake)
    assert rat.run(config(small_lake)).epochs == 2


def test_without_a_teacher_there_is_no_alignment(small_lake: Run) -> None:
    alone = rat.run(config(small_lake, teacher="none"))
    assert alone.inputs["teacher"] == "none"
    taught(small_lake)
    together = rat.run(config(small_lake, alpha=1.0))
    assert together.history[0]["loss"] > alone.history[0]["loss"]


def aligner_of(some: rat.Config, catalogue: Catalogue, counts_V: torch.Tensor) -> Aligner | None:
    taught = read.read_teacher(some, read.chosen(some)[1], catalogue, counts_V.device)
    return make_aligner(some, taught.table_VD, taught.known_V, catalogue, counts_V)


def test_the_teacher_is_read_once_and_texts_are_whitened_once(small_lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    taught(small_lake)
    calls = {"teacher": 0, "white": 0}
    load, white = read.load_recommender, Whitening.forward

    def loaded(*words: Any) -> Any:
        calls["teacher"] += 1
        return load(*words)

    def whitened(self: Whitening, llm_NE: torch.Tensor) -> torch.Tensor:
        calls["white"] += 1
        return white(self, llm_NE)

    monkeypatch.setattr(read, "load_recommender", loaded)
    monkeypatch.setattr(Whitening, "forward", whitened)
    rat.run(config(small_lake))
    assert calls == {"teacher": 1, "white": 1}


def test_cold_items_and_items_the_teacher_lacks_do_not_align(small_lake: Run) -> None:
    taught(small_lake)
    catalogue = read_catalogue(small_lake)
    counts = torch.ones(21, dtype=torch.int64)
    counts[[0, 20]] = 0
    aligner = aligner_of(config(small_lake), catalogue, counts)
    assert aligner is not None
    assert (aligner.weight_V == 0).nonzero().flatten().tolist() == [0, 20]
    grown = Catalogue(
        item_ids=("brand new", *catalogue.item_ids[1:]), content_hashes=catalogue.content_hashes, digest=catalogue.digest
    )
    aligner = aligner_of(config(small_lake), grown, torch.ones_like(counts))
    assert aligner is not None
    assert aligner.weight_V[1] == 0
    assert aligner.weight_V[2] > 0


def test_the_weight_of_alignment_grows_with_train_popularity(small_lake: Run) -> None:
    taught(small_lake)
    counts = torch.arange(21)
    aligner = aligner_of(config(small_lake, popularity_prior=5), read_catalogue(small_lake), counts)
    assert aligner is not None
    assert aligner.weight_V[[5, 20]].tolist() == pytest.approx([0.5, 0.8])


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `rat` gives to its training, once it has run."""
    found: dict[str, Any] = {}
    whole = rat.train

    def noting(recommender: Any, events: Any, *rest: Any, **named: Any) -> Any:
        found.update(named, events=events)
        return whole(recommender, events, *rest, **named)

    monkeypatch.setattr(rat, "train", noting)
    return found


def test_an_item_of_test_events_alone_is_no_candidate_and_weighs_nothing(small_lake: Run, given: dict[str, Any]) -> None:
    rows = sequence_rows(tested="i19")
    partitions.write(small_lake.lake, SEQUENCES, f"ds={DS}", [rows])
    taught(small_lake)
    result = rat.run(config(small_lake, popularity_prior=5.0))
    trained = [events[:end] for events, end in zip(rows["item_ids"].to_pylist(), rows["train_end"].to_pylist(), strict=True)]
    counts = [sum(events.count(f"i{number:02d}") for events in trained) for number in range(20)]
    assert counts[19] == 0 and sum(counts) == result.rows["train_events"]
    assert given["candidates_M"].tolist() == list(range(1, 20))
    assert given["aligner"].weight_V.tolist() == pytest.approx([0, *(count / (count + 5) for count in counts)])


@pytest.mark.parametrize("seed", [7, 42])
def test_items_held_out_have_no_train_event_are_no_candidate_and_weigh_nothing(
    small_lake: Run, given: dict[str, Any], seed: int
) -> None:
    run = dataclasses.replace(small_lake, seed=seed)
    taught(run, cold_share=0.3)
    rat.run(config(run, cold_share=0.3))
    ids = [f"i{number:02d}" for number in range(20)]
    held = set(held_out(ids, 0.3, seed).nonzero().flatten().tolist())
    assert held and held != set(held_out(ids, 0.3, 49 - seed).nonzero().flatten().tolist())
    events = given["events"]
    in_train = events.in_train_N
    assert not held & set(events.items_N[in_train].tolist())
    assert given["candidates_M"].tolist() == sorted(set(range(1, 20)) - held)
    assert (given["aligner"].weight_V == 0).nonzero().flatten().tolist() == sorted({0, 20} | held)


def test_of_two_dates_the_run_s_own_is_trained_on(small_lake: Run) -> None:
    later = dataclasses.replace(small_lake, ds=LATER, seed=7)
    teacher_id, later_id = taught(small_lake), taught(later)
    assert later_id != teacher_id
    result = rat.run(config(small_lake))
    assert (result.teacher_id, result.encoder_id) == (teacher_id, ENCODER)
    for name in ("items", "sequences"):
        assert result.inputs[name] == partitions.read_commit(small_lake.lake, name, f"ds={DS}").digest
    assert result.rows["items"] == 20
    described = load_recommender(artifacts.find(small_lake.lake, "recommender", result.recommender_id))
    assert described.item_ids == [f"i{number:02d}" for number in range(20)]
    assert rat.run(config(later, encoder=ENCODER)).teacher_id == later_id


def test_what_was_forgotten_is_not_trained_on(small_lake: Run) -> None:
    bury(small_lake.lake, "i19", DS)
    result = rat.run(config(small_lake, teacher="none"))
    described = load_recommender(artifacts.find(small_lake.lake, "recommender", result.recommender_id))
    assert described.item_ids == [f"i{number:02d}" for number in range(19)]


def test_items_without_an_embedding_are_counted_and_the_remedy_named(small_lake: Run) -> None:
    folder = partitions.folder(small_lake.lake, "llm_embeddings", f"encoder={ENCODER}/shard=0")
    (folder / "_commit.json").unlink()
    with pytest.raises(InputError, match=r"8 of 20 items have no embedding .* run embed"):
        rat.run(config(small_lake, teacher="none"))
    with pytest.raises(InputError, match="run embed"):
        rat.run(config(small_lake, teacher="none", encoder="ffff"))


def broken(run: Run, value: float) -> None:
    """An embedding table that some other program wrote, past the contract."""
    partition = f"encoder={ENCODER}/shard=1"
    rows = partitions.read(run.lake, llm_embeddings(12), partition)
    flat = rows["embedding"].combine_chunks().flatten().to_numpy().copy()
    flat[:] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float16()), 12)
    for file in partitions.read_commit(run.lake, "llm_embeddings", partition).files:
        path = partitions.folder(run.lake, "llm_embeddings", partition) / file
        pq.write_table(rows.set_column(2, "embedding", column), path)


def test_a_value_that_is_not_finite_in_the_table_is_refused(small_lake: Run) -> None:
    broken(small_lake, np.nan)
    with pytest.raises(InputError, match="not finite"):
        rat.run(config(small_lake, teacher="none"))


def test_equal_texts_share_one_embedding_row(small_lake: Run) -> None:
    catalogue = read_catalogue(small_lake)
    llm = read_embeddings(small_lake, ENCODER, catalogue.content_hashes)
    assert torch.equal(llm[17], llm[18])
    assert not torch.equal(llm[16], llm[17])


def test_the_artifact_is_safetensors_and_json(small_lake: Run) -> None:
    result = rat.run(config(small_lake, teacher="none"))
    path = artifacts.find(small_lake.lake, "recommender", result.recommender_id)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    described = json.loads((path / "recommender.json").read_text())
    assert described["explained_variance"] == result.explained_variance


@pytest.mark.parametrize(("key", "value"), [("cold_share", 1.0), ("temperature", 0.0), ("alpha", -1.0)])
def test_values_out_of_range_are_refused_by_name(small_lake: Run, key: str, value: float) -> None:
    with pytest.raises(InputError, match=f"rat.{key}"):
        config(small_lake, **{key: value})


@pytest.mark.parametrize("cosine", [0.0, 0.07])
def test_the_vectors_that_train_are_those_that_the_artifact_serves(small_lake: Run, cosine: float) -> None:
    some = config(small_lake, training=Training(epochs=1, batch=8, negatives=4, cosine=cosine))
    white_NK = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert make_items(some, white_NK).unit is (cosine > 0)  # type: ignore[attr-defined]
