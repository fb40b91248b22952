"""Log lines hold what the allow-list names, and nothing else."""

from __future__ import annotations

import json
import logging
import re
import time

import pytest

from jobs import logs

MANIFEST = {
    "job": "publish", "ds": "2026-03-10", "status": "failed", "seconds": 1.5, "started_at": "2026-03-10T01:00:00+00:00",
    "error": "user 4711 of postgres://ada:secret@db", "config": {"run": {"tracking_uri": "http://ada:secret@mlflow"}},
    "result": {"item_id": "4711", "text": "a prompt"}, "rows": {"items": 3, "4711": "secret"}, "code_revision": {"secret": 1},
}  # fmt: skip


def test_a_line_holds_only_allowed_fields_of_allowed_types() -> None:
    assert logs.allowed(MANIFEST) == {
        "job": "publish", "ds": "2026-03-10", "status": "failed", "seconds": 1.5, "started_at": "2026-03-10T01:00:00+00:00",
        "rows": {"items": 3},
    }  # fmt: skip


def test_a_field_that_somebody_adds_to_manifests_stays_out_of_logs() -> None:
    line = json.dumps(logs.allowed({**MANIFEST, "user_id": "4711", "prompt": "secret"}))
    assert "4711" not in line
    assert "secret" not in line
    assert "prompt" not in line


def test_a_manifest_of_a_job_that_failed_at_once_is_a_line_too() -> None:
    assert logs.allowed({}) == {}


def test_text_has_time_level_and_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LLMEMB_LOG", raising=False)
    logs.start("embed", "2026-03-10")
    logging.getLogger("jobs.embed").warning("%d texts", 3)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING embed: 3 texts\n", capsys.readouterr().err)


def test_json_is_an_object_a_line_with_the_allowed_fields_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMEMB_LOG", "json")
    logs.start("publish", "2026-03-10")
    logs.start("publish", "2026-03-10")  # a second call adds no second line
    logging.getLogger("jobs.publish").info("failed\nin 1 s", extra={"manifest": MANIFEST})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    told = json.loads(lines[0])
    assert {"time", "level", "logger", "message", "status", "rows"} <= set(told)
    assert (told["level"], told["job"], told["ds"], told["message"]) == ("INFO", "publish", "2026-03-10", "failed\nin 1 s")
    assert "4711" not in lines[0]
    assert "secret" not in lines[0]


def test_libraries_are_heard_from_warnings_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    logs.start()
    logging.getLogger("some.library").info("chat")
    logging.getLogger("some.library").warning("look out")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("pip install kernels")
    told = capsys.readouterr().err
    assert "chat" not in told
    assert "kernels" not in told
    assert "look out" in told


def test_a_job_that_says_nothing_is_said_to_be_at_work_until_it_speaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "SILENCE_S", 1.0)
    with caplog.at_level(logging.INFO):
        with logs.SignsOfLife("extract"):
            end = time.monotonic() + 30
            while not caplog.records and time.monotonic() < end:
                time.sleep(0.05)
        (told, *_) = caplog.records
        assert told.name == "jobs.extract" and re.fullmatch(r"at work for \d+ s", told.getMessage())
    with logs.SignsOfLife("extract") as signs:
        signs.last = 1e12  # nothing is due
        logging.getLogger("jobs.extract").info("a line")
        assert signs.last < 1e12, "who spoke is remembered"
    assert signs not in logging.getLogger().handlers and not signs.watcher.is_alive()
