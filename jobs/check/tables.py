"""The user's two tables, looked at as they are: columns, ids that meet, the unit of time."""

from __future__ import annotations

import datetime as dt
import math
import statistics
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from jobs.check.finding import Finding, failure
from jobs.run import InputError

SAMPLE = 20_000
"""Events looked at."""
MOST_REFUSED = 0.05
"""The default of `extract.max_quarantine_share`."""
OLDEST = dt.datetime(1990, 1, 1, tzinfo=dt.UTC)
UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000}


def look(extract: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings on `[extract.items]` and `[extract.interactions]`; a table that can't be read is one, and hides no other."""
    known: set[str] | None = None
    try:
        known = yield from catalogue(table_of(extract, "items"), extract.get("spark", {}))
    except Exception as error:
        yield failure("items", error)
    try:
        yield from logs(extract, known)
    except Exception as error:
        yield failure("events", error)


def table_of(extract: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table inside `[extract]`. Raises KeyError where it is missing, InputError where it is a value."""
    found = extract[name]
    if not isinstance(found, Mapping):
        raise InputError(f"extract.{name} is {found!r}, no table: write [extract.{name}] and its keys below")
    return found


def catalogue(items: Mapping[str, Any], settings: Mapping[str, str]) -> Generator[Finding, None, set[str]]:
    """Findings on the items; gives their ids. Raises InputError for a table or column that is missing or empty."""
    item_id, said = items.get("item_id", "item_id"), items["attributes"]
    # a text alone is no list: the check of the recipe says so, and here its letters are no columns
    attributes = [said] if isinstance(said, str) else list(said)
    rows = head(items["table"], "extract.items.table", [item_id, *attributes], settings, None, only=[item_id])
    ids = texts(rows[item_id])
    if not ids:
        raise InputError(f"{items['table']} has no row with an {item_id}: extract needs items")
    yield Finding("ok", "items", f"{items['table']}: {len(ids):,} items, columns {', '.join([item_id, *attributes])}")
    twice = len(ids) - len(set(ids))
    if twice:
        yield Finding(
            "look",
            "items",
            f"{twice:,} records have the item_id of another record: of each item_id the fullest record is kept",
        )
    return set(ids)


def logs(extract: Mapping[str, Any], known: set[str] | None) -> Iterator[Finding]:
    """Findings on the events, where the items' ids are `known` on whether they meet. Raises InputError as `catalogue`."""
    events, most = table_of(extract, "interactions"), extract.get("max_quarantine_share", MOST_REFUSED)
    most = most if isinstance(most, float | int) else MOST_REFUSED  # the check of the recipe says what is wrong
    columns = [str(events.get(name, name)) for name in ("user_id", "item_id", "timestamp")]
    if len(set(columns)) < len(columns):
        raise InputError(
            "extract.interactions.user_id, item_id and timestamp are the columns " + ", ".join(columns) + ": name three of them"
        )
    _, item, time = columns
    sample = head(events["table"], "extract.interactions.table", columns, extract.get("spark", {}), SAMPLE, only=columns)
    if not len(sample):
        raise InputError(f"{events['table']} has no rows: extract needs events")
    yield Finding("ok", "events", f"{events['table']}: columns {', '.join(columns)}")
    if known is not None:
        yield overlap(known, texts(sample[item]), most)
    yield unit(sample[time], events.get("unit", "s"), most)


def head(
    table: str, key: str, columns: Sequence[str], settings: Mapping[str, str], rows: int | None, *, only: Sequence[str]
) -> pa.Table:
    """The first `rows` of a table (None for all), `only` these columns; a Parquet path needs no Spark."""
    if "/" in table and Path(table).exists():
        try:
            data = ds.dataset(table, format="parquet")
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{key} = {table!r} cannot be read ({error}): name a Parquet file, or a folder of such, whose columns have "
                "different names"
            ) from error
        if not data.files:
            raise InputError(f"{key} = {table!r} is a folder without a Parquet file: name the folder or file that has the rows")
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


def overlap(known: set[str], met: Sequence[str], most: float = MOST_REFUSED) -> Finding:
    """How many events are of items that the catalogue has; `extract` fails where more than the share `most` are of others."""
    if not met:
        return Finding(
            "wrong", "overlap of ids", "no event in the sample has an item: does extract.interactions.item_id name it?"
        )
    strange = [item for item in met if item not in known]
    text = f"{1 - len(strange) / len(met):.1%} of {len(met):,} events in the sample are of an item that the items table has"
    fails = len(strange) / len(met) > most
    if not fails and len(strange) / len(met) <= MOST_REFUSED:
        return Finding("ok", "overlap of ids", text)
    remedy = (
        f"{text}; the events have for example the id {strange[0]!r}, the items {min(known, default='none')!r}: both tables must "
        "write an id in the same way"
    )
    if fails:
        remedy += f"; extract fails where more than extract.max_quarantine_share = {most} of the events are refused"
    return Finding("wrong" if fails else "look", "overlap of ids", remedy)


def unit(column: pa.ChunkedArray, said: str, most: float = MOST_REFUSED) -> Finding:
    """Whether the times make sense in the unit that the recipe says; `most` of them may be no time, as for `extract`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_date(column.type) or pa.types.is_timestamp(column.type):
        return Finding("ok", "unit of time", f"the column has the type {column.type}, which needs no unit")
    if not readable(column.type):
        return Finding("wrong", "unit of time", f"the column has the type {column.type}, which is no time: name a column of "
                       "dates, timestamps or numbers in extract.interactions.timestamp")  # fmt: skip
    values = column.drop_null().to_pylist()
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if not values:
        return Finding(
            "wrong", "unit of time", "every time in the sample is missing: does extract.interactions.timestamp name it?"
        )
    if len(values) - len(numbers) > most * len(values):
        odd = next(value for value in values if as_number(value) is None)
        return Finding("wrong", "unit of time", f"the column has texts such as {odd!r}, and a text is read as a number: make it "
                       "a column of dates or timestamps, or of numbers")  # fmt: skip
    middle = statistics.median(numbers)
    fitting = [name for name, count in UNITS.items() if plausible(middle / count)]
    if said in fitting:
        return Finding("ok", "unit of time", f"read in {said}, a typical event is of {moment(middle / UNITS[said])}")
    remedy = (
        f'set extract.interactions.unit = "{fitting[0]}"'
        if fitting
        else "no unit gives a date between 1990 and today; does extract.interactions.timestamp name the column of the time?"
    )
    return Finding("wrong", "unit of time", f"a typical time is {middle!r}, which is no date if read in {said}: {remedy}")


def readable(kind: pa.DataType) -> bool:
    """Whether `extract` reads numbers from a column of this type."""
    of = pa.types
    kinds = (of.is_integer, of.is_floating, of.is_decimal, of.is_string, of.is_large_string, of.is_string_view)
    return any(one(kind) for one in kinds)


def as_number(value: object) -> float | None:
    """A number, or a text that holds one; None for what is none."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def plausible(seconds: float) -> bool:
    """Whether unix seconds lie between 1990 and tomorrow."""
    now = dt.datetime.now(dt.UTC).timestamp()
    return OLDEST.timestamp() <= seconds <= now + 86_400


def moment(seconds: float) -> str:
    """Unix seconds as a date."""
    return f"{dt.datetime.fromtimestamp(seconds, dt.UTC):%Y-%m-%d}"
