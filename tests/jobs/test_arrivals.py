"""Items that arrive between two nights: served within the hour, gone from no night, and the next night ends as it would have."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from feature_repo.reader import Reader, settings
from feature_repo.stores import lease, open_writer
from jobs import embed, forget, lookup, project, publish, rat
from jobs.engines import online
from jobs.lake import arrivals, partitions
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.items import content_hash
from jobs.lake.tables import ATTRIBUTES, ITEMS, item_embeddings
from jobs.run import InputError, Refused, Run, Unavailable
from models.behaviour.assembly import Fusion
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from tests.jobs.conftest import WIDTH, vectors
from tests.jobs.embed.test_embed import config as embedding  # noqa: F401 — a fixture
from tests.jobs.embed.test_embed import own_cache as own_cache
from tests.jobs.embed.test_embed import rows
from tests.jobs.publish.test_restore import damaged_after_staging
from tests.jobs.small_lake import DS, ENCODER, embedding_rows, make, remember

A, B = "a" * 16, "b" * 16
FIRST, NEXT = "2026-01-01", "2026-01-02"
Catalogue = Callable[..., Path]


def item_rows(ids: list[str], texts: dict[str, int]) -> pa.Table:
    names = [f"Film {item}, cut {texts.get(item, 0)}" for item in ids]
    columns = {
        "item_id": ids,
        "attributes": pa.array([[{"name": "title", "value": name}] for name in names], ATTRIBUTES),
        "content_hash": [content_hash([("title", name)]) for name in names],
        "first_seen_ds": [FIRST] * len(ids),
    }
    return pa.table(columns, ITEMS.schema)


def arrive(lake: Path, ids: list[str], version: dict[str, int], space: str = A, ds: str = FIRST) -> None:
    """What `extract`, `embed` and `project` leave of items that arrived."""
    table = item_rows(ids, version)
    partitions.write(lake, ARRIVING_ITEMS, f"ds={ds}", [table])
    found = (
        vectors(space, ids, version, table["content_hash"].to_pylist()) if ids else item_embeddings(WIDTH).schema.empty_table()
    )
    partitions.write(lake, arrivals.item_embeddings(WIDTH), f"space={space}/ds={ds}", [found])


def bring(lake: Path, space: str = A, ds: str = FIRST, **more: Any) -> publish.Result:
    return publish.run(publish.Config(run=Run(ds=ds, lake=lake), space=space, **{"lease_wait_s": 0, **more}))


def look(lake: Path) -> lookup.Result:
    return lookup.run(lookup.Config(run=Run(ds=FIRST, lake=lake)))


# ------------------------------------------------------------------------------------------------------------------- served


def test_new_and_changed_items_are_laid_over_what_serves_index_and_attributes_too(catalogue: Catalogue) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["m3", "new"], {"m3": 1})
    result = bring(lake, arriving=True)
    assert (result.kind, result.items, result.written, result.removed, result.verified) == ("delta", 41, 2, 0, 41)
    assert result.attributes_written == 2
    reader = Reader.open(lake)
    wanted = {row["item_id"]: row["embedding"] for row in vectors(A, ["m3", "new"], {"m3": 1}, ["", ""]).to_pylist()}
    answer = reader.vectors(["m3", "new"])
    assert np.array_equal(answer.vector_ND, np.asarray(list(wanted.values()), np.float32))
    assert (answer.pointer.ds, answer.pointer.items, answer.pointer.space_id) == (FIRST, 41, A)
    index = online.open_index(lake, answer.pointer.space)
    assert index.attributes_of(index.item_ids.index("m3")) == {"title": "Film m3, cut 1"}
    assert np.array_equal(index.vector_ND[index.item_ids.index("new")], np.asarray(wanted["new"], np.float32))
    assert look(lake).compared == 41


def test_what_spark_wrote_takes_what_arrived(catalogue: Catalogue) -> None:
    lake = catalogue()
    pair = pa.struct([pa.field("name", pa.string(), nullable=False), pa.field("value", pa.string())])
    strict = pa.field("attributes", pa.list_(pa.field("element", pair, nullable=False)), nullable=False)
    rows = partitions.read(lake, ITEMS, f"ds={FIRST}").to_pylist()
    file = partitions.folder(lake, "items", f"ds={FIRST}") / ".spark.parquet"
    pq.write_table(pa.Table.from_pylist(rows, ITEMS.schema.set(1, strict)), file)
    partitions.commit_files(lake, "items", f"ds={FIRST}", [file])
    bring(lake)
    arrive(lake, ["m3", "new"], {"m3": 1})
    assert bring(lake, arriving=True).items == 41


def test_an_hour_that_does_not_verify_says_that_its_rows_serve(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = catalogue()
    bring(lake)
    before = Reader.open(lake).pointer()
    arrive(lake, ["m3", "new"], {"m3": 1})
    damaged_after_staging(monkeypatch, 1)
    with pytest.raises(
        Refused, match=r"'m7' is different.* serves with what arrived since, the rows of this publish among"
    ) as told:
        bring(lake, arriving=True)
    assert "as before" not in str(told.value)
    monkeypatch.undo()
    reader = Reader.open(lake)
    answer = reader.vectors(["m3", "new", "m7"])
    wanted = vectors(A, ["m3", "new", "m7"], {"m3": 1}, ["", "", ""])["embedding"].to_pylist()
    assert np.array_equal(answer.vector_ND, np.asarray(wanted, np.float32)) and answer.pointer == before
    again = bring(lake, arriving=True)
    assert (again.kind, again.written, again.items, again.attributes_written) == ("delta", 0, 41, 2)
    assert look(lake).compared == 41


def test_the_hour_run_again_does_nothing_and_takes_back_what_went(catalogue: Catalogue) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["m3", "new"], {"m3": 1})
    bring(lake, arriving=True)
    assert bring(lake, arriving=True).kind == "nothing to do"
    arrive(lake, [], {})
    result = bring(lake, arriving=True)
    assert (result.items, result.written, result.removed) == (40, 1, 1)
    assert look(lake).compared == 40


def state(lake: Path) -> tuple[Any, ...]:
    """The lake's tables of the nights, what is online, and the index of what serves."""
    reader = Reader.open(lake)
    pointer = reader.pointer()
    ids = [f"m{number}" for number in range(45)] + ["new"]
    tables = {
        path.relative_to(lake).as_posix(): path.read_bytes()
        for name in ("items", "item_embeddings", "sequences")
        for path in (lake / name).rglob("*.parquet")
    }
    attributes = reader.transport.read("item_attributes", {"item_id": ids}, ["content_hash"])
    rows = [raw for _, raw in reader.rows(pointer.space, ids)]
    return tables, rows, [values for _, values in attributes][:41], dataclasses.replace(pointer.space), pointer.index


def test_the_next_night_ends_as_it_would_have_without_the_hours(catalogue: Catalogue, tmp_path: Path) -> None:
    lake = catalogue()
    bring(lake)
    shutil.copytree(lake, tmp_path / "twin")
    arrive(lake, ["m3", "m4", "m40", "new"], {"m3": 1, "m4": 7})
    bring(lake, arriving=True)
    # by night m4 is what it was, m40 came to stay, and `new` left again
    night = {"ds": NEXT, "ids": [f"m{number}" for number in range(41)], "version": {"m3": 1}}
    catalogue(**night)
    shutil.copytree(lake / "items" / f"ds={NEXT}", tmp_path / "twin" / "items" / f"ds={NEXT}")
    shutil.copytree(lake / "sequences" / f"ds={NEXT}", tmp_path / "twin" / "sequences" / f"ds={NEXT}")
    shutil.copytree(
        lake / "item_embeddings" / f"space={A}" / f"ds={NEXT}",
        tmp_path / "twin" / "item_embeddings" / f"space={A}" / f"ds={NEXT}",
    )
    for place in (lake, tmp_path / "twin"):
        bring(place, ds=NEXT)
    assert state(lake) == state(tmp_path / "twin")
    assert look(lake).compared == 41


def test_a_night_published_again_starts_without_what_arrived(catalogue: Catalogue) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["new"], {})
    bring(lake, arriving=True)
    assert bring(lake).removed == 1
    assert Reader.open(lake).vectors(["new"]).missing == ["new"]
    assert look(lake).compared == 40


def test_a_night_that_is_refused_leaves_what_arrived_where_it_serves(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["new"], {})
    bring(lake, arriving=True)
    with monkeypatch.context() as once, pytest.raises(Refused, match="too many changed"):
        once.setattr(publish, "check_compatibility", refusing)
        bring(lake)
    assert look(lake).compared == 41


def refusing(*given: Any) -> Any:
    raise Refused("too many changed")


@pytest.mark.parametrize("how", ["another space", "another date"])
def test_where_a_night_was_faster_the_hour_does_nothing(catalogue: Catalogue, how: str) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["new"], {})
    space, ds = (B, FIRST) if how == "another space" else (A, NEXT)
    bring(catalogue(space=space, ds=ds), space=space, ds=ds)
    before = Reader.open(lake).pointer()
    result = bring(lake, arriving=True)
    assert (result.kind, result.written) == ("superseded", 0)
    assert Reader.open(lake).pointer() == before
    assert Reader.open(lake).vectors(["new"]).missing == ["new"]


@pytest.mark.parametrize("how", ["another space", "another date"])
def test_where_a_night_is_faster_while_the_hour_looks_at_its_rows_it_does_nothing(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A promotion publishes another space of the same date: the hour must not bring the old one back."""
    lake = catalogue()
    bring(lake)
    arrive(lake, ["new"], {})
    space, ds = (B, FIRST) if how == "another space" else (A, NEXT)
    honest, nights = publish.inspected, iter([1])

    def inspected(config: publish.Config, *given: Any) -> Any:
        if config.arriving and next(nights, 0):
            bring(catalogue(space=space, ds=ds), space=space, ds=ds)
        return honest(config, *given)

    monkeypatch.setattr(publish, "inspected", inspected)
    assert bring(lake, arriving=True).kind == "superseded"
    serves = Reader.open(lake).pointer()
    assert (serves.space_id, serves.ds) == (space, ds)


def test_beside_a_night_that_holds_the_lease_the_hour_comes_again(catalogue: Catalogue) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["new"], {})
    with lease(open_writer(settings(lake)), "publish"), pytest.raises(Unavailable, match="another writer holds the lease"):
        bring(lake, arriving=True)
    assert bring(lake, arriving=True).written == 1


def test_killed_before_the_flip_and_run_again_it_ends_the_same(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["m3", "new"], {"m3": 1})
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(publish.spaces, "flip", interrupted)
        bring(lake, arriving=True)
    assert Reader.open(lake).pointer().items == 40
    assert bring(lake, arriving=True).kind == "delta"
    assert look(lake).compared == 41


def interrupted(*given: Any) -> Iterator[Any]:
    raise KeyboardInterrupt


def test_what_is_forgotten_is_forgotten_of_what_arrived_too(catalogue: Catalogue) -> None:
    lake = catalogue()
    bring(lake)
    arrive(lake, ["m3", "new"], {"m3": 1})
    bring(lake, arriving=True)
    result = forget.run(forget.Config(run=Run(ds=FIRST, lake=lake), item="new", lease_wait_s=0))
    assert (result.left_online, result.left_in_lake) == (0, [])
    assert look(lake).compared == 40
    assert "new" not in online.open_index(lake, Reader.open(lake).pointer().space).item_ids


# ------------------------------------------------------------------------------------------------------- embed and project


def test_only_texts_without_an_embedding_are_embedded_and_no_night_sees_them(embedding: embed.Config) -> None:  # noqa: F811
    lake, ds = embedding.run.lake, embedding.run.ds
    embed.run(embedding)
    known = partitions.read(lake, ITEMS, f"ds={ds}").slice(0, 1)
    partitions.write(lake, ARRIVING_ITEMS, f"ds={ds}", [pa.concat_tables([known, item_rows(["new"], {})])])
    before = rows(embedding)
    hour = dataclasses.replace(embedding, arriving=True)
    assert (embed.run(hour).embedded, embed.run(hour).embedded) == (1, 0)
    assert rows(embedding).equals(before)
    partitions.write(
        lake, ITEMS, f"ds={ds}", [pa.concat_tables([partitions.read(lake, ITEMS, f"ds={ds}"), item_rows(["new"], {})])]
    )
    assert embed.run(embedding).embedded == 1, "the night embeds it for itself"


def test_what_arrived_is_projected_by_the_recommender_that_serves(tmp_path: Path) -> None:
    run = make(tmp_path)
    backbone = Backbone(width=8, max_len=6)
    trained = rat.run(rat.Config(run=run, teacher="none", hidden=16, backbone=backbone, fusion=Fusion(parts=("llmemb",)),
                                 training=Training(epochs=1, batch=8)))  # fmt: skip
    remember(run, "rat", trained)
    night = project.run(project.Config(run=run, recommender="latest"))
    table = item_rows(["i00", "new"], {"i00": 5})
    partitions.write(run.lake, ARRIVING_ITEMS, f"ds={DS}", [table])
    with pytest.raises(InputError, match="2 of 2 items have no embedding"):
        project.run(project.Config(run=run, recommender="latest", arriving=True))
    texts = embedding_rows(table["content_hash"].to_pylist())
    partitions.write(run.lake, arrivals.llm_embeddings(12), f"encoder={ENCODER}/ds={DS}", [texts])
    hour = project.run(project.Config(run=run, recommender="latest", arriving=True))
    assert (hour.space_id, hour.rows) == (night.space_id, {"arriving_embeddings": 2})
    assert hour.groups["head"] + hour.groups["tail"] == 1 and hour.groups["cold"] == 1
    found = partitions.read(run.lake, arrivals.item_embeddings(8), f"space={hour.space_id}/ds={DS}")
    assert torch.tensor(found["embedding"].to_pylist()).isfinite().all()
    again = partitions.read_commit(run.lake, "item_embeddings", f"space={night.space_id}/ds={DS}")
    assert again.digest == night.outputs["item_embeddings"]
