"""A new pointer serves within a second, no answer mixes two generations, and what is forgotten is gone at once."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_repo import spaces
from feature_repo.index import Foreign, Index, digest_of
from feature_repo.reader import Reader, settings
from feature_repo.serving import artifacts, watch
from feature_repo.serving.settings import Settings
from feature_repo.stores import lease, open_writer
from tests.feature_repo.serving.world import Client, item_ids, publish, serving, vectors

HISTORY = ["i3", "i5", "i8"]


def top(client: Client, **more: Any) -> tuple[int, list[str]]:
    _, answer = client.post("/recommend", history=HISTORY, k=5, **more)
    return answer["sequence"], [item["item_id"] for item in answer["items"]]


def test_a_new_space_serves_after_the_pointer_moved_and_back_after_a_rollback(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake) as client:
        _, first = top(client)
        publish(lake, seed=2)
        client.until(lambda: top(client)[0] == 2)
        assert top(client)[1] != first
        store = open_writer(settings(lake))
        with lease(store, "test"):
            spaces.rollback(store, Reader.open(lake))
        client.until(lambda: top(client)[0] == 3)
        assert top(client)[1] == first


def test_a_delta_inside_a_space_is_a_new_generation(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake) as client:
        publish(lake, seed=1, count=210, ds="2026-01-02")
        client.until(lambda: client.get("/readyz")[1]["items"] == 210)
        assert client.get("/readyz")[1]["ds"] == "2026-01-02"


def test_no_answer_of_many_flips_under_load_is_wrong_or_mixed(lake: Path) -> None:
    pointers = {publish(lake, seed=seed).space_id: seed for seed in (1, 2)}
    tables = {space_id: vectors(seed, 200) for space_id, seed in pointers.items()}
    wrong: list[str] = []
    counts = dict.fromkeys(tables, 0)
    over = threading.Event()

    def load(client: Client) -> None:
        while not over.is_set():
            status, answer = client.post("/similar", item_ids=["i7", "i9"], k=3)
            if status != 200:
                wrong.append(str(status))
                continue
            table = tables[answer["space_id"]]
            counts[answer["space_id"]] += 1
            for item_id, near in answer["neighbours"].items():
                query = table[int(item_id[1:])]
                for item in near:
                    if abs(float(query @ table[int(item["item_id"][1:])]) - item["score"]) > 1e-3:
                        wrong.append(item_id)

    with serving(lake) as client:
        threads = [threading.Thread(target=load, args=(client,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        store, reader = open_writer(settings(lake)), Reader.open(lake)
        with lease(store, "test", 5):
            for _ in range(20):
                sequence = spaces.rollback(store, reader).sequence
                client.until(lambda sequence=sequence: client.service.watch.current.pointer.sequence == sequence)
        over.set()
        for thread in threads:
            thread.join()
    assert wrong == [] and all(counts.values())


def test_a_forgotten_item_is_gone_before_the_index_is_built_anew(lake: Path) -> None:
    publish(lake, seed=1)
    with serving(lake) as client:
        gone = top(client)[1][0]
        store, reader = open_writer(settings(lake)), Reader.open(lake)
        with lease(store, "test"):
            spaces.withhold(store, reader, gone)
            spaces.forget(store, gone, "2026-01-01")
        client.until(lambda: gone not in top(client)[1], seconds=2)
        assert client.post("/vectors", item_ids=[gone, "i4"])[1]["deleted"] == [gone]
        assert client.post("/similar", item_ids=[gone])[1]["missing"] == [gone]
        assert gone not in json.dumps(client.post("/recommend", history=[], k=200)[1]["items"]), "nor among what is popular"
        assert client.post("/recommend", history=[gone], k=3)[1]["fallback"] == "no_known_items", "nor read in a history"
        filtered = client.post("/recommend", history=HISTORY, k=200, filters={"genre": ["A", "B", "C"]})[1]["items"]
        assert gone not in {item["item_id"] for item in filtered}
        publish(lake, seed=1, ids=[item_id for item_id in item_ids(200) if item_id != gone], ds="2026-01-02")
        client.until(lambda: client.get("/readyz")[1]["ds"] == "2026-01-02")
        assert client.get("/readyz")[1]["items"] == 199
        assert reader.pointer().withheld == (), "the pointer keeps no name of it"


def test_a_generation_that_can_t_be_loaded_leaves_the_old_one(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "AGAIN_S", 0.5)
    publish(lake, seed=1)
    with serving(lake) as client:
        _, first = top(client)
        pointer = publish(lake, seed=2, ds="2026-01-01")
        client.until(lambda: top(client)[0] == 2)
        home = lake / "indexes" / f"space={pointer.space_id}" / f"ds={pointer.ds}" / pointer.index[:16]
        publish(lake, seed=1)
        client.until(lambda: top(client)[0] == 3)
        with (home / "vectors.npy").open("r+b") as stream:
            stream.seek(-4, 2)
            stream.write(np.float32(7).tobytes())
        store, reader = open_writer(settings(lake)), Reader.open(lake)
        with lease(store, "test"):
            spaces.rollback(store, reader)
        client.until(lambda: 'llmemb_generation_loads_total{outcome="failed"}' in client.get("/metrics")[1])
        assert top(client) == (3, first)
        with (home / "vectors.npy").open("r+b") as stream:
            stream.seek(-4, 2)
            stream.write(vectors(2, 200)[-1, -1:].tobytes())
        client.until(lambda: top(client)[0] == 4)


@pytest.mark.parametrize("cache", [False, True])
def test_an_index_of_other_vectors_is_refused(lake: Path, tmp_path: Path, cache: bool) -> None:
    from feature_repo.index import Graph

    one, other = publish(lake, seed=1, graph=Graph()), publish(lake, seed=2, graph=Graph())
    chosen = Settings(artifacts=str(lake), cache=str(tmp_path / "cache") if cache else "")
    assert len(artifacts.open_index(chosen, other)) == 200
    homes = [lake / "indexes" / f"space={p.space_id}" / f"ds={p.ds}" / p.index[:16] for p in (one, other)]
    shutil.copy(homes[0] / "graph.faiss", tmp_path / "graph.faiss")
    swapped = tmp_path / "swapped"
    shutil.copytree(homes[1], swapped)
    shutil.copy(homes[0] / "graph.faiss", swapped / "graph.faiss")
    with pytest.raises(Foreign, match="was not built of these vectors"):
        Index(swapped).check()
    shutil.copy(homes[0] / "vectors.npy", homes[1] / "vectors.npy")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    with pytest.raises(Foreign, match="its bytes were changed"):
        artifacts.open_index(chosen, other)
    with pytest.raises(Foreign, match="belongs to"):
        Index(homes[0]).check(space_id=other.space_id)


def test_artifacts_are_fetched_once_verified_and_old_ones_leave_the_cache(lake: Path, tmp_path: Path) -> None:
    pointer = publish(lake, seed=1)
    cache = tmp_path / "cache"
    with serving(lake, cache=str(cache)) as client:
        assert top(client)[0] == 1
        found = list(cache.glob("*/indexes/space=*/ds=*/*"))
        assert [digest_of(folder) for folder in found] == [pointer.index]
        publish(lake, seed=2)
        client.until(lambda: top(client)[0] == 2)
        client.until(lambda: len(list(cache.glob("*/indexes/space=*/ds=*/*"))) == 1)


def test_the_digest_is_the_lake_s(tmp_path: Path) -> None:
    from jobs.lake.partitions import digest_folder

    for name in ("b", "a/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert digest_of(tmp_path) == digest_folder(tmp_path)


def test_a_forgotten_item_is_gone_also_while_another_index_is_being_read(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(lake, seed=1)
    read_on, real = threading.Event(), watch.load

    def slow(*arguments: Any) -> Any:
        assert read_on.wait(30)
        return real(*arguments)

    with serving(lake) as client:
        monkeypatch.setattr(watch, "load", slow)
        publish(lake, seed=2)
        _, first = top(client)
        store = open_writer(settings(lake))
        with lease(store, "test"):
            spaces.withhold(store, Reader.open(lake), first[0])
        client.until(lambda: first[0] not in top(client)[1], seconds=5)
        assert top(client)[0] == 1, "the old space still"
        read_on.set()
        client.until(lambda: top(client)[0] > 1)
        assert client.post("/similar", item_ids=[first[0]])[1]["missing"] == [first[0]], "nor in the new one"
