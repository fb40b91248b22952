"""Two DataFrames in, embeddings, recommendations and metrics out: the jobs of a night, in a temporary lake of this process.

    from jobs.frames import recommend_from_frames
    answer = recommend_from_frames(items, events)

For a look at your data in a notebook. Nothing is registered or served; for that, write a recipe (`python -m jobs new`).
"""

from __future__ import annotations

import importlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs import logs
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.items import titles
from jobs.lake.tables import SEQUENCES, item_embeddings
from jobs.recipe import SHARED, build, config_of
from jobs.run import InputError, Refused, Run, as_json
from models.behaviour.artifact import Loaded, load_recommender

JOBS = ("extract", "scft", "embed", "pretrain", "rat", "evaluate", "project")
SPARK = {
    "spark.master": "local[2]",
    "spark.sql.shuffle.partitions": "2",
    # starts quickly and compiles little: frames that fit into this process are few rows to Spark
    "spark.driver.defaultJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
}
RUN_KEYS = ("device", "seed", "exclude_seen")
"""What `settings` may say of the run; its date and lake follow from the frames, and nothing is registered."""
TIMES = ("timestamp", "datetime")
"""Names of the time's column, the first that there is; RecTools calls it `datetime`."""
UNITS = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
"""What a number that is no unix second may be, and by what it must be divided."""
OLDEST_S, NEWEST_S = 631_152_000, 4_102_444_800
"""1990 and 2100 in unix seconds: larger numbers are of another unit if they then lie between the two."""
FEW_DAYS = 10
"""Logs of fewer days are split by each user's last two events, not by time."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of it."""

    embeddings: pd.DataFrame
    """A row an item: item_id, group (cold, tail, head), embedding (a list of float32)."""
    recommendations: pd.DataFrame
    """Rows user_id, rank (from 1), item_id, title, score; items that the user had are left out."""
    metrics: pd.DataFrame
    """Rows model, slice, metric, value on events held out, counting baselines among the models."""


def recommend_from_frames(
    items: pd.DataFrame,
    events: pd.DataFrame,
    *,
    k: int = 10,
    base: str = "embedded",
    settings: Mapping[str, Any] | None = None,
) -> Answer:
    """Embeds the items by the LLM as it is, trains a recommender on the events, and measures it.

    `items` has item_id and attribute columns, the most telling first; `events` has user_id, item_id and timestamp or datetime (a
    date, or unix seconds). `settings` are keys of a recipe, such as {"rat.training.epochs": 20}. A Spark session of this process
    is ended. Logs go to standard error, as of the command line.
    Raises InputError for a column or an id that is missing, a time that is none, a setting that no job here has, or data that
    can't be split; ValueError as the jobs do.
    """
    check(items, events, k)
    items = items.assign(item_id=as_ids(items, "items", "item_id"))
    seconds = as_seconds(events[time_of(events)])
    events = pd.DataFrame({name: as_ids(events, "events", name) for name in ("user_id", "item_id")}).assign(timestamp=seconds)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        recipe = recipe_of(home, items, events, base)
        for key, value in (settings or {}).items():
            place(recipe, key, value)
        ds = f"{pd.Timestamp(int(seconds.max()), unit='s'):%Y-%m-%d}"
        run = build(Run, {"ds": ds, "lake": home / "lake", **recipe.get("run", {})}, "run")
        # all before the first job: a key that the last one refuses would be told after minutes
        configs = {job: config_of(recipe, job, run) for job in JOBS}
        try:
            results = {job: work(job, config) for job, config in configs.items()}
        except (InputError, Refused) as error:
            error.args = (without_folder(str(error), home),)
            raise
        return answered(run, results, k)


def check(items: pd.DataFrame, events: pd.DataFrame, k: int) -> None:
    """Raises InputError for what is missing."""
    for name, frame in (("items", items), ("events", events)):
        if not isinstance(frame, pd.DataFrame):
            raise InputError(f"{name} is a {type(frame).__name__}, no DataFrame: give a pandas.DataFrame of it")
        if twice := sorted({str(column) for column in frame.columns[frame.columns.duplicated()]}):
            raise InputError(f"{name} has several columns named {', '.join(twice)}: rename all but one")
    for name, frame, columns in (("items", items, ["item_id"]), ("events", events, ["user_id", "item_id", time_of(events)])):
        for column in columns:
            if column not in frame.columns:
                raise InputError(f"{name} has no column {column!r}; it has {', '.join(map(str, frame.columns))}: rename one")
    if len(items.columns) < 2:
        raise InputError("items has no attribute beside item_id: give at least a title")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise InputError(f"k is {k!r}: give a whole number of at least 1")
    if not len(events):
        raise InputError("there are 0 events: give events")


def as_ids(frame: pd.DataFrame, name: str, column: str) -> pd.Series[Any]:
    """A column of ids as texts: 7 and 7.0 are one, since pandas makes floats of numbers beside a missing value.

    Raises InputError where one is missing: as text it would be an item called `nan`.
    """
    ids = frame[column]
    if missing := int(ids.isna().sum()):
        raise InputError(f"{name}: {missing:,} of {len(ids):,} values of {column} are missing: leave such rows out, by "
                         f"{name}.dropna(subset=[{column!r}])")  # fmt: skip
    if pd.api.types.is_float_dtype(ids) and bool((ids == ids.round()).all()):
        ids = ids.astype("int64")
    return ids.astype(str)


def time_of(events: pd.DataFrame) -> str:
    """The name of the time's column, as it would be where there is none."""
    return next((name for name in TIMES if name in events.columns), TIMES[0])


def as_seconds(times: pd.Series[Any]) -> pd.Series[Any]:
    """Unix seconds of dates, texts of dates, or numbers of seconds. Raises InputError for what is none of them, or missing."""
    times = times.infer_objects()  # numbers may come as objects
    name = times.name or TIMES[0]
    if not pd.api.types.is_numeric_dtype(times):
        times = as_dates(times, name)
    if missing := int(times.isna().sum()):
        raise InputError(f"events: {missing:,} of {len(times):,} values of {name} are missing: leave such events out, by "
                         f"events.dropna(subset=[{name!r}])")  # fmt: skip
    if not pd.api.types.is_numeric_dtype(times):
        return times.astype("datetime64[s, UTC]").astype("int64")
    newest = float(times.max())
    if newest > NEWEST_S:
        for unit, count in UNITS.items():
            if OLDEST_S <= newest / count <= NEWEST_S:
                raise InputError(f"events: {name} {newest:.0f} looks like {unit}: divide by {count}, as unix seconds are wanted")
        raise InputError(f"events: {name} {newest:g} is no time in unix seconds: give dates or unix seconds")
    return times.astype("int64")


def as_dates(times: pd.Series[Any], name: object) -> pd.Series[Any]:
    """Dates of texts or dates, UTC. Raises InputError with the first that is none."""
    try:
        return pd.to_datetime(times, utc=True)
    except (ValueError, TypeError, OverflowError) as error:
        odd = times[pd.to_datetime(times, utc=True, errors="coerce").isna() & times.notna()]
        value = f"{odd.iloc[0]!r}, which is no date or not of the others' form" if len(odd) else f"what is no date ({error})"
        raise InputError(f"events: {name} has {value}: write all like 2026-01-31 12:00:00, or give unix seconds") from error


def without_folder(text: str, home: Path) -> str:
    """A complaint without the folder that is gone when it is read: the tables are the caller's frames."""
    text = re.sub(rf"[;,]? they lie in {re.escape(str(home))}\S*", "", text)
    for name in ("items", "events"):
        text = text.replace(f"{home}/{name}.parquet", name)
    return text.replace(str(home), "a folder that is gone")


def recipe_of(home: Path, items: pd.DataFrame, events: pd.DataFrame, base: str) -> dict[str, Any]:
    """Writes the two tables and names them in a recipe of defaults that suit a small machine."""
    for name, frame in (("items", items), ("events", events)):
        pq.write_table(as_table(frame, name), home / f"{name}.parquet")
    days = (events["timestamp"] // 86_400).nunique()
    training = {"epochs": 40, "patience": 5, "batch": 64, "loss": "full"}
    return {
        "extract": {
            "items": {"table": f"{home}/items.parquet", "attributes": [str(name) for name in items.columns if name != "item_id"]},
            "interactions": {"table": f"{home}/events.parquet"},
            "split": "temporal" if days >= FEW_DAYS else "leave_one_out",
            "spark": SPARK,
        },
        "scft": {"base": base, "max_tokens": 128, "training": {"steps": 0}},
        "embed": {"encoder": "latest"},
        "backbone": {"dropout": 0.3, "max_len": 50},
        # each its own: a setting of one is none of the other
        "pretrain": {"training": dict(training)},
        "rat": {"training": dict(training)},
        "project": {"recommender": "latest"},
    }


def as_table(frame: pd.DataFrame, name: str) -> pa.Table:
    """The frame as Arrow has it. Raises InputError with the column that holds values of several types."""
    columns = {}
    for column in frame.columns:
        try:
            columns[str(column)] = pa.array(frame[column], from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise InputError(
                f"{name}: the values of {column} are of several types ({error}): make them one, by "
                f"{name}[{column!r}] = {name}[{column!r}].astype(str)"
            ) from error
    return pa.table(columns)


def place(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value where its dotted key says. Raises InputError for a key of no job that runs here."""
    job, *path = str(key).split(".")
    if not path or job not in ("run", *SHARED, *JOBS):
        raise InputError(f"settings has {key!r}: write JOB.KEY, of one of run, {', '.join([*SHARED, *JOBS])}")
    if job == "run" and path[0] not in RUN_KEYS:
        raise InputError(f"settings has {key!r}: of run only {', '.join(RUN_KEYS)} can be set here")
    table = recipe.setdefault(job, {})
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise InputError(f"settings has {key!r}: {name} is a value, not a table")
    table[path[-1]] = value


def work(job: str, config: Any) -> Any:
    """Runs a job as the command line would, its manifest kept for the next one."""
    run = config.run
    logs.start(job, run.ds)
    with logs.SignsOfLife(job):
        result = importlib.import_module(f"jobs.{job}").run(config)
    manifest = {"job": job, "ds": run.ds, "status": "done", "result": as_json(result)}
    manifests.append(run.lake, run.ds, job, manifest)
    return result


def answered(run: Run, results: Mapping[str, Any], k: int) -> Answer:
    """The jobs' outputs as frames."""
    project = results["project"]
    table = partitions.read(run.lake, item_embeddings(project.width), f"space={project.space_id}/ds={run.ds}")
    emb_ND = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, project.width)
    item_ids = table["item_id"].to_pylist()
    recommender = load_recommender(artifacts.find(run.lake, "recommender", project.recommender_id))
    return Answer(
        embeddings=pd.DataFrame({"item_id": item_ids, "group": table["group"].to_pylist(), "embedding": list(emb_ND)}),
        recommendations=recommendations(run, recommender, item_ids, emb_ND, k),
        metrics=pd.DataFrame(
            [
                {"model": model, "slice": part, "metric": metric, "value": value}
                for model, slices in results["evaluate"].values.items()
                for part, values in slices.items()
                for metric, value in values.items()
            ]
        ),
    )


def recommendations(run: Run, recommender: Loaded, item_ids: list[str], emb_ND: npt.NDArray[np.float32], k: int) -> pd.DataFrame:
    """The k best items of every user: the dot product of the user's vector with the items', as the online store answers."""
    row = {item_id: number for number, item_id in enumerate(item_ids)}
    names = titles(run.lake, run.ds, item_ids)
    found: list[dict[str, Any]] = []
    for batch in partitions.scan(run.lake, SEQUENCES, f"ds={run.ds}", ("user_id", "item_ids")):
        for user in batch.to_pylist():
            had = [row[item_id] for item_id in user["item_ids"]]
            emb_1LD = torch.from_numpy(emb_ND[had[-recommender.backbone.max_len :]])[None]
            user_D = recommender.encode(emb_1LD, torch.ones(emb_1LD.shape[:2], dtype=torch.bool)).float().numpy()[0]
            score_N = emb_ND @ user_D
            score_N[had] = -np.inf
            best = [at for at in np.argsort(-score_N, kind="stable")[:k] if np.isfinite(score_N[at])]
            found += [
                {"user_id": user["user_id"], "rank": rank, "item_id": item_ids[at], "title": names[item_ids[at]],
                 "score": float(score_N[at])}
                for rank, at in enumerate(best, start=1)
            ]  # fmt: skip
    return pd.DataFrame(found, columns=["user_id", "rank", "item_id", "title", "score"])
