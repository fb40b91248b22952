"""What the report shows of the vectors: samples, maps and neighbours are those of the lake's tables."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import report
from jobs.lake import nights, partitions
from jobs.lake.items import bury
from jobs.lake.tables import item_embeddings, llm_embeddings
from jobs.report import maps
from jobs.report.spaces import spaces_of
from jobs.run import Run
from models.text.lora import Lora
from tests.jobs.report.small_night import BASE, DS, ENCODER, GENRES, SPACE, shown, tell, whole_night
from tests.models import tiny


def test_neighbours_shown_are_those_of_the_vectors(tmp_path: Path) -> None:
    whole_night(tmp_path)
    config = report.Config(run=Run(ds=DS, lake=tmp_path), base_items=0)
    views, layers, _ = report.look(config, spaces_of(tmp_path, nights.read_night(tmp_path, DS), ()))
    assert views is not None
    assert [example.group for example in views.examples] == ["head", "head", "tail", "tail", "cold", "cold"]
    served = next(layer.vectors for layer in layers if layer.name == "Served")
    texts = next(layer.vectors for layer in layers if layer.name == "After SCFT")
    titles = dict(zip(views.sample.item_ids, views.sample.titles, strict=True))
    mean = np.stack(list(texts.values())).mean(0)

    def cosine(one: str, other: str) -> float:
        a, b = texts[one] - mean, texts[other] - mean
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for example in views.examples:
        others = [item for item in served if item != example.item_id]
        by_dot = sorted(others, key=lambda item: -float(served[item] @ served[example.item_id]))[:5]
        by_cosine = sorted(others, key=lambda item: -cosine(item, example.item_id))[:5]
        assert example.columns["Served"] == [(item, titles[item]) for item in by_dot]
        assert example.columns["After SCFT"] == [(item, titles[item]) for item in by_cosine]


def test_vectors_in_clusters_of_their_genre_are_told_as_pure_and_random_ones_as_chance(tmp_path: Path) -> None:
    whole_night(tmp_path)
    config = report.Config(run=Run(ds=DS, lake=tmp_path), base_items=0)
    views, _, _ = report.look(config, spaces_of(tmp_path, nights.read_night(tmp_path, DS), ()))
    assert views is not None
    assert views.attribute == "genre"
    assert set(views.categories) == set(GENRES)
    for found in views.maps:
        assert found.purity is not None
        assert found.chance is not None
        assert found.purity > 0.9
        assert 0.25 < found.chance < 0.4
    random = np.random.default_rng(0)
    purity, chance = maps.purity(random.normal(size=(300, 8)).astype(np.float32), random.integers(0, 3, 300))
    assert purity is not None
    assert chance is not None
    assert abs(purity - chance) < 0.05


@pytest.mark.parametrize("count", [1, 11])
def test_a_catalogue_of_a_few_items_is_drawn(tmp_path: Path, count: int) -> None:
    whole_night(tmp_path, count=count)
    result, html = tell(tmp_path)
    assert result.state == "good"
    assert html.count("<circle") == 3 * count
    assert "can't be drawn" not in html


def test_items_that_are_all_alike_are_drawn(tmp_path: Path) -> None:
    whole_night(tmp_path)
    rows = partitions.read(tmp_path, item_embeddings(8), f"space={SPACE}/ds={DS}")
    same = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8 * 40, np.float32)), 8)
    partitions.write(tmp_path, item_embeddings(8), f"space={SPACE}/ds={DS}", [rows.set_column(2, "embedding", same)])
    result, _ = tell(tmp_path)
    assert result.drift[f"served {SPACE}.rank"] == 1.0


def test_the_base_model_is_asked_for_its_map_where_no_encoder_without_lora_has_run(tmp_path: Path) -> None:
    whole_night(tmp_path)
    shutil.rmtree(tmp_path / "llm_embeddings" / f"encoder={BASE}")
    spec = tiny.encoder(tiny.llama(tmp_path / "base"), lora=Lora()).spec
    described = json.dumps(dataclasses.asdict(spec))
    (tmp_path / "models" / "encoder" / ENCODER / "encoder.json").write_text(described)
    _, html = tell(tmp_path, base_items=15)
    assert html.count("<circle") == 15 + 40 + 40
    assert "Map of 15 items: Base LLM" in html


def test_a_base_model_that_is_gone_costs_its_map_not_the_page(tmp_path: Path) -> None:
    whole_night(tmp_path)
    shutil.rmtree(tmp_path / "llm_embeddings" / f"encoder={BASE}")
    result, html = tell(tmp_path, base_items=15)
    assert result.state == "good"
    assert "Base LLM is not shown: the base model could not be asked" in html
    assert html.count("<circle") == 80


def test_a_large_catalogue_is_sampled_alike_in_every_table_and_says_so(tmp_path: Path) -> None:
    whole_night(tmp_path, count=400)
    _, html = tell(tmp_path, map_items=100, pool_items=200)
    text = shown(html)
    drawn = int(re.search(r"a sample of (\d+) of 400 items, taken by content hash", text)[1])  # type: ignore[index]
    assert 60 < drawn < 140
    assert html.count("<circle") == 3 * drawn
    assert "among a sample of 200 of 400 items" in text


def test_forgotten_items_are_not_shown(tmp_path: Path) -> None:
    whole_night(tmp_path)
    bury(tmp_path, "i7", DS)
    assert 'Film 7"' not in tell(tmp_path)[1]


def test_shares_of_the_maps_are_compared_on_the_items_that_all_of_them_show(tmp_path: Path) -> None:
    whole_night(tmp_path)
    rows = partitions.read(tmp_path, llm_embeddings(12, "float32"), f"encoder={BASE}/ds={DS}")
    partitions.write(tmp_path, llm_embeddings(12, "float32"), f"encoder={BASE}/ds={DS}", [rows.slice(0, 15)])
    views, _, _ = report.look(
        report.Config(run=Run(ds=DS, lake=tmp_path), base_items=0),
        spaces_of(tmp_path, nights.read_night(tmp_path, DS), ()),
    )
    assert views is not None
    assert [(len(found.places), found.compared) for found in views.maps] == [(15, 15), (40, 15), (40, 15)]
    assert len({found.chance for found in views.maps}) == 1
