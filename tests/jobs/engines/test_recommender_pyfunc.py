"""The recommender in MLflow's format: no pickle, identical answers after a reload."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import rat
from jobs.engines import recommender_pyfunc
from jobs.engines.signatures import signature
from jobs.lake import artifacts
from jobs.rat.rotation import spans_of
from models.behaviour.artifact import load_recommender
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from tests.jobs.small_lake import make


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a recommender that `rat` kept."""
    run = make(tmp_path_factory.mktemp("pyfunc"))
    training, backbone = Training(epochs=1, batch=8), Backbone(width=8, max_len=6)
    result = rat.run(rat.Config(run=run, teacher="none", hidden=16, backbone=backbone, training=training))
    return artifacts.find(run.lake, "recommender", result.recommender_id)


IDS = [f"i{number:02d}" for number in range(20)]
EMBEDDINGS = np.random.default_rng(0).normal(size=(20, 12)).astype(np.float16)
ASKED = {"item_ids": IDS, "embeddings": EMBEDDINGS, "histories": [["i01", "i02"], ["i05"] * 9, []], "k": 3}


@pytest.mark.parametrize("signed", [False, True])
def test_a_model_saved_by_mlflow_answers_as_the_artifact_does_and_holds_no_pickle(
    kept: Path, tmp_path: Path, signed: bool
) -> None:
    mlflow.pyfunc.save_model(
        tmp_path / "model",
        python_model=recommender_pyfunc.__file__,
        artifacts={"recommender": str(kept)},
        pip_requirements=["torch"],
        signature=signature("recommender") if signed else None,
    )
    assert not [file for file in (tmp_path / "model").rglob("*") if file.suffix in (".pkl", ".pickle", ".bin", ".pt")]
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    vectors = load_recommender(kept).project(torch.from_numpy(EMBEDDINGS), IDS)
    assert np.array_equal(model.predict({"item_ids": IDS, "embeddings": EMBEDDINGS})["vectors"], vectors.numpy())
    again = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert model.predict(ASKED) == again.predict(ASKED) == direct(kept).predict(None, ASKED)


def test_a_signature_names_what_is_missing_before_anything_is_computed(kept: Path, tmp_path: Path) -> None:
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=recommender_pyfunc.__file__, artifacts={"recommender": str(kept)},
                             pip_requirements=["torch"], signature=signature("recommender"))  # fmt: skip
    with pytest.raises(mlflow.exceptions.MlflowException, match="embeddings"):
        mlflow.pyfunc.load_model(str(tmp_path / "model")).predict({"item_ids": IDS})


def direct(kept: Path) -> recommender_pyfunc.RecommenderModel:
    model = recommender_pyfunc.RecommenderModel()
    model.load_context(type("Context", (), {"artifacts": {"recommender": str(kept)}})())
    return model


def test_each_history_gets_its_k_best_items_in_order(kept: Path) -> None:
    answer = direct(kept).predict(None, ASKED)
    assert [len(items) for items in answer["item_ids"]] == [3, 3, 3]
    assert all(set(items) <= set(IDS) for items in answer["item_ids"])
    assert all(scores == sorted(scores, reverse=True) for scores in answer["scores"])


def test_a_turned_recommender_ranks_as_before(kept: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned"
    shutil.copytree(kept, turned)
    turn_DD = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0].contiguous()
    tensors = load_file(kept / "recommender.safetensors") | {"llmemb.turn_DD": turn_DD}
    save_file(tensors, turned / "recommender.safetensors")
    before, after = (direct(path).predict(None, ASKED) for path in (kept, turned))
    assert after["item_ids"] == before["item_ids"]
    assert np.allclose(after["scores"], before["scores"], atol=1e-5)
    vectors, moved = (
        direct(path).predict(None, {"item_ids": IDS, "embeddings": EMBEDDINGS})["vectors"] for path in (kept, turned)
    )
    start, stop = spans_of(json.loads((kept / "recommender.json").read_text()))["llmemb"]
    expected = vectors.copy()
    expected[:, start:stop] = vectors[:, start:stop] @ turn_DD.numpy()
    assert np.allclose(moved, expected, atol=1e-5) and not np.allclose(moved, vectors, atol=1e-2)


def test_a_history_of_items_without_an_embedding_is_refused(kept: Path) -> None:
    with pytest.raises(ValueError, match="'stranger'"):
        direct(kept).predict(None, ASKED | {"histories": [["i01", "stranger"]]})
