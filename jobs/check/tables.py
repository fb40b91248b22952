"""The user's two tables, looked at as they are: columns, ids that meet, the unit of time."""

from __future__ import annotations

import datetime as dt
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from jobs.check.finding import Finding, failure
from jobs.run import InputError

SAMPLE = 20_000
"""Events looked at."""
OLDEST = dt.datetime(1990, 1, 1, tzinfo=dt.UTC)
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}


def look(extract: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings on `[extract.items]` and `[extract.interactions]`; a table that can't be read is one, and hides no other."""
    settings = extract.get("spark", {})
    known: set[str] | None = None
    try:
        known = yield from catalogue(extract["items"], settings)
    except Exception as error:
        yield failure("items", error)
    try:
        yield from logs(extract["interactions"], settings, known)
    except Exception as error:
        yield failure("events", error)


def catalogue(items: Mapping[str, Any], settings: Mapping[str, str]) -> Generator[Finding, None, set[str]]:
    """Findings on the items; gives their ids. Raises InputError for a table or column that is missing."""
    item_id, said = items.get("item_id", "item_id"), items["attributes"]
    # a text alone is no list: the check of the recipe says so, and here its letters are no columns
    attributes = [said] if isinstance(said, str) else list(said)
    rows = head(items["table"], "extract.items.table", [item_id, *attributes], settings, None, only=[item_id])
    ids = texts(rows[item_id])
    yield Finding("ok", "items", f"{items['table']}: {len(ids):,} items, columns {', '.join([item_id, *attributes])}")
    twice = len(ids) - len(set(ids))
    if twice:
        yield Finding(
            "look",
            "items",
            f"{twice:,} records have the item_id of another record: of each item_id the fullest record is kept",
        )
    return set(ids)


def logs(events: Mapping[str, Any], settings: Mapping[str, str], known: set[str] | None) -> Iterator[Finding]:
    """Findings on the events, where the items' ids are `known` on whether they meet. Raises InputError as `catalogue`."""
    user, item, time = (events.get(name, name) for name in ("user_id", "item_id", "timestamp"))
    sample = head(events["table"], "extract.interactions.table", [user, item, time], settings, SAMPLE, only=[user, item, time])
    yield Finding("ok", "events", f"{events['table']}: columns {user}, {item}, {time}")
    if known is not None:
        yield overlap(known, texts(sample[item]))
    yield unit(sample[time], events.get("unit", "s"))


def head(
    table: str, key: str, columns: Sequence[str], settings: Mapping[str, str], rows: int | None, *, only: Sequence[str]
) -> pa.Table:
    """The first `rows` of a table (None for all), `only` these columns; a Parquet path needs no Spark."""
    if "/" in table and Path(table).exists():
        data = ds.dataset(table, format="parquet")
        for column in columns:
            if column not in data.schema.names:
                raise InputError(f"{key} = {table!r} has no column {column!r}; it has {', '.join(data.schema.names)}")
        return data.head(rows, columns=list(only)) if rows else data.to_table(columns=list(only))
    from jobs.engines.spark import session, source

    spark = session("extract", settings)
    found = source(spark, table, key, columns).select(*(f"`{name}`" for name in only))
    return (found.limit(rows) if rows else found).toArrow()


def texts(column: pa.ChunkedArray) -> list[str]:
    """Ids as `extract` compares them."""
    return [str(value).strip() for value in column.drop_null().to_pylist()]


def overlap(known: set[str], met: Sequence[str]) -> Finding:
    """How many events are of items that the catalogue has."""
    share = sum(item in known for item in met) / max(len(met), 1)
    text = f"{share:.1%} of {len(met):,} events in the sample are of an item that the items table has"
    if share >= 0.95:
        return Finding("ok", "overlap of ids", text)
    example = next((item for item in met if item not in known), "none")
    remedy = (
        f"{text}; the events have for example the id {example!r}, the items {min(known, default='none')!r}: both tables must "
        "write an id in the same way"
    )
    return Finding("wrong" if share < 0.5 else "look", "overlap of ids", remedy)


def unit(column: pa.ChunkedArray, said: str) -> Finding:
    """Whether the times make sense in the unit that the recipe says."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_string(column.type)):
        return Finding("ok", "unit of time", f"the column has the type {column.type}, which needs no unit")
    middle = pc.quantile(column.cast(pa.float64(), safe=False), 0.5)[0].as_py()
    fitting = [name for name, count in UNITS.items() if middle is not None and plausible(middle / count)]
    if said in fitting:
        return Finding("ok", "unit of time", f"read in {said}, a typical event is of {moment(middle / UNITS[said])}")
    remedy = (
        f'set extract.interactions.unit = "{fitting[0]}"'
        if fitting
        else "no unit gives a date between 1990 and today; does extract.interactions.timestamp name the column of the time?"
    )
    return Finding("wrong", "unit of time", f"a typical time is {middle!r}, which is no date if read in {said}: {remedy}")


def plausible(seconds: float) -> bool:
    """Whether unix seconds lie between 1990 and tomorrow."""
    now = dt.datetime.now(dt.UTC).timestamp()
    return OLDEST.timestamp() <= seconds <= now + 86_400


def moment(seconds: float) -> str:
    """Unix seconds as a date."""
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d}"
