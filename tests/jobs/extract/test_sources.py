"""Names of tables in a recipe, as Spark takes them: as of a time, and files in backticks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs import extract
from jobs.engines.spark import session, source
from jobs.report import openlineage
from jobs.run import InputError
from tests.jobs.extract.small_spark import shared
from tests.jobs.extract.test_extract import CATALOGUE, LOGS, config, event_table, item_table


@pytest.fixture(scope="module", autouse=True)
def one_session() -> Iterator[None]:
    with shared({}):
        yield


@pytest.mark.parametrize(
    ("table", "version", "when"),
    [
        ("shop.items TIMESTAMP AS OF '2026-03-10 23:59:59'", None, "2026-03-10 23:59:59"),
        ("lake.shop.items timestamp as  of '2026-03-10'", None, "2026-03-10"),
        ("shop.items VERSION AS OF 'night-2026-03-10'", "night-2026-03-10", None),
        ("delta.`s3a://shop/films` VERSION AS OF 3", "3", None),
        ("`my shop`.items VERSION AS OF 0", "0", None),
    ],
)
def test_spark_s_own_parser_takes_a_table_as_of_a_time_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch, table: str, version: str | None, when: str | None
) -> None:
    """No Delta or Iceberg is here to read from: what reaches them is the plan of this statement."""
    spark, parsed = session("test", {}), list[Any]()
    parser = spark._jsparkSession.sessionState().sqlParser()
    monkeypatch.setattr(SparkSession, "sql", lambda self, text: parsed.append(parser.parsePlan(text)) or self.range(1))
    source(spark, table, "extract.items.table", ["id"])
    relation = parsed[0].children().head()
    assert (parsed[0].nodeName(), relation.nodeName()) == ("Project", "RelationTimeTravel")
    assert str(relation.timestamp()) == (f"Some({when})" if when else "None")
    assert str(relation.version()) == (f"Some({version})" if version else "None")


def test_a_table_as_of_a_time_is_asked_for_as_spark_writes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spark, asked = session("test", {}), list[str]()
    monkeypatch.setattr(SparkSession, "sql", lambda self, text: asked.append(text) or self.range(1))
    source(spark, "shop.items TIMESTAMP AS OF '2026-03-10 23:59:59'", "extract.items.table", ["id"])
    source(spark, "shop.items version as of 'night-2026-03-10'", "extract.items.table", ["id"])
    assert asked == [
        "SELECT * FROM shop.items TIMESTAMP AS OF '2026-03-10 23:59:59'",
        "SELECT * FROM shop.items version AS OF 'night-2026-03-10'",
    ]
    with pytest.raises(InputError, match="names no file system: write file:///films in the backticks"):
        source(spark, "delta.`/films` VERSION AS OF 3", "extract.items.table", ["id"])
    source(spark, "delta.`s3a://shop/films` VERSION AS OF 3", "extract.items.table", ["id"])
    assert asked[-1] == "SELECT * FROM delta.`s3a://shop/films` VERSION AS OF 3"


def test_files_in_backticks_are_read_in_their_format_and_named_in_lineage(tmp_path: Path) -> None:
    items, events = item_table(tmp_path / "i.parquet", CATALOGUE), event_table(tmp_path / "e.parquet", LOGS)
    result = extract.run(config(tmp_path, f"parquet.`file://{items}`", f"  parquet.`file://{events}` "))
    assert (result.rows["items"], result.rows["interactions"]) == (5, 20)
    (tmp_path / "shop.csv").write_text("id,name\n7,seven\n")
    rows = source(session("test", {}), f"csv.`file://{tmp_path}/shop.csv`", "extract.items.table", [])
    assert rows.count() == 2, "a line each, by the reader of another format"
    named = {openlineage.data_set(written, "llmemb") for written in result.inputs}
    assert named == {("file", str(items)), ("file", str(events))}


@pytest.mark.parametrize("table", ["parquet.`/films`", " parquet.`/films` ", "delta.`/films` VERSION AS OF 3", "`/films`"])
def test_files_in_backticks_that_could_mean_two_places_are_refused(table: str) -> None:
    with pytest.raises(InputError, match="names no file system: write file:///films in the backticks"):
        source(session("test", {}), table, "extract.items.table", ["id"])
