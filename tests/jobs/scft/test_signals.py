"""What scft learns from beside texts: users' pairs and titles, a teacher's clusters and vectors, from train rows alone."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs import pretrain, scft
from jobs.lake import artifacts, partitions
from jobs.lake.tables import SEQUENCES
from jobs.lake.tensors import read_catalogue
from jobs.run import InputError, Run, as_json
from jobs.scft.refresh import shape_digest
from jobs.scft.signals import Taught, read_teacher, teacher_clusters, user_pairs, user_titles
from models.behaviour.data import held_out
from models.behaviour.training import Training
from models.text.encoder import load_encoder, read_spec
from models.text.lora import Lora
from models.text.scft import Scft
from tests.jobs import small_lake
from tests.jobs.scft.test_scft import DS, FAST, LENIENT, changed
from tests.jobs.scft.test_scft import config as config  # for pytest, which looks fixtures up here
from tests.jobs.scft.test_scft import own_cache as own_cache
from tests.jobs.small_lake import remember
from tests.models import tiny


@pytest.fixture
def lake(tmp_path: Path) -> scft.Config:
    """A small lake with a teacher that has seen all items."""
    run = small_lake.make(tmp_path)
    remember(run, "pretrain", pretrain.run(pretrain.Config(run=run, training=Training(epochs=1, patience=1, graph=False))))
    return scft.Config(run=run, clusters=4, cold_share=0.0)


def asking(config: scft.Config, **weights: Any) -> scft.Config:
    return dataclasses.replace(config, training=Scft(steps=2, batch=4, **weights))


def cold_of(run: Run, share: float) -> set[str]:
    """Items that are held out."""
    item_ids = read_catalogue(run).item_ids
    return {item for item, held in zip(item_ids, held_out(item_ids, share, run.seed)[1:].tolist(), strict=True) if held}


def test_the_teachers_vectors_are_its_own_and_items_without_a_past_or_held_out_as_cold_have_none(lake: scft.Config) -> None:
    weighed = asking(lake, teacher_weight=0.5)
    assert read_teacher(asking(lake), ["i03"]) is None
    items = [f"i{number:02d}" for number in range(20)]
    found = read_teacher(weighed, [*items, "nobody"])
    assert found is not None
    # i19 was touched by nobody
    assert np.flatnonzero(np.isnan(found.vector_ID[:, 0])).tolist() == [19, 20]
    kept = artifacts.find(lake.run.lake, "teacher", found.teacher_id)
    teacher = pretrain_table(kept)
    np.testing.assert_allclose(found.vector_ID[3], teacher["i03"], atol=1e-6)
    half = read_teacher(dataclasses.replace(weighed, cold_share=0.5), items)
    assert half is not None
    cold = cold_of(lake.run, 0.5)
    assert {items[row] for row in np.flatnonzero(np.isnan(half.vector_ID[:, 0]))} == cold | {"i19"}


def pretrain_table(folder: Path) -> dict[str, np.ndarray]:
    """A teacher's vectors by item."""
    from models.behaviour.artifact import load_recommender

    loaded = load_recommender(folder)
    return {item: loaded.table()[row].numpy() for item, row in loaded.row.items()}


def test_the_teachers_clusters_join_what_it_joins_and_leave_items_without_a_vector_out(lake: scft.Config) -> None:
    vector_ID = np.array([[1, 0], [0, 1], [np.nan, np.nan], [5, 0.1], [0.1, 7]], dtype=np.float32)
    found = teacher_clusters(dataclasses.replace(lake, clusters=2), Taught(teacher_id="t", vector_ID=vector_ID))
    assert found[2] == -1 and found[0] == found[3] != found[1] == found[4]


def test_a_teacher_that_is_older_than_the_snapshot_or_saw_cold_items_is_named(
    lake: scft.Config, caplog: pytest.LogCaptureFixture
) -> None:
    weighed = asking(lake, cluster_weight=0.5)
    with caplog.at_level(logging.WARNING):
        read_teacher(weighed, ["i03"])
    assert not caplog.messages
    # two weeks later there is an item more
    later = dataclasses.replace(weighed, run=dataclasses.replace(lake.run, ds=small_lake.LATER))
    with caplog.at_level(logging.WARNING):
        read_teacher(later, ["i03"])
    assert f"of {DS} is older than the snapshot: 1 items" in caplog.text and "cold" not in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_teacher(dataclasses.replace(weighed, cold_share=0.2), ["i03"])
    assert "set pretrain.cold_share = 0.2" in caplog.text and "older" not in caplog.text


def test_users_are_their_train_rows_without_cold_items(lake: scft.Config, tmp_path: Path) -> None:
    encoder = tiny.encoder(tiny.llama(tmp_path / "base"))
    item_ids, hashes, items = scft.read_texts(lake, f"ds={DS}")
    titles = [item[0][1] for item in items]
    assert user_titles(asking(lake), lambda: encoder, hashes, titles) == (None, {})
    users, inputs = user_titles(asking(lake, title_weight=1.0), lambda: encoder, hashes, titles)
    assert users is not None and set(inputs) == {"sequences"}
    told = [[titles[row] for row in users.item_N[start:end]] for start, end in itertools.pairwise(users.start_U1)]
    # user 3 of 24 began at i03 and has six train rows; i18 has the text of i17; the last user has one event
    assert len(told) == 23 and told[3] == [f"text {number}" for number in range(3, 9)]
    assert told[15] == ["text 15", "text 16", "text 17", "text 17", "text 0", "text 1"]
    half, _ = user_titles(asking(dataclasses.replace(lake, cold_share=0.5), title_weight=1.0), lambda: encoder, hashes, titles)
    assert half is not None
    cold = cold_of(lake.run, 0.5) - {"i17", "i18"}
    assert {item_ids[row] for row in half.item_N}.isdisjoint(cold) and 0 < len(half.item_N) < len(users.item_N)


ALL = {"cluster_weight": 0.5, "teacher_weight": 0.5, "user_weight": 0.5, "title_weight": 0.5}


def test_an_encoder_that_learned_from_a_teacher_and_from_users_is_kept_and_says_so(lake: scft.Config, tmp_path: Path) -> None:
    base = str(tiny.llama(tmp_path / "base", tie_word_embeddings=True))
    config = dataclasses.replace(lake, base=base, policy=tiny.POLICY, gates=LENIENT, max_tokens=200, lora=Lora(dropout=0.0),
                                 training=dataclasses.replace(FAST, **ALL))  # fmt: skip
    result = scft.run(config)
    assert {"sequences", "teacher"} <= result.inputs.keys()
    kept = artifacts.find(config.run.lake, "encoder", result.encoder_id)
    assert read_spec(kept).from_users and {file.name for file in kept.iterdir()} == {"adapter_model.safetensors", "encoder.json"}
    plain = scft.run(dataclasses.replace(config, training=FAST))
    assert plain.losses != result.losses and plain.inputs.keys() == {"items", "base"}


@pytest.mark.parametrize("shape", [{"suffix_tokens": 4}, {"attention": "both"}])
def test_encoders_of_other_kinds_are_kept_load_and_are_compared_with_the_plain_base(
    config: scft.Config, shape: dict[str, Any]
) -> None:
    strong = changed(config, training=dataclasses.replace(FAST, learning_rate=0.05), lora=Lora(), **shape)
    plain, result = scft.run(config), scft.run(strong)
    assert result.moved > 1e-3 and result.encoder_id != plain.encoder_id
    kept = artifacts.find(config.run.lake, "encoder", result.encoder_id)
    loaded = load_encoder(kept, device=tiny.CPU)
    name, value = next(iter(shape.items()))
    assert getattr(loaded.spec, name) == value and not loaded.spec.from_users
    assert (loaded.spec.lora is None) == (name == "suffix_tokens")
    # what is called moved is the distance from the base as it is: attention both ways alone is a move
    assert scft.recipe_digest(config) != scft.recipe_digest(strong)


def test_lora_shapes_no_encoder_of_suffix_tokens_and_defaults_change_no_digest(config: scft.Config) -> None:
    suffix = as_json(changed(config, suffix_tokens=4, lora=Lora()))
    # of a lake from before such a recipe was refused
    assert shape_digest(suffix) == shape_digest({**suffix, "lora": as_json(Lora(r=4))})
    for beside in ({"teacher": "t" * 16}, {"clusters": 7}, {"cold_share": 0.3}):
        assert scft.recipe_digest(config) == scft.recipe_digest(changed(config, **beside))
        weighed = changed(config, training=dataclasses.replace(FAST, user_weight=1.0))
        assert scft.recipe_digest(weighed) != scft.recipe_digest(changed(weighed, **beside))
    users = dataclasses.replace(FAST, user_share=0.5, user_titles=3)
    assert scft.recipe_digest(config) == scft.recipe_digest(changed(config, training=users))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"suffix_tokens": -1}, "at least 0"),
        ({"suffix_tokens": 2, "training": dataclasses.replace(FAST, steps=0)}, "of no use untrained"),
        ({"suffix_tokens": 2, "lora": Lora(r=16)}, r"leave \[scft\.lora\] out"),
        ({"suffix_tokens": 2, "lora": Lora(), "training": dataclasses.replace(FAST, title_weight=1.0)}, "learn from items"),
        ({"attention": "both", "training": dataclasses.replace(FAST, title_weight=1.0)}, "would see the title"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config: scft.Config, wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        changed(config, **wrong)


def test_clusters_without_a_teacher_name_the_remedy(config: scft.Config) -> None:
    ids = [f"i{number:04d}" for number in range(50)]
    for weight in ("cluster_weight", "teacher_weight"):
        with pytest.raises(InputError, match="pretrain"):
            read_teacher(changed(config, training=dataclasses.replace(FAST, **{weight: 0.5})), ids)


def test_pairs_are_the_texts_of_items_that_users_took_one_after_the_other_in_train_rows(tmp_path: Path) -> None:
    run = small_lake.make(tmp_path)
    config = scft.Config(run=run, training=Scft(steps=2, batch=4, pair_share=0.5))
    item_ids, hashes, _ = scft.read_texts(config, f"ds={DS}")
    pairs, inputs = user_pairs(dataclasses.replace(config, cold_share=0.0), hashes)
    assert pairs is not None and set(inputs) == {"sequences"}
    number = {text: int(item[0][1].split()[1]) for text, item in zip(hashes, scft.read_texts(config, f"ds={DS}")[2], strict=True)}
    met = {tuple(number[hashes[row]] for row in pair) for pair in pairs.pair_P2.tolist()}
    # users walk in a circle of 19; i18 has the text of i17, and nobody touches i19
    assert met == {(one, one + 1) for one in range(17)} | {(17, 0)}
    assert len(set(pairs.user_P.tolist())) > 1
    # items that are held out as cold teach nothing
    half, _ = user_pairs(dataclasses.replace(config, cold_share=0.5), hashes)
    cold_V = held_out(read_catalogue(run).item_ids, 0.5, run.seed)
    cold = {item for item, held in zip(read_catalogue(run).item_ids, cold_V[1:].tolist(), strict=True) if held}
    assert half is not None and {item_ids[row] for row in half.pair_P2.ravel()}.isdisjoint(cold - {"i17", "i18"})
    assert 0 < len(half.pair_P2) < len(pairs.pair_P2)
    assert user_pairs(dataclasses.replace(config, training=Scft()), hashes) == (None, {})
    with pytest.raises(InputError, match="pair_share"):
        user_pairs(config, hashes[:1])
    assert len(item_ids) == len(hashes)


@pytest.mark.parametrize("weight", ["pair_share", "title_weight", "user_weight", "cluster_weight", "teacher_weight"])
def test_what_is_missing_is_named_before_the_base_is_loaded(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    monkeypatch.setattr(scft, "build", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(InputError, match="sequences" if weight in ("pair_share", "title_weight") else "pretrain"):
        scft.run(changed(config, training=dataclasses.replace(FAST, **{weight: 0.5})))


def test_pairs_without_sequences_name_the_remedy_and_an_encoder_says_that_it_learned_from_users(config: scft.Config) -> None:
    paired = dataclasses.replace(config.training, pair_share=0.5)
    with pytest.raises(InputError, match="sequences"):
        scft.run(changed(config, training=paired))
    ids = [f"i{number:04d}" for number in range(50)]
    rows = {"user_id": ["u"], "item_ids": [ids], "timestamps": [[7] * 50], "train_end": pa.array([48], pa.int32()),
            "valid_end": pa.array([49], pa.int32())}  # fmt: skip
    partitions.write(config.run.lake, SEQUENCES, f"ds={DS}", [pa.table(rows)])
    result = scft.run(changed(config, training=paired))
    assert "sequences" in result.inputs
    assert read_spec(artifacts.find(config.run.lake, "encoder", result.encoder_id)).from_users
    plain = scft.run(config)
    assert plain.losses != result.losses and "sequences" not in plain.inputs
