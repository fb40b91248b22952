"""What Airflow shows of a job and what an alert tells: no secret by its form, whoever wrote it, nor the alert's own address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dags.conftest import ROOT

SECRET = "hunter2"
LINES = [
    f"java.sql.SQLException: jdbc:postgresql://db/shop?user=a&password={SECRET}&ssl=true",
    f"sqlalchemy.exc.OperationalError: postgresql+psycopg://mlflow:{SECRET}@db/mlflow is down",
    f"OSError: http://{SECRET}@host:5000/x, s3a://AKIA:sec/{SECRET}@bucket/films",
    f"26/11/30 WARN Conf: spark.hadoop.fs.s3a.secret.key = {SECRET}",
    f'{{"password": "a {SECRET}", \'api_key\': \'{SECRET}\', \\"token\\": \\"{SECRET}\\"}}',
    f"PGPASSWORD={SECRET} REDISCLI_AUTH={SECRET} Authorization: Bearer {SECRET}",
]
HARMLESS = ["s3://bucket/films/part-0", "http://host:8080/x", "12 tokens = 5 items", "a@b.c wrote", "password ***"]
URLS = [f"http://user:{SECRET}@host/x", f"http://ho st/{SECRET}", f"htp://host/{SECRET}", SECRET, f"http://127.0.0.1:9/{SECRET}"]


def in_dags(code: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Runs code where the DAG files are."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "dags"), "AIRFLOW_HOME": str(folder)} | settings
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_a_line_of_a_job_is_shown_without_its_secrets(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("\n".join(HARMLESS + LINES) + "\n")
    job = tmp_path / "python"
    job.write_text(f'#!/bin/sh\ncat "{tmp_path / "lines"}" >&2\nexit 3\n')
    job.chmod(0o755)
    code = (
        "import logging; from job_process import JobProcess, log\n"
        "log.setLevel('INFO'); log.propagate = False; log.addHandler(logging.StreamHandler())\n"
        "try:\n    JobProcess(task_id='t', command=['extract']).execute({})\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    done = in_dags(code, tmp_path, LLMEMB_PYTHON=str(job))
    assert done.stdout.splitlines()[-1].startswith("AirflowFailException PGPASSWORD=***"), done.stderr[-2000:]
    assert done.stderr.count("***") >= len(LINES) and SECRET not in done.stdout + done.stderr
    assert all(f"{line}\n" in done.stderr for line in HARMLESS)


def test_an_alert_fails_nobody_and_tells_no_secret_wherever_it_goes(tmp_path: Path) -> None:
    code = (
        "import logging, os; from job_task import tell; from job_process import log\n"
        "log.setLevel('INFO'); log.propagate = False; log.addHandler(logging.StreamHandler())\n"
        f"for url in {json.dumps(URLS)}:\n"
        f"    os.environ['LLMEMB_ALERT_URL'] = url\n    tell({LINES[0]!r}, {{'dag': 'd'}})\n"
        "print('all told')"
    )
    done = in_dags(code, tmp_path)
    assert done.stdout.splitlines()[-1:] == ["all told"], done.stderr[-2000:]
    assert done.stderr.count("did not reach LLMEMB_ALERT_URL: ") == done.stderr.count("ALERT java") == len(URLS)
    assert SECRET not in done.stderr


def test_the_serving_process_and_airflow_have_the_same_net() -> None:
    assert (ROOT / "dags" / "job_redaction.py").read_bytes() == (ROOT / "feature_repo" / "serving" / "redaction.py").read_bytes()


@pytest.mark.timeout(100)
@pytest.mark.parametrize("text", ["http://x:y", "//a:", "password", 'password=\\"'])
def test_a_long_line_costs_time_by_its_length(text: str) -> None:
    from feature_repo.serving.redaction import redacted

    assert redacted("password=" + text * 200_000).startswith("password=***")
    assert redacted(text * 200_000)
