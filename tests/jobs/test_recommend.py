"""Recommend: history from the store, the recommender that fits the space that serves, neighbours from its index."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from feature_repo.reader import Reader, open_store
from jobs import publish, recommend
from jobs.engines import online
from jobs.lake import artifacts
from jobs.run import InputError, Run
from models.behaviour.artifact import load_recommender

DS = "2026-01-01"


@pytest.fixture
def lake(catalogue: Callable[..., Path], trained: Callable[[Path], tuple[str, str]]) -> Path:
    space_id, _ = trained(catalogue())
    lake = catalogue(space=space_id)
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=space_id))
    return lake


def config(lake: Path, user: str | int = "u1", **more: Any) -> recommend.Config:
    return recommend.Config(run=Run(ds=DS, lake=lake, device="cpu"), user=user, **more)


def test_the_items_are_the_best_by_dot_product_and_none_was_seen(lake: Path) -> None:
    result = recommend.run(config(lake, k=5))
    recommender = load_recommender(artifacts.find(lake, "recommender", result.recommender_id))
    rows = dict(zip(*rows_of(lake, result.space_id), strict=True))
    history = torch.stack([rows[f"m{number}"] for number in range(5)])[None]
    user_D = recommender.encode(history, torch.ones(1, 5, dtype=torch.bool))[0]
    scores = {item: float(user_D @ vector) for item, vector in rows.items() if item not in {f"m{n}" for n in range(5)}}
    assert result.item_ids == sorted(scores, key=lambda item: -scores[item])[:5]
    assert result.scores == pytest.approx([scores[item] for item in result.item_ids], abs=1e-4)
    assert result.titles[0] == f"Film {result.item_ids[0]}, cut 0"
    assert (result.history_items, len(result.recent)) == (5, 5)


def rows_of(lake: Path, space_id: str) -> tuple[list[str], torch.Tensor]:
    ((ids, emb_ND),) = online.chunks(lake, online.partition_of(space_id, DS), 100)
    return list(ids), torch.from_numpy(emb_ND.copy())


def test_the_approximate_index_finds_the_same_in_a_small_catalogue(lake: Path) -> None:
    exact, found = recommend.run(config(lake)), recommend.run(config(lake, index="approximate"))
    assert found.item_ids == exact.item_ids
    assert found.recall == 1.0


def test_a_pushed_history_comes_before_the_lakes(lake: Path) -> None:
    pushed(lake, "new", ["m7", "m8"])
    result = recommend.run(config(lake, user="new"))
    assert result.recent == ["Film m7, cut 0", "Film m8, cut 0"]
    assert not {"m7", "m8"} & set(result.item_ids)


def test_more_than_the_catalogue_gives_what_there_is(lake: Path) -> None:
    assert len(recommend.run(config(lake, k=1000)).item_ids) == 35
    assert len(recommend.run(config(lake, k=1000, exclude_seen=False)).item_ids) == 40


def test_an_unknown_user_is_refused_without_repeating_the_id(lake: Path) -> None:
    with pytest.raises(InputError, match="has no history") as caught:
        recommend.run(config(lake, user="secret-user-77"))
    assert "secret-user-77" not in str(caught.value)


def test_no_user_id_is_logged(lake: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommend.run(config(lake))
    printed = capsys.readouterr()
    assert "recommended next" in printed.err
    assert "u1" not in printed.err + printed.out


def pushed(lake: Path, user: str, items: list[str]) -> None:
    rows: dict[str, Any] = {"user_id": [user], "item_ids": [items], "timestamps": [list(range(len(items)))]}
    rows["event_timestamp"] = [pd.Timestamp("2026-01-02", tz="UTC")]
    open_store(lake).push("user_history_push", pd.DataFrame(rows))


def test_fewer_than_one_item_is_refused(lake: Path) -> None:
    with pytest.raises(InputError, match=r"recommend\.k is 0: ask for at least one item"):
        recommend.run(config(lake, k=0))


def test_a_history_none_of_whose_items_is_online_is_refused(lake: Path) -> None:
    pushed(lake, "new", ["nowhere", "gone"])
    with pytest.raises(InputError, match="no item of the user's history is in the space that serves"):
        recommend.run(config(lake, user="new"))


def test_a_space_whose_recommender_is_nowhere_is_refused(lake: Path, catalogue: Callable[..., Path]) -> None:
    catalogue(space="a" * 16)
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space="a" * 16))
    with pytest.raises(InputError, match=f"no recommender of the lake makes space {'a' * 16}, which serves: fetch its artifact"):
        recommend.run(config(lake))


def test_a_recommender_that_is_gone_from_the_lake_is_refused(lake: Path) -> None:
    shutil.rmtree(lake / "models" / "recommender")
    with pytest.raises(InputError, match="fetch it from the registry first"):
        recommend.run(config(lake))


def test_a_space_without_its_index_is_refused(lake: Path) -> None:
    online.drop_index(online.index_home(lake, Reader.open(lake).pointer().space))
    with pytest.raises(InputError, match=r"has no index for 2026-01-01 .*run `python -m jobs publish` for it"):
        recommend.run(config(lake))


def test_a_space_that_begins_to_serve_meanwhile_is_refused(
    lake: Path, catalogue: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    history = recommend.history_of

    def flipped(*given: Any) -> list[str]:
        catalogue(space="b" * 16)
        publish.run(publish.Config(run=Run(ds=DS, lake=lake), space="b" * 16))
        return history(*given)

    monkeypatch.setattr(recommend, "history_of", flipped)
    with pytest.raises(InputError, match="another space began to serve meanwhile: run recommend again"):
        recommend.run(config(lake))


def test_before_the_first_publish_the_remedy_is_named(catalogue: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="jobs publish"):
        recommend.run(config(catalogue()))
