"""Reader: one space an answer, every id accounted for, the same through SDK, HTTP and Feast's own API."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from feast.protos.feast.types.Value_pb2 import Value

from feature_repo import spaces
from feature_repo.feature_definitions import item_embedding
from feature_repo.reader import NothingServed, Reader, Space, open_store, settings
from feature_repo.stores import lease, open_writer
from feature_repo.transport import packed_floats
from tests.feature_repo.feature_server import feature_server

IDS = [f"i{number}" for number in range(30)]


def space(letter: str = "a", codec: str = "float32", width: int = 8, items: int = 30) -> Space:
    return Space(space_id=letter * 16, recommender_id="r" * 16, ds="2026-01-01", width=width, codec=codec, items=items)


def vectors(seed: int, width: int = 8) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(30, width)).astype(np.float32)


def put(lake: Path, which: Space, seed: int) -> None:
    store, reader = open_writer(settings(lake)), Reader.open(lake)
    with lease(store, "test"):
        spaces.stage(store, reader, which, [(IDS, vectors(seed, which.width))], only_changes=False)
        rows = [(IDS, vectors(seed, which.width))]
        spaces.verify(store, reader, which, rows, spaces.inspect(rows, which.width, which.codec))
        spaces.flip(store, reader, which)


def test_found_missing_and_deleted_are_told_apart(lake: Path) -> None:
    put(lake, space(), 1)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        assert spaces.forget(store, "i3", "2026-01-02") == 1
    answer = Reader.open(lake).vectors(["i2", "i3", "nope", "i2"])
    assert (answer.item_ids, answer.deleted, answer.missing) == (["i2", "i2"], ["i3"], ["nope"])
    assert np.array_equal(answer.vector_ND, vectors(1)[[2, 2]])


def test_ages_are_told(lake: Path) -> None:
    put(lake, space(), 1)
    answer = Reader.open(lake).vectors(["i1"])
    assert answer.as_of == [dt.datetime(2026, 1, 2, tzinfo=dt.UTC)]
    assert answer.stale(dt.timedelta(days=1)) == ["i1"]
    assert answer.stale(dt.timedelta(days=100_000)) == []
    assert answer.pointer.age > dt.timedelta(days=1)


def test_an_answer_is_of_the_space_that_serves(lake: Path) -> None:
    put(lake, space("a"), 1)
    put(lake, space("b", codec="float16", width=4), 2)
    answer = Reader.open(lake).vectors(IDS)
    assert answer.pointer.space_id == "b" * 16
    assert answer.pointer.previous == space("a")
    assert np.array_equal(answer.vector_ND, vectors(2, 4).astype(np.float16).astype(np.float32))


def test_one_reader_follows_the_pointer_across_a_flip_and_back(lake: Path, server: str) -> None:
    readers = [Reader.open(lake), Reader.over_http(server)]
    put(lake, space("a"), 1)
    for reader in readers:
        assert np.array_equal(reader.vectors(IDS).vector_ND, vectors(1))
    put(lake, space("b", width=4), 2)
    for reader in readers:
        answer = reader.vectors(IDS)
        assert (reader.pointer().space_id, answer.pointer.space_id, answer.pointer.sequence) == ("b" * 16, "b" * 16, 2)
        assert np.array_equal(answer.vector_ND, vectors(2, 4))
    store = open_writer(settings(lake))
    with lease(store, "test"):
        spaces.rollback(store, Reader.open(lake))
    for reader in readers:
        assert np.array_equal(reader.vectors(IDS).vector_ND, vectors(1))


def test_a_space_collected_between_two_reads_is_left_for_the_one_that_serves(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(lake, space("a"), 1)
    reader = Reader.open(lake)
    stale = reader.pointer()
    put(lake, space("b"), 2)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        spaces.remove_space(store, "a" * 16)
    fresh, answers = reader.pointer, iter([stale])
    monkeypatch.setattr(reader, "pointer", lambda: next(answers, None) or fresh())
    assert np.array_equal(reader.vectors(IDS).vector_ND, vectors(2))


def test_no_ids_give_no_vectors(lake: Path) -> None:
    put(lake, space(), 1)
    assert Reader.open(lake).vectors([]).vector_ND.shape == (0, 8)


def test_before_the_first_publish_nothing_serves(lake: Path) -> None:
    with pytest.raises(NothingServed, match="jobs publish"):
        Reader.open(lake).vectors(["i1"])


def test_feasts_own_api_reads_the_same_vectors(lake: Path) -> None:
    put(lake, space(), 1)
    rows = [{"item_id": item_id, "space_id": "a" * 16} for item_id in IDS]
    answer = open_store(lake).get_online_features(features=["item_embedding:vector"], entity_rows=rows).to_dict()
    assert np.array_equal(np.asarray(answer["vector"], np.float32), vectors(1))
    pointer = open_store(lake).get_online_features(features=["serving_pointer:space_id"], entity_rows=[{"catalogue": "items"}])
    assert pointer.to_dict()["space_id"] == ["a" * 16]


@pytest.fixture
def server(lake: Path) -> Iterator[str]:
    """Feast's feature server on a free port."""
    with feature_server(lake) as url:
        yield url


@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_over_http_the_answer_is_the_same(lake: Path, server: str, codec: str) -> None:
    put(lake, space(codec=codec), 1)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        spaces.forget(store, "i3", "2026-01-02")
    here, there = (reader.vectors([*IDS, "nope"]) for reader in (Reader.open(lake), Reader.over_http(server)))
    assert (there.item_ids, there.missing, there.deleted) == (here.item_ids, ["nope"], ["i3"])
    assert np.array_equal(here.vector_ND, there.vector_ND)
    assert there.pointer == here.pointer
    assert there.as_of == here.as_of


def test_over_http_a_store_into_which_nothing_was_published_is_told(lake: Path, server: str) -> None:
    with pytest.raises(NothingServed, match="jobs publish"):
        Reader.over_http(server).vectors(["i1"])


def test_a_feature_server_that_is_down_is_told_by_its_address() -> None:
    with pytest.raises(ConnectionError, match=r"feature server http://127\.0\.0\.1:9 failed .*is it up"):
        Reader.over_http("http://127.0.0.1:9/").vectors(["i1"])


@pytest.mark.parametrize(
    "url",
    ["http://user:hunter2@host/", "http://user:hunter2@host:6566", "http://user/hunter2@host", "http://host:hunter2",
     "http://hunter2@ho\u2100st", "hunter2:6566", "ftp://hunter2", "http://"],
)  # fmt: skip
def test_an_address_of_a_feature_server_that_can_t_be_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError, match=r"not http\(s\)://HOST") as refused:
        Reader.over_http(url)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("reply", [b"hunter2\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nhunter2"])
def test_a_feature_server_that_answers_nonsense_is_away_and_is_not_quoted(reply: bytes) -> None:
    def answer() -> None:
        with listening.accept()[0] as client:
            client.recv(65536)
            client.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match=r"failed \((BadStatusLine|JSONDecodeError)\)") as away:
            Reader.over_http(f"http://127.0.0.1:{listening.getsockname()[1]}").vectors(["i1"])
    assert "hunter2" not in "".join(traceback.format_exception(away.value))


def test_a_vector_of_another_width_than_the_space_is_not_answered(lake: Path) -> None:
    put(lake, space(), 1)
    store = open_writer(settings(lake))
    with lease(store, "test"):
        store.write(item_embedding, spaces.embedding_rows(space(width=4), ["i3"], [bytes(range(16))]))
    with pytest.raises(ValueError, match="is 8 wide, but a vector of 4 was read: publish it again"):
        Reader.open(lake).vectors(IDS)


@pytest.mark.parametrize("width", [1, 3, 31, 32, 33, 4095, 4096, 5000])
def test_packed_floats_are_the_numbers_of_the_message(width: int) -> None:
    numbers = np.random.default_rng(width).normal(size=width).astype(np.float32)
    value = Value()
    value.float_list_val.val.extend(numbers.tolist())
    assert packed_floats(value.SerializeToString()) == numbers.tobytes()


def test_an_empty_float_list_has_no_numbers() -> None:
    value = Value()
    value.float_list_val.SetInParent()
    assert packed_floats(value.SerializeToString()) == b""


def test_settings_without_a_lake_need_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMEMB_ONLINE_STORE", raising=False)
    with pytest.raises(ValueError, match="set LLMEMB_ONLINE_STORE and LLMEMB_REGISTRY"):
        Reader.open()


@pytest.mark.parametrize("text", ["redis", "{}", "[1]", "{"])
def test_a_strange_store_setting_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch, text: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", text)
    with pytest.raises(ValueError, match='not a JSON object with a "type"'):
        Reader.open(tmp_path)


def test_a_wrong_key_of_the_store_is_told_without_the_password_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error that cuts the settings in the middle leaves `hos...rd': 'hunter2'`, which nothing takes for a password."""
    store = {"type": "postgres", "host": "db", "databse": "shop", "user": "feast", "password": "hunter2"}
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps(store))
    with pytest.raises(ValueError, match=r"LLMEMB_ONLINE_STORE.*database: Field required; databse: Extra inputs") as refused:
        Reader.open(tmp_path)
    assert "hunter2" not in "".join(traceback.format_exception(refused.value))


def test_a_reader_does_not_go_through_a_fork(lake: Path) -> None:
    """Redis's client opens another connection by itself; SQLite's and PostgreSQL's would give wrong answers."""
    put(lake, space(), 1)
    reader = Reader.open(lake)
    assert reader.vectors(["i1"]).item_ids == ["i1"]
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if reader.vectors(["i1"]).item_ids == ["i1"] else 2
        except RuntimeError as error:
            status = 3 if "open the reader in the process that reads" in str(error) else 4
        finally:
            os._exit(status)
    told = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert told == (0 if settings(lake).online_store.type == "redis" else 3)
    assert reader.vectors(["i1"]).item_ids == ["i1"]
