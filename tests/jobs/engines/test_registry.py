"""MLflow at the border: one version an artifact, aliases that name encoder and recommender, no pickle, no secret."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from jobs.engines import recommender_pyfunc, registry
from jobs.lake import manifests
from jobs.lake.partitions import digest_folder, write_json
from jobs.run import InputError, Run, Unavailable
from models.behaviour.artifact import load_recommender
from tests.jobs.small_registry import fresh, kept

CODE = Path(recommender_pyfunc.__file__)


def put(run: Run, artifact: Path) -> str | None:
    params = {"recommender_id": artifact.name}
    return registry.log_run(run, "rat", params, {"validation_ndcg": 0.25}, artifact, registry.RECOMMENDER, CODE)


def test_a_run_names_the_data_that_it_read_with_digests(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    registry.log_run(run, "rat", {}, {}, inputs={"items": "1" * 64, "encoder": "e" * 16, "champion": ""})
    with registry.connected(run) as client:
        (found,) = client.search_runs([client.get_experiment_by_name("llmemb").experiment_id])
    given = {one.dataset.name: one.dataset.digest for one in found.inputs.dataset_inputs}
    assert given == {"items": "1" * 36, "encoder": "e" * 16}, "the digests' beginning; no champion is no data set"


def test_a_training_s_curve_is_kept_by_epoch_or_by_step(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    registry.log_run(run, "rat", {}, {}, curve=[{"loss": 3.0, "ndcg": 0.1}, {"loss": 2.0}])
    registry.log_run(run, "scft", {}, {}, curve=[{"step": 0, "mrr": 0.5}, {"step": 250, "mrr": 0.75}])
    with registry.connected(run) as client:
        found = {one.data.tags["job"]: one.info.run_id for one in client.search_runs(["1"])}

        def curve(job: str, name: str) -> list[tuple[int, float]]:
            return [(one.step, one.value) for one in client.get_metric_history(found[job], f"training.{name}")]

        assert curve("rat", "loss") == [(1, 3.0), (2, 2.0)]
        assert curve("rat", "ndcg") == [(1, 0.1)]
        assert curve("scft", "mrr") == [(0, 0.5), (250, 0.75)]
        assert curve("scft", "step") == []


def test_an_artifact_keeps_its_version_however_often_it_is_registered(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = kept(run, 0), kept(run, 1)
    assert [put(run, first), put(run, first), put(run, second), put(run, first)] == ["1", "1", "2", "1"]


def test_an_alias_names_recommender_encoder_and_version(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    artifact = kept(run, encoder_id="abcd" * 4)
    assert registry.champion(run) is None
    version = put(run, artifact)
    assert registry.champion(run) is None
    registry.set_aliases(run, [("champion", version)])
    assert registry.champion(run) == {"recommender_id": artifact.name, "encoder_id": "abcd" * 4, "ds": run.ds, "version": "1"}
    assert registry.by_alias(run, "previous") is None
    registry.set_aliases(run, [("champion", None)])
    assert registry.champion(run) is None


def test_what_is_asked_for_resolves_to_ids_with_or_without_a_registry(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    artifact = kept(run)
    offline = dataclasses.replace(run, tracking_uri="")
    expected = {"recommender_id": artifact.name, "encoder_id": "e" * 16}
    assert registry.resolve(offline, artifact.name) == expected
    manifest = {"status": "done", "result": expected}
    write_json(manifests.path_of(run.lake, run.ds, "rat"), manifest)
    assert registry.resolve(offline, "latest") == expected
    registry.set_aliases(run, [("champion", put(run, artifact))])
    assert registry.resolve(run, "champion") == expected | {"ds": run.ds, "version": "1"}


@pytest.mark.parametrize("which", ["champion", "previous"])
def test_an_alias_that_names_nothing_is_refused_with_the_remedy(tmp_path: Path, which: str) -> None:
    run = fresh(tmp_path)
    with pytest.raises(InputError, match="run promote first"):
        registry.resolve(run, which)
    with pytest.raises(InputError, match=r"give run\.tracking_uri"):
        registry.resolve(dataclasses.replace(run, tracking_uri=""), which)


def test_latest_before_any_training_and_an_unknown_id_are_refused(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    with pytest.raises(InputError, match="rat"):
        registry.resolve(run, "latest")
    with pytest.raises(InputError, match="train it"):
        registry.resolve(run, "0123456789abcdef")


def test_a_recommender_that_the_lake_lost_comes_back_from_the_registry(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    artifact = kept(run)
    registry.set_aliases(run, [("champion", put(run, artifact))])
    before = digest_folder(artifact)
    shutil.rmtree(run.lake)
    assert registry.resolve(run, "champion")["recommender_id"] == artifact.name
    assert digest_folder(artifact) == before


def test_a_registered_recommender_that_was_changed_is_refused(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    artifact = kept(run)
    put(run, artifact)
    for stored in (tmp_path / "mlartifacts").rglob("item_ids.json"):
        stored.write_text(json.dumps(["a", "b", "x"]))
    shutil.rmtree(run.lake)
    with pytest.raises(InputError, match="was changed"):
        registry.resolve(run, artifact.name)


def test_without_an_address_nothing_is_logged_and_mlflow_is_not_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from jobs.engines import registry; from jobs.run import Run\n"
        "run = Run(ds='2026-01-01', lake=Path('lake'))\n"
        "assert registry.log_run(run, 'rat', {}, {}) is None and registry.champion(run) is None\n"
        "assert not {'mlflow', 'torch'} & set(sys.modules)"
    )
    root = Path(registry.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_server_that_is_down_is_worth_a_retry_and_its_error_names_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = Run(ds="2026-01-01", lake=tmp_path, tracking_uri="http://someone:hunter2@127.0.0.1:9")
    with pytest.raises(Unavailable, match="is it running") as error:
        registry.champion(run)
    assert "hunter2" not in str(error.value)
    assert "127.0.0.1:9" in str(error.value)


def test_a_run_records_nested_parameters_but_not_the_address_of_mlflow(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    nested = {"config": {"run": {"tracking_uri": "postgresql://u:hunter2@db"}, "training": {"epochs": 3}}, "many": {}}
    many = {f"key{number}": number for number in range(150)}
    registry.log_run(run, "scft", nested | many, {"recall_1": 0.5}, documents={"why": {"because": ["x"]}})
    with registry.connected(run) as client:
        found = client.search_runs([client.get_experiment_by_name("llmemb").experiment_id])[0]
        assert found.data.params["config.training.epochs"] == "3"
        assert found.data.params["key149"] == "149"
        assert "hunter2" not in str(found.data)
        assert (found.data.metrics, found.data.tags["job"], found.data.tags["ds"]) == ({"recall_1": 0.5}, "scft", "2026-01-01")
        assert json.loads(mlflow.artifacts.load_text(f"runs:/{found.info.run_id}/why.json")) == {"because": ["x"]}


def test_artifacts_lie_beside_the_sqlite_file_and_not_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = fresh(tmp_path / "home")
    put(run, kept(run))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert list((tmp_path / "home" / "mlartifacts").rglob("recommender.safetensors"))


def test_a_registered_recommender_loads_elsewhere_and_scores_alike_without_a_pickle(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    artifact = kept(run)
    put(run, artifact)
    with registry.connected(run):
        place = mlflow.artifacts.download_artifacts(f"models:/{registry.RECOMMENDER}/1", dst_path=str(tmp_path / "copy"))
        known = mlflow.models.get_model_info(f"models:/{registry.RECOMMENDER}/1").signature
    assert known.inputs.input_names() == ["item_ids", "embeddings", "histories", "k"]
    assert not [file for file in Path(place).rglob("*") if file.suffix in (".pkl", ".pickle", ".bin", ".pt", ".pth")]
    asked = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.save(tmp_path / "asked.npy", asked)
    code = (
        "import json, mlflow, numpy, sys\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "given = {'item_ids': ['a', 'b', 'c'], 'embeddings': numpy.load('asked.npy')}\n"
        "numpy.save('vectors.npy', model.predict(given)['vectors'])\n"
        "advice = model.predict(given | {'histories': [['a', 'b']], 'k': 2})\n"
        "json.dump({name: numpy.asarray(advice[name]).tolist() for name in ('item_ids', 'scores')}, open('advice.json', 'w'))"
    )
    (tmp_path / "alone").mkdir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, place], cwd=tmp_path, capture_output=True, text=True,
        env={"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = load_recommender(artifact).project(torch.from_numpy(asked), ["a", "b", "c"])
    # another process may have another number of threads, and so add up in another order
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected.numpy(), rtol=1e-5, atol=1e-5)
    model = recommender_pyfunc.RecommenderModel()
    model.load_context(type("Context", (), {"artifacts": {"recommender": str(artifact)}})())
    here = model.predict(None, {"item_ids": ["a", "b", "c"], "embeddings": asked, "histories": [["a", "b"]], "k": 2})
    there = json.loads((tmp_path / "advice.json").read_text())
    assert there["item_ids"] == np.asarray(here["item_ids"]).tolist()
    np.testing.assert_allclose(there["scores"], here["scores"], rtol=1e-4, atol=1e-5)
