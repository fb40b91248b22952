"""bench_encoder's rows run to their end on a small model and made-up logs, before a GPU is paid for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarks import bench_encoder
from tests.models import tiny

ITEMS, USERS = 50, 60
DECODERS = ("zero_both", "pairs_white_both", "darec", "titles", "titles_slow")
"""Rows for bases that write."""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fifty items, and sixty users who each had eight."""
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    items: dict[str, list[Any]] = {
        "item_id": [f"i{number}" for number in range(ITEMS)],
        "title": [f"film {number * 7919}" for number in range(ITEMS)],
        "brand": ["ab"[number % 2] for number in range(ITEMS)],
        "categories": [["x", "y"][: number % 3] for number in range(ITEMS)],
        "price": [f"{number}.5" for number in range(ITEMS)],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    events = [(f"u{user}", f"i{item}", time) for user in range(USERS) for time, item in enumerate(random.permutation(ITEMS)[:8])]
    columns = zip(("user_id", "item_id", "timestamp"), zip(*events, strict=True), strict=True)
    pq.write_table(pa.table({name: list(values) for name, values in columns}), folder / "interactions.parquet")
    return folder


def tune(data: Path, base: Path, rows: list[str]) -> dict[str, Any]:
    options = ["--steps", "4", "--batch", "8", "--teacher-epochs", "1", "--teacher-width", "8", "--device", "cpu"]
    given = ["tune", "--data", str(data), "--out", str(data / "out"), "--base", str(base), "--rows", ",".join(rows), *options]
    return bench_encoder.tune(bench_encoder.parse(given))


def test_every_row_tunes_an_encoder_and_all_are_compared(data: Path) -> None:
    rows = list(bench_encoder.ROWS)
    found = tune(data, tiny.llama(data / "base", tie_word_embeddings=True), rows)
    assert {row: found[row]["error"] for row in rows if "error" in found[row]} == {}
    for row in rows:
        assert "worth" in found[row] or not bench_encoder.ROWS[row].get("steps", 1)
    table = bench_encoder.compare(bench_encoder.parse(["compare", "--data", str(data), "--encoded", str(data / "out"),
                                                       "--device", "cpu"]))  # fmt: skip
    assert {f"{row} whitened" for row in rows} <= table["ndcg"].keys()


def test_a_base_that_attends_both_ways_has_the_rows_that_suit_it_and_names_the_others(data: Path) -> None:
    rows = ["zero", "views_white", "pairs_white", "suffix_pairs", "teacher", "p2rec", *DECODERS]
    found = tune(data, tiny.bert(data / "base"), rows)
    assert {row for row in rows if "error" in found[row]} == set(DECODERS)
    for row in DECODERS:
        assert "ways" in found[row]["error"]
