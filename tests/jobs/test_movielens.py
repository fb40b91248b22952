"""movielens: the data set of the wheel becomes two Spark tables that `extract` reads as a user's own."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs import extract, movielens
from jobs.__main__ import build
from jobs.engines.spark import session
from jobs.lake import partitions
from jobs.lake.partitions import digest_file
from jobs.lake.tables import ITEMS, SEQUENCES
from jobs.run import InputError, Run

DS = "1998-04-22"
FILMS = [
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
    "1\tToy Story\t1995\tAnimation Children's Comedy",
    "2\tGoldenEye\t1995\tAction Thriller",
    '3\t"Quoted\t\t',
]
STARS = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"] + [
    f"{user}\t{film}\t{film + 1}\t{878_000_000 + 86_400 * (user + film)}" for user in (7, 8) for film in (1, 2, 3)
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Spark with a warehouse of its own; `run` may not stop the session that these tests share."""
    home = tmp_path_factory.mktemp("spark")
    wanted = {
        "spark.master": "local[1]", "spark.sql.shuffle.partitions": "2", "spark.sql.warehouse.dir": str(home / "warehouse"),
    }  # fmt: skip
    if (left := SparkSession.getActiveSession()) is not None:
        left.stop()
    with pytest.MonkeyPatch.context() as patch:
        spark = session("test", wanted)
        patch.setattr(SparkSession, "stop", lambda self: self.catalog.clearCache())
        yield wanted
    spark.stop()


def wheel(path: Path, films: list[str] = FILMS, folder: str = movielens.FOLDER) -> Path:
    """A wheel that holds the data set as recbole's does."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{folder}/ml-100k.item", "\n".join(films) + "\n")
        file.writestr(f"{folder}/ml-100k.inter", "\n".join(STARS) + "\n")
    return path


def loaded(tmp_path: Path, settings: dict[str, str], where: Path) -> movielens.Result:
    run = Run(ds=DS, lake=tmp_path / "lake", device="cpu")
    return movielens.run(movielens.Config(run=run, wheel=where, database="films", spark=settings))


def test_the_tables_hold_the_data_set_and_a_second_load_replaces_them(tmp_path: Path, settings: dict[str, str]) -> None:
    result = loaded(tmp_path, settings, wheel(tmp_path / "recbole.whl"))
    assert result.rows == {"films.items": 3, "films.ratings": 6}
    assert result.inputs == {"wheel": digest_file(tmp_path / "recbole.whl")}
    spark = session("test", settings)
    items = {row.movie_id: row for row in spark.table("films.items").collect()}
    assert (items["1"].title, items["1"].release_year) == ("Toy Story", "1995")
    assert items["1"].genres == ["Animation", "Children's", "Comedy"]
    assert (items["3"].title, items["3"].release_year, items["3"].genres) == ('"Quoted', "", [])
    ratings = {(row.user_id, row.movie_id): row for row in spark.table("films.ratings").collect()}
    assert (ratings["7", "2"].rating, ratings["7", "2"].rated_at) == (3.0, 878_000_000 + 86_400 * 9)
    again = loaded(tmp_path, settings, tmp_path / "recbole.whl")
    assert again == result
    other = loaded(tmp_path, settings, wheel(tmp_path / "other.whl", FILMS[:3]))
    assert other.rows["films.items"] == 2 and other.outputs["films.items"] != result.outputs["films.items"]
    assert other.outputs["films.ratings"] == result.outputs["films.ratings"]
    assert session("test", settings).table("films.items").count() == 2


def test_extract_reads_them_as_a_user_s_own_tables(tmp_path: Path, settings: dict[str, str]) -> None:
    loaded(tmp_path, settings, wheel(tmp_path / "recbole.whl"))
    names = {
        "items": {"table": "films.items", "item_id": "movie_id", "attributes": ["title", "release_year", "genres"]},
        "interactions": {"table": "films.ratings", "item_id": "movie_id", "timestamp": "rated_at"},
    }
    run = {"ds": DS, "lake": str(tmp_path / "lake")}
    config = build(extract.Config, {"run": run, **names, "spark": settings, "split": "leave_one_out"}, "extract")
    assert extract.run(config).rows == {"items": 3, "interactions": 6, "sequences": 2, "quarantine": 0}
    items = {row["item_id"]: row["attributes"] for row in partitions.read(tmp_path / "lake", ITEMS, f"ds={DS}").to_pylist()}
    assert items["2"][-1] == {"name": "genres", "value": "Action, Thriller"}
    assert items["3"] == [{"name": "title", "value": '"Quoted'}]
    assert partitions.read(tmp_path / "lake", SEQUENCES, f"ds={DS}")["item_ids"].to_pylist() == [["1", "2", "3"]] * 2


def test_a_wheel_that_is_absent_or_another_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not exist: fetch it with `pip download --no-deps recbole==1\.2\.1`"):
        loaded(tmp_path, {}, tmp_path / "absent.whl")
    with pytest.raises(InputError, match=r"must be the recbole 1\.2\.1 wheel"):
        loaded(tmp_path, {}, wheel(tmp_path / "strange.whl", folder="elsewhere"))
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(InputError, match=r"must be the recbole 1\.2\.1 wheel"):
        loaded(tmp_path, {}, tmp_path / "text.whl")
