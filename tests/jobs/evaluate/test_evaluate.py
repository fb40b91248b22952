"""evaluate: every model on the same held-out events, the same table at every run, bad input refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import evaluate, pretrain, rat
from jobs.engines import registry
from jobs.evaluate import ranks
from jobs.evaluate.cases import every_case, weak_slices
from jobs.lake import artifacts, manifests, partitions, tensors
from jobs.lake.outcomes import read_outcomes
from jobs.lake.tables import METRICS, SEQUENCES
from jobs.run import InputError, Run, as_json
from models.behaviour.data import held_out, histories
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.judge import text_floor
from models.judge.evaluation import SLICES, make_cases
from tests.jobs.small_lake import DS, ENCODER, make, remember, sequence_rows

SMALL: dict[str, Any] = {"backbone": Backbone(width=8, max_len=6), "training": Training(epochs=2, batch=8, negatives=4)}


def trained(run: Run, **more: Any) -> str:
    """Trains a teacher and a recommender; the latter's id."""
    remember(run, "pretrain", pretrain.run(pretrain.Config(run=run, **SMALL, **more)))
    result = rat.run(rat.Config(run=run, **SMALL, hidden=16, whitened_width=8, **more))
    remember(run, "rat", result)
    return result.recommender_id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of a lake in which two recommenders were trained; it is copied, never changed."""
    run = make(tmp_path_factory.mktemp("evaluate"))
    trained(dataclasses.replace(run, seed=1))
    trained(run)
    return run


@pytest.fixture
def lake(made: Run, tmp_path: Path) -> Run:
    """A copy of that lake."""
    shutil.copytree(made.lake, tmp_path / "lake")
    return dataclasses.replace(made, lake=tmp_path / "lake")


def judge(run: Run, **more: Any) -> evaluate.Result:
    return evaluate.run(evaluate.Config(run=run, **{"min_users": 5, "negatives": 5, "resamples": 100, **more}))


def other(run: Run) -> str:
    """Id of the recommender that is not the newest."""
    latest = manifests.read(run.lake, run.ds, "rat")["result"]["recommender_id"]
    return next(path.name for path in (run.lake / "models" / "recommender").iterdir() if path.name != latest)


def crown(monkeypatch: pytest.MonkeyPatch, **aliases: str) -> None:
    """Sets the registry's aliases."""

    def by_alias(run: Run, alias: str) -> dict[str, str] | None:
        return {"recommender_id": aliases[alias]} if alias in aliases else None

    monkeypatch.setattr(registry, "by_alias", by_alias)


def test_every_model_is_in_the_table_on_every_slice_with_its_interval(lake: Run) -> None:
    result = judge(lake, baselines={"another": other(lake)})
    models = ["popularity", "repeat_markov_popularity", "id_only", "another", "llmemb"]
    parts = [name for name in result.values if name.startswith(("only_", "up_to_"))]
    assert [name for name in result.values if name not in parts] == models
    assert {"only_collaborative", "only_llmemb", "only_text", "up_to_llmemb"} <= set(parts)
    rows = partitions.read(lake.lake, METRICS, f"ds={DS}").to_pylist()
    # as serving ranks, among negatives, and among all items
    assert len(rows) == len(result.values) * len(SLICES) * 9 == result.rows["metrics"]
    assert {"ndcg@10", "sampled_ndcg@10", "all_ndcg@10"} <= {row["metric"] for row in rows}
    overall = next(row for row in rows if (row["model"], row["slice"], row["metric"]) == ("llmemb", "overall", "ndcg@10"))
    assert overall["low"] <= overall["value"] <= overall["high"]
    assert overall["n"] == 23
    assert {row.against for row in result.differences} == set(result.values) - {"llmemb"}
    assert result.encoder_id == ENCODER
    assert set(result.inputs) == {"items", "sequences", "encoder", "llm_embeddings", "recommender", "champion", "reference"}


def test_texts_without_an_llm_are_a_floor_and_fields_that_leak_are_not_read(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_floor, "LEAST", 10)
    read: list[str] = []
    monkeypatch.setattr(ranks, "tfidf_table", lambda said: read.extend(said) or text_floor.tfidf_table(said))
    result = judge(lake)
    assert list(result.values)[:4] == ["popularity", "repeat_markov_popularity", "tfidf_text", "id_only"]
    assert ("tfidf_text", "overall") in {(row.against, row.slice) for row in result.differences}
    assert len(set(read)) > 10 and all(read)
    # `title` is what the small lake's items have
    monkeypatch.setattr(tensors, "LEAKS", ("Title",))
    read.clear()
    judge(lake)
    assert len(read) > 10 and not any(read)


def test_each_model_makes_its_vectors_once_however_often_it_ranks(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    crown(monkeypatch, champion=other(lake))
    made_of: list[str] = []

    def counted(run: Run, recommender: Any, catalogue: Any) -> Any:
        made_of.append(recommender.meta["seed"])
        return text_table(run, recommender, catalogue)

    text_table = ranks.text_table
    monkeypatch.setattr(ranks, "text_table", counted)
    assert judge(lake).champion_id
    assert sorted(made_of) == [1, 42]


@pytest.mark.parametrize(("each", "views"), [(1, 2), (2, 3)])
def test_held_out_events_are_ranked_again_for_the_gates_only_where_a_user_has_several(
    lake: Run, monkeypatch: pytest.MonkeyPatch, each: int, views: int
) -> None:
    if each > 1:
        rows = sequence_rows()
        partitions.write(lake.lake, SEQUENCES, f"ds={DS}", [rows.set_column(4, "valid_end", rows["train_end"])])
    asked: list[int] = []
    rank = ranks.ranked

    def counted(name: str, recommender: Any, table_VD: Any, cases: Any) -> Any:
        asked.append(len(cases.users_C))
        return rank(name, recommender, table_VD, cases)

    monkeypatch.setattr(ranks, "ranked", counted)
    result = judge(lake)
    told = each == 1  # where there are validation events, the challenger's ranks of them tell who is weak
    assert len(asked) == 2 * views + told, "the teacher and the challenger"
    assert result.rows["all_cases"] == each * result.rows["cases"] == max(asked)


def test_a_rerun_leaves_the_same_table_and_the_same_negatives(lake: Run) -> None:
    first, second = judge(lake), judge(lake)
    assert dataclasses.replace(second, ranking_seconds=first.ranking_seconds) == first
    assert len(list((lake.lake / "models" / "negatives").iterdir())) == 1


def test_the_challenger_is_measured_against_the_champion(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = judge(lake, recommender=other(lake))
    assert alone.recommender_id == other(lake)
    crown(monkeypatch, champion=other(lake))
    result = judge(lake)
    assert result.champion_id == other(lake) == result.inputs["champion"]
    # with its own weights, and so unlike the challenger
    assert result.values["champion"]["overall"] == pytest.approx(alone.values["llmemb"]["overall"], abs=1e-5)
    assert result.values["champion"]["overall"] != pytest.approx(result.values["llmemb"]["overall"], abs=1e-3)
    [overall] = [row for row in result.differences if (row.against, row.slice) == ("champion", "overall")]
    ndcg = {model: by_slice["overall"]["ndcg@10"] for model, by_slice in result.values.items()}
    assert overall.value == pytest.approx((ndcg["llmemb"] or 0) - (ndcg["champion"] or 0), abs=2e-6)
    assert overall.reference == ndcg["champion"]


def test_a_night_run_again_after_its_promotion_gives_the_same_table(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    crown(monkeypatch, champion=other(lake))
    before = judge(lake)
    crown(monkeypatch, champion=before.recommender_id, previous=other(lake))
    assert judge(lake).outputs == before.outputs
    crown(monkeypatch, champion=before.recommender_id)
    assert judge(lake).champion_id == ""


def test_items_held_out_of_training_are_cold_here_and_the_id_only_model_is_lost_on_them(tmp_path: Path) -> None:
    run = make(tmp_path)
    trained(run, cold_share=0.4)
    result = judge(run)
    assert result.users["cold"] > 3
    assert result.users["cold"] + result.users["tail"] + result.users["head"] == result.users["overall"] == 23


@pytest.mark.parametrize("seed", [1, 7])
def test_the_cold_items_are_those_that_the_challenger_held_out_whatever_the_run_s_seed(tmp_path: Path, seed: int) -> None:
    run = make(tmp_path)
    trained(dataclasses.replace(run, seed=seed), cold_share=0.4)
    ids = [f"i{number:02d}" for number in range(20)]
    targets = [items[-1] for items in sequence_rows()["item_ids"].to_pylist() if len(items) > 1]
    cold = {}
    for drawn in (seed, run.seed):
        held = {item for item, out in zip(ids, held_out(ids, 0.4, drawn)[1:].tolist(), strict=True) if out}
        cold[drawn] = sum(item in held for item in targets)
    assert cold[seed] != cold[run.seed]
    assert judge(run).users["cold"] == cold[seed]


def test_slices_of_too_few_users_have_values_but_no_interval_and_empty_ones_nothing(lake: Run) -> None:
    judge(lake, min_users=1000)
    rows = partitions.read(lake.lake, METRICS, f"ds={DS}").to_pylist()
    assert all(row["low"] is None and row["high"] is None for row in rows)
    assert all((row["value"] is None) == (row["n"] == 0) for row in rows)
    assert any(row["n"] == 0 for row in rows if row["slice"] == "cold")


def test_an_empty_test_split_is_refused_with_the_remedy(lake: Run) -> None:
    rows = sequence_rows()
    whole = pa.array([len(items) for items in rows["item_ids"].to_pylist()], pa.int32())
    rows = rows.set_column(4, "valid_end", whole)
    partitions.write(lake.lake, SEQUENCES, f"ds={DS}", [rows])
    with pytest.raises(ValueError, match="no user has an event in the test part"):
        judge(lake)
    assert judge(lake, part="valid").users["overall"] == 23


def test_an_event_of_an_item_outside_the_catalogue_is_refused(lake: Run) -> None:
    rows = sequence_rows()
    lists = rows["item_ids"].to_pylist()
    lists[0][-1] = "stranger"
    partitions.write(lake.lake, SEQUENCES, f"ds={DS}", [rows.set_column(1, "item_ids", pa.array(lists))])
    with pytest.raises(InputError, match="'stranger'"):
        judge(lake)


def test_a_missing_embedding_is_refused_with_the_remedy(lake: Run) -> None:
    shutil.rmtree(lake.lake / "llm_embeddings" / f"encoder={ENCODER}" / "shard=1")
    with pytest.raises(InputError, match="run embed"):
        judge(lake)


def test_an_embedding_that_is_not_a_number_is_refused(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ranks.read_embeddings

    def broken(*given: Any) -> Any:
        llm_NE = real(*given)
        llm_NE[3, 2] = float("nan")
        return llm_NE

    monkeypatch.setattr(ranks, "read_embeddings", broken)
    with pytest.raises(ValueError, match="not finite"):
        judge(lake)


def test_embeddings_that_carry_popularity_raise_the_flag(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LEAK_ITEMS", (10, 1000))
    rows = sequence_rows()
    lists = [[*items[:-1], f"i{user % 3:02d}"] for user, items in enumerate(rows["item_ids"].to_pylist())]
    partitions.write(lake.lake, SEQUENCES, f"ds={DS}", [rows.set_column(1, "item_ids", pa.array(lists))])
    assert not judge(lake).leaking
    real = evaluate.read_embeddings

    def leaky(*given: Any) -> Any:
        llm_NE = real(*given)
        llm_NE[:3] += 10
        return llm_NE

    monkeypatch.setattr(evaluate, "read_embeddings", leaky)
    result = judge(lake)
    assert result.leaking
    assert result.leak["r2"] > 0.5


def test_a_name_the_table_has_already_is_refused(lake: Run) -> None:
    with pytest.raises(InputError, match=r"baselines\.champion"):
        evaluate.Config(run=lake, baselines={"champion": "x"})


def test_the_table_reads_well_and_names_no_user(lake: Run, capfd: pytest.CaptureFixture[str]) -> None:
    result = judge(lake)
    written = capfd.readouterr().err
    assert "llmemb - id_only" in written
    assert "could have shown" in written
    assert "nan" not in written
    assert not re.search(r"\bu\d+\b", written)
    assert all(re.search(r"\bu\d+\b", f"{user}:") for user in sequence_rows()["user_id"].to_pylist())
    json.dumps(as_json(result), allow_nan=False)


def test_negatives_are_kept_as_indices_of_the_catalogue(lake: Run) -> None:
    from safetensors.numpy import load_file

    result = judge(lake)
    kept = load_file(artifacts.find(lake.lake, "negatives", result.negatives_id) / "negatives.safetensors")
    assert kept["negative_CN"].shape == (23, 5)
    assert not np.any(kept["negative_CN"] == kept["target_C"][:, None])
    assert (kept["negative_CN"].min() >= 1) and (kept["negative_CN"].max() <= 20)


def test_gates_get_every_held_out_event_and_the_fixed_reference_and_no_user(lake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file

    def kept(result: evaluate.Result) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = artifacts.find(lake.lake, "outcomes", result.outcomes_id)
        return load_file(folder / "outcomes.safetensors"), json.loads((folder / "outcomes.json").read_text())

    rows = sequence_rows()
    held = rows.set_column(4, "valid_end", rows["train_end"])  # nothing validates: two events a user are to be foretold
    partitions.write(lake.lake, SEQUENCES, f"ds={DS}", [held])
    crown(monkeypatch, reference=other(lake))
    result = judge(lake)
    found, names = kept(result)
    per_user = np.bincount(found["user_C"])
    assert per_user.min() >= 1 and per_user.max() >= 2
    assert result.rows["all_cases"] == len(found["user_C"]) > result.rows["cases"] == len(per_user)
    whole = [name for name in names["models"] if not name.startswith(("only_", "up_to_"))]
    assert whole == ["popularity", "repeat_markov_popularity", "id_only", "llmemb", "reference"]
    assert found["ndcg_KC"].shape == (len(names["models"]), len(found["user_C"]))
    assert names["slices"] == [*SLICES, "weak_length", "weak_popularity", "weak_sparsity"]
    assert found["slices_SC"].shape == (len(names["slices"]), len(found["user_C"]))
    assert result.reference_id == other(lake)
    last, _ = kept(judge(lake, events_per_user=1))
    assert np.bincount(last["user_C"]).max() == 1
    values = judge(lake, events_per_user=1).values
    assert last["ndcg_KC"].mean(1) == pytest.approx([values[name]["overall"]["ndcg@10"] for name in names["models"]], abs=1e-5)


def test_the_weakest_fifth_of_the_users_by_each_signal_is_kept_for_the_report() -> None:
    """User 0 is foretold badly on validation, 1 has the fewest events, 3 the fewest items, 4 the rarest; two test events."""
    trained = [[1, 2, 1], [1, 2], [1, 2, 3, 1], [1, 1, 1, 1], [5, 6, 7, 8]]
    rows = [[*items, 9, 10, 11] for items in trained]
    ends = torch.tensor([len(items) for items in trained])
    events = histories(
        offsets=[0, *np.cumsum([len(row) for row in rows]).tolist()], items=[item for row in rows for item in row],
        timestamps=range(sum(map(len, rows))), train_end=ends.tolist(), valid_end=(ends + 1).tolist(), catalogue=11,
    )  # fmt: skip
    settings = {"negatives": 1, "paper_tail": 4, "chunk": 9, "seed": 0, "unseen": True}
    last, valid = (make_cases(events, part, **settings) for part in ("test", "valid"))  # type: ignore[arg-type]
    cases = every_case(events, "test", last, 0, 4)
    first_C2 = torch.where(valid.users_C == 0, 50, 1)[:, None].repeat(1, 2)
    found = weak_slices(cases, valid, (first_C2, first_C2), 10)
    who = {name: cases.users_C[in_C].tolist() for name, in_C in found.items()}
    assert who == {"weak_length": [1, 1], "weak_popularity": [4, 4], "weak_sparsity": [3, 3], "weak_validation": [0, 0]}
    assert set(weak_slices(cases, None, None, 10)) == set(who) - {"weak_validation"}


def test_whom_the_challenger_missed_on_validation_is_kept(lake: Run) -> None:
    found = read_outcomes(artifacts.find(lake.lake, "outcomes", judge(lake).outcomes_id))
    assert found.slices[-4:] == ["weak_length", "weak_popularity", "weak_sparsity", "weak_validation"]
    users = len(np.unique(found.user_C))
    assert [len(np.unique(found.user_C[in_C])) for in_C in found.slices_SC[-4:]] == [round(users / 5)] * 4
    assert (
        "weak_validation"
        not in read_outcomes(artifacts.find(lake.lake, "outcomes", judge(lake, part="valid").outcomes_id)).slices
    )
