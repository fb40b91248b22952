"""MovieLens-100k -> Spark tables, as a user's catalogue would hold them: something real to try everything on."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pyarrow as pa

from jobs.engines.spark import session
from jobs.lake.partitions import digest_file
from jobs.run import InputError, Run

log = logging.getLogger(__name__)

FOLDER = "recbole/dataset_example/ml-100k"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Where the data set is and where it goes."""

    run: Run
    wheel: Path
    """The recbole 1.2.1 wheel, which carries MovieLens-100k: `pip download --no-deps recbole==1.2.1`."""
    database: str = "movielens"
    """Spark database that receives the tables `items` and `ratings`."""
    spark: dict[str, str] = field(default_factory=dict)
    """Spark settings, as for `extract`."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was loaded."""

    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Writes the tables `DATABASE.items` and `DATABASE.ratings`, replacing what was there.

    Raises InputError when the wheel is absent or holds no MovieLens.
    """
    if not config.wheel.exists():
        raise InputError(f"{config.wheel} does not exist: fetch it with `pip download --no-deps recbole==1.2.1`")
    tables = {"items": items(read(config.wheel, "item")), "ratings": ratings(read(config.wheel, "inter"))}
    spark = session("movielens", config.spark)
    spark.sql(f"CREATE DATABASE IF NOT EXISTS {config.database}")
    outputs: dict[str, str] = {}
    for name, frame in tables.items():
        rows = spark.createDataFrame(pa.Table.from_pandas(frame, preserve_index=False))
        rows.coalesce(1).write.mode("overwrite").format("parquet").saveAsTable(f"{config.database}.{name}")
        outputs[f"{config.database}.{name}"] = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()
        log.info("%s.%s: %s rows", config.database, name, f"{len(frame):,}")
    spark.stop()
    counts = {f"{config.database}.{name}": len(frame) for name, frame in tables.items()}
    return Result(inputs={"wheel": digest_file(config.wheel)}, outputs=outputs, rows=counts)


def read(wheel: Path, kind: str) -> pd.DataFrame:
    """One of the data set's files; its header names are `name:type`."""
    try:
        text = zipfile.ZipFile(wheel).read(f"{FOLDER}/ml-100k.{kind}")
    except (KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel} holds no {FOLDER}: it must be the recbole 1.2.1 wheel") from error
    # a quotation mark is a letter here: one without its second would swallow the lines up to the next
    frame = pd.read_csv(io.BytesIO(text), sep="\t", dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    return frame.rename(columns={name: name.split(":")[0] for name in frame.columns})


def items(frame: pd.DataFrame) -> pd.DataFrame:
    """movie_id, title, release_year and genres (a list) of each film; what is unknown is empty."""
    return pd.DataFrame(
        {
            "movie_id": frame["item_id"],
            "title": frame["movie_title"],
            "release_year": frame["release_year"],
            "genres": [text.split() for text in frame["class"]],
        }
    )


def ratings(frame: pd.DataFrame) -> pd.DataFrame:
    """user_id, movie_id, rating and rated_at (unix seconds) of each rating."""
    return pd.DataFrame(
        {
            "user_id": frame["user_id"],
            "movie_id": frame["item_id"],
            "rating": frame["rating"].astype(float),
            "rated_at": frame["timestamp"].astype(int),
        }
    )
