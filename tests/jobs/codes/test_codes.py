"""codes: append-only, a version a refit, numbers that tell items of equal codes apart, and rows online beside the vectors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo.codes import read_codes
from feature_repo.reader import Reader
from jobs import codes, publish
from jobs.codes import coding
from jobs.lake import artifacts, partitions
from jobs.lake.items import bury, content_hash
from jobs.lake.tables import ITEM_CODES, ITEMS, item_embeddings
from jobs.run import InputError, Run
from models.behaviour.codes import Codes, load_books
from tests.jobs.conftest import WIDTH, Catalogue, vectors
from tests.jobs.small_lake import remember

Trained = Callable[[Path], tuple[str, str]]
ROOT = Path(__file__).parents[3]
SMALL = Codes(books=2, entries=4, epochs=3, batch=16)
IDS = [f"m{number}" for number in range(40)]


@dataclasses.dataclass
class World:
    """A lake with a space that can be coded."""

    run: Run
    space: str
    recommender: str
    write: Catalogue

    def codes(self, **more: Any) -> codes.Result:
        known = {"recommender": self.recommender, "training": SMALL, "publish": False, "controls": False}
        config = codes.Config(run=self.run, **{**known, **more})
        result = codes.run(config)
        remember(self.run, "codes", result)
        return result

    def rows(self, result: codes.Result) -> dict[str, tuple[list[int], int]]:
        table = partitions.read(self.run.lake, ITEM_CODES, f"books={result.books_id}/ds={self.run.ds}")
        return {row["item_id"]: (row["codes"], row["number"]) for row in table.to_pylist()}

    def day(self, ds: str, **more: Any) -> World:
        self.write(ds=ds, space=self.space, **more)
        return dataclasses.replace(self, run=dataclasses.replace(self.run, ds=ds))


@pytest.fixture
def world(catalogue: Catalogue, trained: Trained, tmp_path: Path) -> World:
    space, recommender = trained(tmp_path / "lake")
    catalogue(space=space)
    return World(Run(ds="2026-01-01", lake=tmp_path / "lake", device="cpu"), space, recommender, catalogue)


def test_every_item_has_codes_of_its_own(world: World) -> None:
    result = world.codes()
    rows = world.rows(result)
    assert sorted(rows) == sorted(IDS)
    assert len({(*code, number) for code, number in rows.values()}) == len(IDS)
    assert (result.new, result.kept, result.changed, result.refit, result.source) == (40, 0, 0, True, f"space {world.space}")
    assert result.report["collisions"]["share"] > 0  # 40 items, 16 codes: numbers do tell them apart


def test_what_is_appended_leaves_published_codes_bit_by_bit(world: World) -> None:
    first = world.codes()
    before = world.rows(first)
    later = world.day("2026-01-02", ids=[*IDS[:-1], *(f"a{number}" for number in range(30))], version={"m3": 1})
    second = later.codes()
    after = later.rows(second)
    assert second.books_id == first.books_id and not second.refit
    assert (second.new, second.changed, second.kept) == (30, 1, 38)
    assert "m39" not in after
    assert all(after[item] == before[item] for item in before if item not in ("m3", "m39"))
    assert len({(*code, number) for code, number in after.values()}) == len(after)


def test_a_new_item_does_not_get_the_number_of_one_that_has_just_left(world: World) -> None:
    first = world.rows(world.codes())
    number = first["m39"][1]
    twins = [item for item, (codes_, _) in first.items() if codes_ == first["m39"][0]]
    later = world.day("2026-01-02", ids=[item for item in IDS if item != "m39"] + ["zz"])
    # zz has m39's vector
    rows = partitions.read(later.run.lake, item_embeddings(WIDTH), f"space={world.space}/ds=2026-01-02")
    known = vectors(world.space, ["m39"], {}, ["0" * 32])
    place = rows["item_id"].to_pylist().index("zz")
    values = [*rows["embedding"].to_pylist()[:place], known["embedding"][0].as_py()]
    embedding = pa.chunked_array([pa.array(values, rows["embedding"].type)])
    assert place == rows.num_rows - 1
    rows = rows.set_column(2, "embedding", embedding)
    partitions.write(later.run.lake, item_embeddings(WIDTH), f"space={world.space}/ds=2026-01-02", [rows])
    found = later.rows(later.codes())["zz"]
    assert found[0] == first["m39"][0]
    assert found[1] == max(first[item][1] for item in twins) + 1 > number


def test_a_rerun_leaves_the_same_bytes_and_books(world: World) -> None:
    first = world.codes()
    assert world.codes().outputs == first.outputs
    assert world.codes(refit=True).outputs == first.outputs
    later = world.day("2026-01-02", ids=[*IDS, "new"])
    assert later.codes().outputs == later.codes().outputs


def test_a_refit_is_a_new_version_with_a_report_and_the_old_one_stays(world: World) -> None:
    first = world.codes()
    before = world.rows(first)
    later = world.day("2026-01-02", version=dict.fromkeys(IDS, 5), texts={})
    second = later.codes(refit=True, controls=True)
    assert second.books_id != first.books_id and second.refit and second.new == 40
    assert second.report["moved"]["items"] == 40 and 0 < second.report["moved"]["share"] <= 1
    assert {"books", "pq", "rq", "usage", "collisions"} <= set(second.report)
    assert second.report["bits"] == 4
    assert all(0 <= second.report[kind]["recall_at_10"] <= 1 for kind in ("books", "pq", "rq"))
    assert world.rows(first) == before


def test_books_of_another_space_are_refused_by_name(world: World) -> None:
    first = world.codes()
    home = artifacts.find(world.run.lake, "books", first.books_id)
    text = (home / "books.json").read_text().replace(f"space {world.space}", "encoder beef")
    (home / "books.json").write_text(text)
    with pytest.raises(InputError, match=rf"books {first.books_id} are of encoder beef, these vectors of space {world.space}"):
        world.codes()
    assert world.codes(refit=True).source == f"space {world.space}"


def test_books_that_are_not_there_and_vectors_that_are_not_there_are_refused(world: World) -> None:
    with pytest.raises(InputError, match="books 0000 is not in the lake"):
        world.codes(books="0000")
    with pytest.raises(InputError, match=r"item_embeddings/space=.*/ds=2026-02-01 is not in the lake"):
        dataclasses.replace(world, run=dataclasses.replace(world.run, ds="2026-02-01")).codes()


def test_too_few_items_are_refused_by_count(world: World) -> None:
    with pytest.raises(ValueError, match="40 items have 40 different vectors, a book has 64 entries"):
        world.codes(training=dataclasses.replace(SMALL, entries=64))


def test_passes_change_no_code(world: World) -> None:
    whole = world.rows(world.codes())
    assert world.rows(world.codes(refit=True, pass_items=7)) == whole


def test_what_was_forgotten_is_not_coded(world: World) -> None:
    bury(world.run.lake, "m5", world.run.ds)
    result = world.codes()
    assert "m5" not in world.rows(result) and result.rows == {"item_codes": 39}


def test_codes_tell_of_the_category_that_is_asked_for(world: World) -> None:
    pairs = [[{"name": "title", "value": item}, {"name": "kind", "value": f"{place % 3}, x"}] for place, item in enumerate(IDS)]
    hashes = [content_hash([(pair["name"], pair["value"]) for pair in one]) for one in pairs]
    rows = {"item_id": IDS, "attributes": pairs, "content_hash": hashes, "first_seen_ds": ["2026-01-01"] * 40}
    partitions.write(world.run.lake, ITEMS, "ds=2026-01-01", [pa.table(rows, ITEMS.schema)])
    told = world.codes().report["category"]
    assert told["attribute"] == "kind"
    assert len(told["information"]) == 2 and all(0 <= value <= 1 for value in told["information"])


def test_codes_stand_online_beside_the_vectors_of_the_space_that_serves(world: World) -> None:
    with pytest.raises(InputError):
        world.codes(publish=True)
    published = {"run": world.run, "space": world.space, "approximate": False}
    publish.run(publish.Config(**published))  # type: ignore[arg-type]
    result = world.codes(publish=True)
    assert result.published == 40
    online = read_codes(Reader.open(world.run.lake), world.space, IDS)
    rows = world.rows(result)
    assert [one for one in online if one] == [(*rows[item], result.books_id) for item in IDS]
    assert world.codes(publish=True).published == 0
    later = world.day("2026-01-02", ids=[*IDS[:-1], "new"])
    publish.run(publish.Config(**{**published, "run": later.run}))  # type: ignore[arg-type]
    assert later.codes(publish=True).published == 1
    assert [row is None for row in read_codes(Reader.open(world.run.lake), world.space, ["m39", "new"])] == [True, False]


def test_a_consumer_reads_codes_by_feast_alone_and_turns_them_back_into_vectors_as_the_page_says(world: World) -> None:
    """docs/family.md's own lines, in a process of their own that needs nothing of the jobs, and no model code."""
    publish.run(publish.Config(run=world.run, space=world.space, approximate=False))
    result = world.codes(publish=True)
    (lines,) = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs" / "family.md").read_text())
    said, asked = 'lake, items = Path("shop/lake"), ["movie-1", "movie-2"]', ["m7", "m30", "m2"]
    assert said in lines
    tell = "import json, sys; print(json.dumps([books_id, read['codes'], read['number'], vector_ND.tolist(), [*sys.modules]]))"
    text = lines.replace(said, f"lake, items = Path({str(world.run.lake)!r}), {asked}") + tell
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    books_id, codes_, numbers, vectors_, modules = json.loads(done.stdout.splitlines()[-1])
    rows = world.rows(result)
    assert books_id == result.books_id
    assert list(zip(codes_, numbers, strict=True)) == [rows[item] for item in asked]
    assert not {"jobs", "models"} & set(modules)
    model, _ = load_books(artifacts.find(world.run.lake, "books", result.books_id))
    read_ND = model.decode(torch.tensor([rows[item][0] for item in asked]))
    np.testing.assert_allclose(vectors_, read_ND.numpy(), atol=1e-5)
    assert len(np.unique(read_ND.numpy().round(3), axis=0)) > 1


def test_numbers_go_on_from_those_that_were_given() -> None:
    before = coding.as_rows(pa.table({"item_id": ["a", "b"], "content_hash": ["h", "h"]}), np.array([[1, 1], [1, 1]], np.int32),
                            np.array([0, 4], np.int32), "x")  # fmt: skip
    now = pa.table({"item_id": pa.chunked_array([["a", "c", "d", "e"]])})
    code_NK = np.array([[1, 1], [1, 1], [2, 2], [1, 1]], np.int32)
    assert coding.numbered(code_NK, now, before).tolist() == [0, 5, 0, 6]
