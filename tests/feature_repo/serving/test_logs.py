"""The serving process's log lines are the jobs' own: the same variable, the same fields, for people and for collectors."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from feature_repo.serving import logs
from feature_repo.serving.__main__ import server_of
from feature_repo.serving.settings import Settings
from jobs import logs as logs_of_jobs


@pytest.fixture(autouse=True)
def left_as_found() -> Iterator[None]:
    """Begins without handlers, which other tests leave, and puts the loggers back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers = []
    # a server that another test started has set up its own
    web = [logging.getLogger(name) for name in ("uvicorn", "uvicorn.error")]
    own = [(list(one.handlers), one.propagate, one.level, one.disabled) for one in web]
    for one in web:
        one.handlers, one.propagate, one.level, one.disabled = [], True, logging.NOTSET, False
    yield
    root.handlers, root.level = handlers, level
    for one, (of_one, up, from_level, off) in zip(web, own, strict=True):
        one.handlers, one.propagate, one.level, one.disabled = of_one, up, from_level, off
    logging.getLogger(logs.ROOT).setLevel(logging.NOTSET)


def line(capsys: pytest.CaptureFixture[str], name: str) -> str:
    logs.start()
    logs.start()  # a second call adds no second line
    logging.getLogger(name).info("space %s\nserves", "a1")
    told = capsys.readouterr().err
    assert told.count("a1") == 1
    return told


def test_json_is_an_object_a_line_with_the_fields_that_a_job_s_line_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMEMB_LOG", "json")
    (told,) = line(capsys, "llmemb.serving").splitlines()
    found = json.loads(told)
    assert (found["level"], found["logger"], found["message"]) == ("INFO", "llmemb.serving", "space a1\nserves")
    record = logging.LogRecord("llmemb.serving", logging.INFO, "", 0, "space %s\nserves", ("a1",), None)
    of_job, own = (json.loads(kind.format(record)) for kind in (logs_of_jobs.Json("", ""), logs.Json()))
    assert of_job == own


def test_text_has_time_level_and_logger(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("LLMEMB_LOG", raising=False)
    assert re.match(r"\d\d:\d\d:\d\d INFO    llmemb.serving: space a1\nserves\n", line(capsys, "llmemb.serving"))


def test_libraries_are_heard_from_warnings_on_and_so_is_the_web_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMEMB_LOG", "json")
    logs.start()
    logging.getLogger("uvicorn.error").info("chat")
    logging.getLogger("uvicorn.error").warning("look out")
    told = capsys.readouterr().err
    assert "chat" not in told
    assert json.loads(told)["logger"] == "uvicorn.error"
    assert server_of(Settings())["log_config"] is None, "uvicorn would set up lines of its own"


@pytest.mark.parametrize("kind", ["text", "json"])
def test_no_log_line_of_the_serving_process_has_a_secret(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMEMB_LOG", kind)
    logs.start()
    for text in ("redis:6379,username=reader,password=hunter2", "postgresql://feast:hunter2@db", '{"token": "a hunter2"}'):
        logging.getLogger("llmemb.serving").info("%s", text)
        try:
            raise OSError(text)
        except OSError:
            logging.getLogger("uvicorn.error").exception("failed")
    told = capsys.readouterr().err
    assert told.count("failed") == 3 and told.count("***") >= 6 and "hunter2" not in told
