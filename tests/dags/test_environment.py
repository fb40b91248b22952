"""What a job's process inherits: an allow-list, and each kind of job its own secrets."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GIVEN = {
    **{"PATH": "/bin", "LANG": "C.UTF-8", "LC_ALL": "C", "PYTHONPATH": "x", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"},
    **{"LLMEMB_LAKE": "/lake", "LLMEMB_CACHE": "/c", "LLMEMB_REPLICAS": "1", "MLFLOW_TRACKING_URI": "http://m", "HF_HOME": "/h"},
    **{"LLMEMB_ONLINE_STORE": "{}", "LLMEMB_REGISTRY": "pg", "LLMEMB_FEAST_AUTH": "{}", "MLFLOW_TRACKING_PASSWORD": "p"},
    **{"MLFLOW_TRACKING_USERNAME": "u", "OPENLINEAGE_API_KEY": "k", "HF_TOKEN": "t", "SPARK_CONF_DIR": "/s", "JAVA_HOME": "/j"},
    **{"AIRFLOW__CORE__FERNET_KEY": "f", "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": "pg", "AIRFLOW_CONN_X": "c"},
    **{
        "LLMEMB_ALERT_URL": "hook",
        "LLMEMB_SERVING_TOKEN": "s",
        "MLFLOW_BACKEND_STORE_URI": "pg",
        "SHOP_PASSWORD": "w",
        "SHOP": "x",
    },
    **{"MLFLOW_FLASK_SERVER_SECRET_KEY": "k", "LLMEMB_REDIS_PASSWORD": "r", "AWS_SECRET_ACCESS_KEY": "a"},
}
EVERYBODY = {"PATH", "LANG", "LC_ALL", "PYTHONPATH", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LLMEMB_LAKE", "LLMEMB_CACHE",
             "LLMEMB_REPLICAS", "MLFLOW_TRACKING_URI", "HF_HOME"}  # fmt: skip
STORES = {"LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_FEAST_AUTH"}
MLFLOW = {"MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME"}
OWN = {
    "extract": {"SPARK_CONF_DIR", "JAVA_HOME"},
    **dict.fromkeys(("scft", "embed", "evaluate"), MLFLOW | {"HF_TOKEN"}),
    **dict.fromkeys(("pretrain", "rat", "promote", "project"), MLFLOW),
    **dict.fromkeys(("pin", "publish", "recommend", "rollback", "collect"), MLFLOW | STORES),
    **dict.fromkeys(("lookup", "explain", "forget"), STORES),
    "report": MLFLOW | {"OPENLINEAGE_API_KEY"},
    "a job of another version": set(),
}


@pytest.fixture(scope="module")
def inherited() -> Any:
    spec = importlib.util.spec_from_file_location("job_environment", ROOT / "dags" / "job_environment.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.environment_of


@pytest.mark.parametrize("job", sorted(OWN))
def test_a_job_gets_what_it_needs_and_no_other_secret(inherited: Any, job: str) -> None:
    assert set(inherited(job, GIVEN)) == EVERYBODY | OWN[job]


def test_a_recipe_s_own_variables_are_passed_by_name(inherited: Any) -> None:
    given = GIVEN | {"LLMEMB_PASS_ENV": "SHOP", "LLMEMB_PASS_ENV_EXTRACT": "SHOP_*, AWS_SECRET_ACCESS_KEY"}
    own = {"SHOP", "LLMEMB_PASS_ENV", "LLMEMB_PASS_ENV_EXTRACT"}
    assert set(inherited("embed", given)) == EVERYBODY | OWN["embed"] | own
    assert set(inherited("extract", given)) == EVERYBODY | OWN["extract"] | own | {"SHOP_PASSWORD", "AWS_SECRET_ACCESS_KEY"}
