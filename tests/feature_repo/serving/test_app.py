"""The serving process answers from one generation, and tells where from."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_repo.index import Graph
from feature_repo.reader import Reader
from feature_repo.serving.app import SWITCH_S
from models.behaviour.artifact import load_recommender
from models.behaviour.recommender import Span
from tests.feature_repo.serving.world import Client, item_ids, publish, push_history, serving, vectors

HISTORY = ["i3", "i5", "i8", "i13"]


@pytest.fixture
def client(lake: Path) -> Iterator[Client]:
    publish(lake, seed=1)
    push_history(lake, "u1", HISTORY)
    with serving(lake) as client:
        yield client


def wanted(lake: Path, history: list[str], k: int, hidden: set[str], seed: int = 1) -> tuple[list[str], list[float]]:
    """What the recommender and all vectors say, without the service."""
    vector_ND, ids = vectors(seed, 200), item_ids(200)
    recommender = load_recommender(lake / "models" / "recommender" / Reader.open(lake).pointer().recommender_id)
    emb_BLD = torch.from_numpy(np.stack([vector_ND[ids.index(item_id)] for item_id in history]))[None]
    user_BD = recommender.encode(emb_BLD, torch.ones(emb_BLD.shape[:2], dtype=torch.bool)).numpy()
    score_N = (user_BD @ vector_ND.T)[0]
    order = [row for row in np.argsort(-score_N) if ids[row] not in hidden][:k]
    return [ids[row] for row in order], [float(score_N[row]) for row in order]


def test_a_user_s_recommendations_are_those_of_the_recommender_over_all_items(client: Client, lake: Path) -> None:
    status, answer = client.post("/recommend", user_id="u1", k=7)
    ids, scores = wanted(lake, HISTORY, 7, set(HISTORY))
    assert status == 200 and [item["item_id"] for item in answer["items"]] == ids
    assert np.allclose([item["score"] for item in answer["items"]], scores, atol=1e-4)
    assert (answer["fallback"], answer["history_items"], answer["sequence"]) == (None, 4, 1)


def test_a_history_in_the_request_needs_no_store_and_may_keep_what_was_seen(client: Client, lake: Path) -> None:
    _, answer = client.post("/recommend", history=HISTORY, k=7, exclude_seen=False, exclude=["i199"])
    assert [item["item_id"] for item in answer["items"]] == wanted(lake, HISTORY, 7, {"i199"})[0]


def test_only_the_newest_events_are_read_but_all_are_left_out(client: Client, lake: Path) -> None:
    long = [f"i{number}" for number in range(50)]
    _, answer = client.post("/recommend", history=long, k=5)
    assert [item["item_id"] for item in answer["items"]] == wanted(lake, long[-8:], 5, set(long))[0]


def test_filters_leave_the_best_of_what_they_allow(client: Client, lake: Path) -> None:
    others = {item_id for item_id in item_ids(200) if int(item_id[1:]) % 3 == 2}
    _, answer = client.post("/recommend", history=HISTORY, k=9, filters={"genre": ["A", "B"]}, attributes=["genre", "title"])
    assert [item["item_id"] for item in answer["items"]] == wanted(lake, HISTORY, 9, {*HISTORY, *others})[0]
    assert {item["attributes"]["genre"] for item in answer["items"]} == {"A", "B"}
    assert client.post("/recommend", history=HISTORY, filters={"genre": ["Z"]})[1]["items"] == []
    status, answer = client.post("/recommend", history=HISTORY, filters={"colour": ["red"]})
    assert status == 422 and "no item has an attribute 'colour'" in answer["error"]


def test_a_filter_finds_an_item_by_each_value_of_its_list(client: Client, lake: Path) -> None:
    odd = {item_id for item_id in item_ids(200) if int(item_id[1:]) % 2}
    for body in ({"history": HISTORY}, {"history": []}):
        _, answer = client.post("/recommend", k=100, filters={"tags": ["even"]}, **body)
        assert {item["item_id"] for item in answer["items"]} == set(item_ids(200)) - odd - set(body["history"])
    assert len(client.post("/recommend", history=[], k=200, filters={"tags": ["odd"]})[1]["items"]) == 200, "all hold it"
    assert client.post("/recommend", history=HISTORY, filters={"tags": ["eve"]})[1]["items"] == [], "no part of a value"


def test_who_is_unknown_gets_what_is_popular_and_is_told_so(client: Client) -> None:
    for body, cause in (
        ({"user_id": "nobody"}, "unknown_user"),
        ({"history": []}, "no_known_items"),
        ({"history": ["?"]}, "no_known_items"),
    ):
        status, answer = client.post("/recommend", k=3, **body)
        assert (status, answer["fallback"], answer["history_items"]) == (200, cause, 0)
        assert [item["item_id"] for item in answer["items"]] == ["i0", "i1", "i2"], "most recent events first"


def test_neighbours_are_the_nearest_others_by_dot_product(client: Client) -> None:
    status, answer = client.post("/similar", item_ids=["i7", "nothing"], k=4)
    vector_ND = vectors(1, 200)
    order = [row for row in np.argsort(-(vector_ND @ vector_ND[7])) if row != 7][:4]
    assert status == 200 and [item["item_id"] for item in answer["neighbours"]["i7"]] == [f"i{row}" for row in order]
    assert answer["missing"] == ["nothing"]


def test_vectors_are_the_space_s_bytes(client: Client) -> None:
    _, answer = client.post("/vectors", item_ids=["i9", "nothing", "i2"])
    decoded = np.stack([np.frombuffer(base64.b64decode(text), "<f4") for text in answer["vectors"]])
    assert np.array_equal(decoded, vectors(1, 200)[[9, 2]])
    assert (answer["item_ids"], answer["missing"], answer["deleted"]) == (["i9", "i2"], ["nothing"], [])
    _, answer = client.post("/vectors", item_ids=["i9"], encoding="list")
    assert np.allclose(answer["vectors"], vectors(1, 200)[[9]])


def test_many_at_once_each_get_their_own_answer(client: Client, lake: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    histories = [[f"i{n}" for n in range(start, start + 1 + start % 6)] for start in range(40)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda history: client.post("/recommend", history=history, k=5)[1], histories))
    for history, answer in zip(histories, answers, strict=True):
        assert [item["item_id"] for item in answer["items"]] == wanted(lake, history, 5, set(history))[0]


def test_a_graph_finds_nearly_all_and_scores_are_exact(lake: Path) -> None:
    publish(lake, seed=1, graph=Graph(neighbours=16))
    with serving(lake, exact_numbers=1) as client:
        _, answer = client.post("/recommend", history=HISTORY, k=10)
        ids, scores = wanted(lake, HISTORY, 10, set(HISTORY))
        assert len({item["item_id"] for item in answer["items"]} & set(ids)) >= 9
        known = dict(zip(ids, scores, strict=True))
        assert all(abs(item["score"] - known.get(item["item_id"], item["score"])) < 1e-4 for item in answer["items"])
        _, answer = client.post("/recommend", history=HISTORY, k=10, filters={"genre": ["A"]}, attributes=["genre"])
        assert len(answer["items"]) == 10 and {item["attributes"]["genre"] for item in answer["items"]} == {"A"}
        assert len(client.post("/recommend", history=item_ids(195), k=10)[1]["items"]) == 5, "what is left, also behind many seen"


def test_probes_openapi_and_metrics(client: Client) -> None:
    assert client.get("/healthz") == (200, "ok")
    assert client.get("/readyz")[1]["items"] == 200
    client.post("/recommend", user_id="nobody")
    _, text = client.get("/metrics")
    for line in (
        "llmemb_pointer_sequence 1.0",
        'llmemb_fallbacks_total{cause="unknown_user"}',
        'llmemb_requests_total{endpoint="/recommend",outcome="200"}',
        "llmemb_request_seconds_bucket",
    ):
        assert line in text, line
    _, api = client.get("/openapi.json")
    assert {"/recommend", "/similar", "/vectors", "/healthz", "/readyz", "/metrics"} <= api["paths"].keys()
    assert api["components"]["schemas"]["Recommend"]["examples"]


def test_nothing_is_served_before_the_first_publish_and_all_after_it(lake: Path) -> None:
    with serving(lake, ready=False) as client:
        status, answer, headers = client.ask("/recommend", {"user_id": "u1"})
        assert status == 503 and headers["retry-after"] == "1" and "publish" in answer["error"]
        assert client.get("/readyz")[0] == 503 and client.get("/healthz")[0] == 200
        publish(lake, seed=1)
        client.until(lambda: client.get("/readyz")[0] == 200)


def test_parts_tell_what_each_brought(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from feature_repo.serving import generation

    def in_parts(path: Path) -> Any:
        loaded = load_recommender(path)
        two = (Span(name="collaborative", start=0, stop=10), Span(name="text", start=10, stop=16))
        monkeypatch.setattr(type(loaded), "parts", two)
        return loaded

    monkeypatch.setattr(generation, "load_recommender", in_parts)
    publish(lake, seed=1)
    with serving(lake) as client:
        _, answer = client.post("/recommend", history=HISTORY, explain=True)
        for item in answer["items"]:
            assert item["parts"].keys() == {"collaborative", "text"}
            assert abs(sum(item["parts"].values()) - item["score"]) < 1e-4
        assert "parts" not in client.post("/recommend", history=HISTORY)[1]["items"][0]


@pytest.mark.parametrize(
    "path,body",
    [
        ("/recommend", {"user_id": "u1", "k": 3}),
        ("/recommend", {"history": ["i3", "who"], "explain": True, "attributes": ["title"]}),
        ("/recommend", {"history": ["i3"], "k": 0}),
        ("/recommend", {"history": ["i3"], "filters": {"colour": ["red"]}}),
        ("/similar", {"item_ids": ["i3", "who"], "k": 2}),
        ("/similar", {"item_ids": []}),
        ("/vectors", {"item_ids": ["i3"], "encoding": "list"}),
        ("/vectors", {"item_ids": ["i3"], "encoding": "text"}),
    ],
)
def test_the_short_way_answers_and_refuses_as_the_framework_does(client: Client, path: str, body: dict[str, Any]) -> None:
    # another name of JSON takes the way through the framework
    short, long = (
        client.ask(path, body, **{"Content-Type": kind})[:2] for kind in ("application/json", "application/vnd.a+json")
    )
    for answer in (short[1], long[1]):
        answer.pop("age_s", None)
    assert short == long


def test_a_request_in_order_does_not_reach_the_framework(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.routing import APIRoute

    asked: list[str] = []
    whole = APIRoute.matches

    def seen(self: APIRoute, scope: Any) -> Any:
        asked.append(scope["path"])
        return whole(self, scope)

    monkeypatch.setattr(APIRoute, "matches", seen)
    assert client.post("/similar", item_ids=["i3"])[0] == 200 and asked == []
    assert client.post("/similar", item_ids="i3")[0] == 422 and set(asked) == {"/similar"}


def test_threads_hand_over_soon(client: Client) -> None:
    assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
