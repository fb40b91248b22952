"""The report as a run of MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import report
from jobs.run import Run
from tests.jobs.report.small_night import DS, whole_night


def test_the_page_and_the_digests_of_the_tables_are_logged_to_mlflow(tmp_path: Path) -> None:
    import mlflow

    whole_night(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    report.run(report.Config(run=Run(ds=DS, lake=tmp_path, tracking_uri=uri), base_items=0))
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("llmemb").experiment_id])
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"report.html", "openlineage.jsonl"}
    assert [(given.dataset.name, given.dataset.digest) for given in found.inputs.dataset_inputs] == [(f"items/ds={DS}", "1" * 36)]
    assert found.data.metrics["fill.genre"] == 0.9


def test_mlflow_that_is_down_costs_the_record_not_the_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole_night(tmp_path)
    (tmp_path / "file").touch()
    run = Run(ds=DS, lake=tmp_path, tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    result = report.run(report.Config(run=run, base_items=0))
    assert Path(result.path).exists()
    assert "not logged" in caplog.text
