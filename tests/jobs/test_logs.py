"""Log lines hold what the allow-list names, and nothing else."""

from __future__ import annotations

import json

from jobs import logs

MANIFEST = {
    "job": "publish", "ds": "2026-03-10", "status": "failed", "seconds": 1.5, "started_at": "2026-03-10T01:00:00+00:00",
    "error": "user 4711 of postgres://ada:secret@db", "config": {"run": {"tracking_uri": "http://ada:secret@mlflow"}},
    "result": {"item_id": "4711", "text": "a prompt"}, "rows": {"items": 3, "4711": "secret"}, "code_revision": {"secret": 1},
}  # fmt: skip


def test_a_line_holds_only_allowed_fields_of_allowed_types() -> None:
    assert json.loads(logs.line(MANIFEST)) == {
        "job": "publish", "ds": "2026-03-10", "status": "failed", "seconds": 1.5, "started_at": "2026-03-10T01:00:00+00:00",
        "rows": {"items": 3},
    }  # fmt: skip


def test_a_field_that_somebody_adds_to_manifests_stays_out_of_logs() -> None:
    line = logs.line({**MANIFEST, "user_id": "4711", "prompt": "secret"})
    assert "4711" not in line
    assert "secret" not in line
    assert "prompt" not in line


def test_a_manifest_of_a_job_that_failed_at_once_is_a_line_too() -> None:
    assert json.loads(logs.line({})) == {}
