"""Under faults the process answers from memory and says so; bad input gets a status and a message; nothing of users is logged."""

from __future__ import annotations

import dataclasses
import json
import logging
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_repo.serving import settings as serving_settings
from tests.feature_repo.postgresql import Server, postgresql
from tests.feature_repo.sentinels import free_port, redis_at, until
from tests.feature_repo.serving import world
from tests.feature_repo.serving.world import publish, push_history, serving

SECRET = "user-4711-secret"
HISTORY = ["i3", "i5", "i8"]


@contextmanager
def own_redis(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A Redis server of one test, which may be stopped and killed."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        until(redis_at(port).ping, "Redis answers")
        monkeypatch.delenv("LLMEMB_REGISTRY", raising=False)
        monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{folder}/registry.db")
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "redis", "connection_string": f"127.0.0.1:{port}"}))
        world.apply(folder)
        try:
            yield server
        finally:
            server.send_signal(signal.SIGCONT)
            server.kill()


@contextmanager
def own_postgres(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The same of PostgreSQL."""
    with postgresql() as server:
        monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{folder}/registry.db")
        monkeypatch.setenv("LLMEMB_ONLINE_STORE", server.online("own"))
        world.apply(folder)
        yield server


@pytest.mark.parametrize("store", [own_redis, own_postgres])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hanging"])
def test_with_the_store_gone_answers_go_on_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, store: Any
) -> None:
    with store(tmp_path, monkeypatch) as server:
        publish(tmp_path, seed=1)
        push_history(tmp_path, "u1", HISTORY)
        push_history(tmp_path, "u2", HISTORY)
        with serving(tmp_path) as client:
            _, before = client.post("/recommend", user_id="u1", k=5)
            server.send_signal(how)
            _, after = client.post("/recommend", user_id="u1", k=5)
            assert after["items"] == before["items"] and after["fallback"] == "remembered_history"
            status, other = client.post("/recommend", user_id="u2", k=2)
            assert (status, other["fallback"], other["items"][0]["item_id"]) == (200, "store_down", "i0")
            assert client.post("/recommend", history=HISTORY, k=5)[1]["items"] == before["items"]
            assert client.post("/vectors", item_ids=["i1", "gone"])[1]["missing"] == ["gone"]
            for _ in range(6):
                client.post("/recommend", user_id="u2", k=2)
            assert client.service.guard.failures >= 5
            assert 'llmemb_store_reads_total{outcome="refused"}' in client.get("/metrics")[1], "the breaker is open"
            assert client.get("/readyz")[0] == 200, "a store that is down takes no process out of service"
            if how == signal.SIGSTOP:
                server.send_signal(signal.SIGCONT)
            elif isinstance(server, Server):
                server.start()  # a Redis that was killed has nothing any more
            else:
                return
            client.until(lambda: client.post("/recommend", user_id="u2", k=2)[1]["fallback"] is None)


def test_a_store_that_was_flushed_keeps_what_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_redis(tmp_path, monkeypatch):
        publish(tmp_path, seed=1)
        push_history(tmp_path, "u1", HISTORY)
        with serving(tmp_path) as client:
            client.post("/recommend", user_id="u1")
            connection = client.service.reader.transport.config.online_store.connection_string
            redis.Redis(port=int(connection.split(",")[0].split(":")[1])).flushall()
            time.sleep(0.2)
            status, answer = client.post("/recommend", user_id="u1")
            assert (status, answer["fallback"], answer["sequence"]) == (200, "unknown_user", 1)


BAD: list[tuple[str, Any, int, str]] = [
    ("/recommend", {}, 422, "give either user_id or history"),
    ("/recommend", {"user_id": "u", "history": ["i1"]}, 422, "give either user_id or history"),
    ("/recommend", {"user_id": ""}, 422, "at least 1 character"),
    ("/recommend", {"user_id": 5}, 422, "valid string"),
    ("/recommend", {"user_id": "u", "k": 0}, 422, "greater than or equal to 1"),
    ("/recommend", {"user_id": "u", "k": 1_000_000}, 422, "at most 1000"),
    ("/recommend", {"user_id": "u", "k": "ten"}, 422, "valid integer"),
    ("/recommend", {"user_id": "u", "colour": 1}, 422, "Extra inputs"),
    ("/recommend", {"history": ["i1"] * 10_001}, 422, "at most 10000"),
    ("/recommend", {"history": ["i1"], "filters": {"genre": []}}, 422, "at least 1 item"),
    ("/recommend", {"history": ["i1"], "filters": {"": ["x"]}}, 422, "no item has an attribute ''"),
    ("/recommend", {"history": ["i1"], "filters": {"\ud800": ["x"]}}, 422, "valid string"),
    ("/recommend", {"history": ["i1"], "attributes": ["\ud800"]}, 422, "valid string"),
    ("/similar", {"item_ids": []}, 422, "at least 1 item"),
    ("/similar", {"item_ids": ["i1"], "k": -1}, 422, "greater than or equal to 1"),
    ("/vectors", {"item_ids": [f"i{n}" for n in range(21)], "encoding": "list"}, 422, "at most 20"),
    ("/vectors", {"item_ids": ["x" * 600]}, 422, "at most 512"),
    ("/vectors", [1], 422, "valid dictionary"),
]


def test_bad_input_is_told_what_is_wrong(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake, body_bytes=200_000) as client:
        for path, body, status, part in BAD:
            found, answer = client.ask(path, body)[:2]
            assert (found, part in answer["error"]) == (status, True), (path, str(body)[:80], answer)
        no_text = b'{"user_id": "\xc3\x28"}'
        for raw, status in ((b"{", 422), (b"", 422), (b"\xff\xfe", 422), (no_text, 400), (b"x" * 300_000, 413)):
            found, answer = client.ask("/recommend", raw=raw)[:2]
            assert found == status and "error" in answer, raw[:10]
        assert client.ask("/recommend", raw=b"[" * 50_000)[0] in (400, 422), "nested without end"
        assert "no JSON, see character 12" in client.ask("/recommend", raw=b'{"user_id": "u1')[1]["error"]
        status, answer = client.ask("/recommend", {"user_id": "u"}, **{"Content-Type": "application/x-www-form-urlencoded"})[:2]
        assert status == 415 and "Content-Type: application/json" in answer["error"], "what curl sends by itself"
        assert client.get("/recommend")[0] == 405 and client.get("/nothing")[0] == 404
        status, answer = client.post("/recommend", user_id="用户-Ωμέγα-\u0000-😀", k=2)
        assert (status, answer["fallback"]) == (200, "unknown_user")
        status, answer = client.post("/recommend", history=["товар", "i1"] * 4_000, k=2)
        assert (status, answer["fallback"]) == (200, None)
        assert client.post("/recommend", history=[f"i{n}" for n in range(200)], k=5)[1]["items"] == [], "all were seen"
        assert client.ask("/recommend", {"user_id": "\ud800"})[0] in (200, 422), "half a character"


def test_slow_and_endless_callers_are_hung_up_on(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_repo.serving.http.HEAD_S", 0.3)
    publish(lake, seed=1)
    with serving(lake, keep_alive=1, body_s=0.3, body_bytes=100_000) as client:
        host, port = client.url.removeprefix("http://").split(":")

        def said(*sent: bytes) -> bytes:
            with socket.create_connection((host, int(port)), timeout=10) as line:
                for part in sent:
                    line.sendall(part)
                return line.recv(4096)

        head = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        whole = head + b"Content-Length: 0\r\n\r\n"
        monkeypatch.setattr("feature_repo.serving.http.HEAD_S", 10)
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(whole)
            first = b""
            while not first.endswith(b"}"):  # head and body may come apart
                first += line.recv(4096)
            assert b"422" in first
            line.sendall(b"P")
            assert line.recv(4096) == b"", "a second head that does not come"
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(head)
            told: list[Any] = []
            while not told:  # a head without end
                line.sendall(b"X-A: " + b"y" * 2_000 + b"\r\n")
                told, _, _ = select.select([line], [], [], 0.01)
            assert b"431" in line.recv(4096)
        monkeypatch.setattr("feature_repo.serving.http.HEAD_S", 0.3)
        assert b"408" in said(head + b"Content-Length: 100\r\n\r\n", b"{"), "a body that does not come"
        assert said(b"POST /recommend HT") == b"", "a head that does not come"
        assert b"413" in said(head + b"Content-Length: 100000000\r\n\r\n"), "told before it is sent"
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        assert b"413" in said(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 4), "no length, no end"
        assert client.get("/healthz")[0] == 200


def test_who_sends_too_much_reads_why(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake, page=True, token="t") as client:
        for path, token, status in (("/recommend", "t", 413), ("/page/history", "t", 413), ("/recommend", "x", 401)):
            # as most clients do, the body is sent whole before the answer is read
            found, answer, _ = client.ask(path, raw=b" " * 50_000_000, Authorization=f"Bearer {token}")
            assert found == status and "error" in answer


def test_who_does_not_read_is_hung_up_on(lake: Path) -> None:
    publish(lake, seed=1, count=800)
    with serving(lake, keep_alive=1) as client, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, port = client.url.removeprefix("http://").split(":")
        line.connect((host, int(port)))
        body = json.dumps({"item_ids": [f"i{n}" for n in range(100)], "k": 800, "attributes": ["*"]}).encode()
        head = f"POST /similar HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        line.sendall(head.encode() + body)
        client.until(lambda: client.connections)
        client.until(lambda: not client.connections, seconds=20)


def test_callers_that_only_wait_keep_nobody_out(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake, waiting=1) as client:
        host, port = client.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(40)]
        assert client.get("/healthz")[0] == 200 and client.post("/recommend", history=HISTORY)[0] == 200
        slow = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        for line in idle[:4]:
            line.sendall(slow)
        client.until(lambda: client.post("/recommend", history=HISTORY)[0] == 503)
        assert client.ask("/recommend", {"history": HISTORY})[2]["retry-after"] == "1" and client.get("/healthz")[0] == 200
        for line in idle:
            line.close()
        client.until(lambda: client.post("/recommend", history=HISTORY)[0] == 200)


def test_who_can_t_be_kept_up_with_is_told_to_come_again(lake: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    publish(lake, seed=1)
    with serving(lake, waiting=2, window_ms=50.0) as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: client.ask("/recommend", {"history": HISTORY}), range(24)))
        assert {status for status, _, _ in answers} == {200, 503}
        assert all(
            headers["retry-after"] == "1" and "again" in body["error"] for status, body, headers in answers if status == 503
        )
        assert client.post("/recommend", history=HISTORY)[0] == 200, "and well after it"


def test_a_token_is_asked_of_everyone_and_never_repeated(lake: Path, caplog: pytest.LogCaptureFixture) -> None:
    publish(lake, seed=1)
    with serving(lake, token="s3cret", page=True, ready=False) as client:
        client.until(lambda: client.get("/readyz")[0] == 200)
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic s3cret"},
            {"Authorization": "Bearer s3cret "[:-2]},
        ):
            for path, body in (
                ("/recommend", {"user_id": "u"}),
                ("/similar", {"item_ids": ["i1"]}),
                ("/vectors", {"item_ids": ["i1"]}),
            ):
                status, answer, _ = client.ask(path, body, **headers)
                assert status == 401 and "s3cret" not in json.dumps(answer)
        assert client.ask("/openapi.json")[0] == client.ask("/")[0] == 401
        assert client.ask("/recommend", {"user_id": "u"}, Authorization="Bearer s3cret")[0] == 200
    assert "s3cret" not in repr(client.service.settings) and "s3cret" not in caplog.text


def test_nothing_of_users_is_logged(
    lake: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    publish(lake, seed=1)
    push_history(lake, SECRET, HISTORY)
    caplog.clear()
    with serving(lake) as client:
        for body in (
            {"user_id": SECRET},
            {"user_id": SECRET, "k": 0},
            {"history": [SECRET]},
            {"user_id": SECRET, "filters": {SECRET: ["x"]}},
        ):
            client.ask("/recommend", body)

        def broken(*_: Any) -> Any:
            raise RuntimeError(SECRET)

        monkeypatch.setattr(client.service.batcher, "work", broken)
        status, answer = client.post("/recommend", user_id=SECRET)
        assert status == 500 and SECRET not in json.dumps(answer) and "log" in answer["error"]
        by_framework = client.ask("/recommend", {"user_id": SECRET}, **{"Content-Type": "application/vnd.a+json"})[:2]
        assert by_framework == (status, answer)
        assert SECRET not in client.get("/metrics")[1]
    shown = capfd.readouterr()
    assert SECRET not in caplog.text and SECRET not in shown.out + shown.err


def test_a_batch_that_failed_leaves_the_next_alone(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, seed=1)
    with serving(lake, request_s=5.0) as client:

        def broken(*_: Any) -> Any:
            raise RuntimeError

        with monkeypatch.context() as during:
            during.setattr(client.service.batcher, "work", broken)
            assert client.post("/recommend", history=HISTORY)[0] == 500
        assert client.post("/recommend", history=HISTORY)[0] == 200


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"HOST": "0.0.0.0"}, "set LLMEMB_SERVING_TOKEN"),
        ({"PORT": "many"}, "LLMEMB_SERVING_PORT is no int"),
        ({"POORT": "1"}, "LLMEMB_SERVING_POORT is no setting"),
        ({"BATCH": "0"}, "LLMEMB_SERVING_BATCH is 0"),
        ({"CLIENT_CA": "ca.pem"}, "needs both"),
        ({"PAGE": "maybe"}, "LLMEMB_SERVING_PAGE is no bool"),
        ({"PORT": "99999"}, "ports end at 65535"),
        ({"POLL_S": "nan"}, "LLMEMB_SERVING_POLL_S is nan: give more than 0"),
        ({"BREADTH": "0"}, "give more than 0"),
        ({"REMEMBERED": "-1"}, "give 0 or more"),
        ({"TOKEN": "t\n"}, "begins or ends with"),
        ({"CERTIFICATE": "/nowhere", "KEY": "/nowhere"}, "LLMEMB_SERVING_CERTIFICATE names no file"),
    ],
)
def test_settings_that_are_wrong_are_told(variables: dict[str, str], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        serving_settings.from_environment({f"LLMEMB_SERVING_{name}": value for name, value in variables.items()})
    assert serving_settings.from_environment({"LLMEMB_SERVING_HOST": "0.0.0.0", "LLMEMB_SERVING_TOKEN": "t"}).port == 8100


def test_every_setting_is_told_with_its_meaning_and_no_argument_is_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from feature_repo.serving.__main__ import main

    monkeypatch.setattr("sys.argv", ["serving", "--help"])
    assert main() == 0
    told = capsys.readouterr().out
    for field in dataclasses.fields(serving_settings.Settings):
        assert f"LLMEMB_SERVING_{field.name.upper()}=" in told
    assert "Seconds between two looks at the pointer." in told
    monkeypatch.setattr("sys.argv", ["serving", "--port", "80"])
    assert main() == 2 and "LLMEMB_SERVING_PORT" in capsys.readouterr().err


def test_long_histories_do_not_fill_the_memory(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake, remembered=3) as client:
        histories = client.service.histories
        for number in range(5):
            histories.remember(f"long{number}", ["i1"] * 200)
        assert (list(histories.known), histories.held) == (["long4"], 200)
        histories.remember("long4", ["i2"])
        for number in range(3):
            histories.remember(f"u{number}", ["i1", "i2"])
        assert (list(histories.known), histories.held) == (["u0", "u1", "u2"], 6)


def test_the_space_ages_in_the_metrics_also_while_the_store_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_redis(tmp_path, monkeypatch) as server:
        publish(tmp_path, seed=1)
        with serving(tmp_path) as client:

            def age() -> float:
                lines = client.get("/metrics")[1].splitlines()
                return next(float(line.split()[1]) for line in lines if line.startswith("llmemb_pointer_age_seconds "))

            server.send_signal(signal.SIGKILL)
            client.until(lambda: "llmemb_store_up 0.0" in client.get("/metrics")[1])
            before = age()
            client.until(lambda: age() > before)


def test_what_was_not_read_whole_counts_among_no_answer_s_seconds(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake, body_s=0.2) as client:

        def counted() -> float:
            lines = client.get("/metrics")[1].splitlines()
            return sum(float(x.split()[1]) for x in lines if x.startswith('llmemb_request_seconds_count{endpoint="/vectors"}'))

        client.post("/vectors", item_ids=["i1"])
        before = counted()
        host, port = client.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as line:
            line.sendall(b"POST /vectors HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
            assert b"408" in line.recv(4096)
        assert counted() == before
        client.post("/vectors", item_ids=["i1"])
        assert counted() == before + 1
