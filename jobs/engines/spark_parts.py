"""Spark's rows <-> parts of a lake on an object store, by the executors' own Python: no jar, no disk that all machines share.

Each task writes one Parquet file with pyarrow, puts it under a name made of its place and its digest, and tells the driver. A
task that runs twice puts the same bytes under the same name. Executors need pyarrow, obstore, and leave to put: a role of their
machine, or variables of their own. Where the store is, and the few modules of ours that they run, the driver sends to them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.lake import ranged
from jobs.lake.remote import Entry, part_name
from jobs.lake.store import Store
from jobs.run import InputError, Unavailable

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

GROUP_BYTES = 64 << 20
"""Of a row group in memory, about: bounds a task."""
SENT = ("__init__", "run", "redaction", "lake/__init__", "lake/place", "lake/store", "lake/ranged", "lake/leases", "lake/remote",
        "engines/__init__", "engines/spark_parts")  # fmt: skip
"""Our modules that an executor runs: they load without torch, pydantic or Spark's Java side."""
WHERE = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ALLOW_HTTP")
"""Variables that say where a store is. Those that let one in are not sent: they would lie in every task."""
TOLD = re.compile(r"^\s*jobs\.run\.(Unavailable|InputError): (.+)$", re.MULTILINE)
Batches = Iterator[pa.RecordBatch]
SENDING = threading.Lock()
"""Tables are written side by side."""


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """What the store refused or failed at in a task, as the driver would have told it; all else as Spark tells it."""
    from pyspark.errors import PythonException

    try:
        yield
    except PythonException as error:
        if (told := TOLD.search(str(error))) is None:
            raise
        raise {"Unavailable": Unavailable, "InputError": InputError}[told[1]](told[2]) from error


def put(rows: DataFrame, address: str, prefix: str, schema: pa.Schema) -> list[Entry]:
    """Puts each Spark partition of sorted rows as one part below a prefix; gives the parts with rows and digests, in order."""
    send(rows.sparkSession)
    told = rows.mapInArrow(putting(address, prefix, schema), "number int, name string, rows long, sha256 string").collect()
    return [
        {"name": one.name, "rows": int(one["rows"]), "sha256": one.sha256} for one in sorted(told, key=lambda one: one.number)
    ]


def read(spark: SparkSession, address: str, keys: Sequence[str], schema: pa.Schema) -> DataFrame:
    """Rows of the files with these keys: one task a file, its columns read by ranges."""
    from pyspark.sql.pandas.types import from_arrow_schema

    send(spark)
    return spark.range(0, len(keys), 1, max(1, len(keys))).mapInArrow(
        reading(address, tuple(keys), schema), from_arrow_schema(schema)
    )


def putting(address: str, prefix: str, schema: pa.Schema) -> Callable[[Batches], Batches]:
    """What a task does with its rows."""

    def work(batches: Batches) -> Batches:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        with tempfile.TemporaryDirectory() as aside:
            path = Path(aside, "part.parquet")
            if rows := written(batches, path, schema):
                with path.open("rb") as stream:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                name = part_name(context.partitionId(), sha256)
                Store(address).put(f"{prefix}/{name}", path)
                yield pa.RecordBatch.from_pydict(
                    {
                        "number": pa.array([context.partitionId()], pa.int32()),
                        "name": [name],
                        "rows": pa.array([rows], pa.int64()),
                        "sha256": [sha256],
                    }
                )

    return work


def written(batches: Batches, path: Path, schema: pa.Schema) -> int:
    """Writes batches as a Parquet file whose row groups depend on the rows alone; gives how many rows there were."""
    rows, held = 0, list[pa.RecordBatch]()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for batch in batches:
            held.append(batch)
            rows += batch.num_rows
            if sum(one.nbytes for one in held) >= GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(held).cast(schema))
                held = []
        if any(one.num_rows for one in held):
            writer.write_table(pa.Table.from_batches(held).cast(schema))
    return rows


def reading(address: str, keys: tuple[str, ...], schema: pa.Schema) -> Callable[[Batches], Batches]:
    """What a task does with the number of its file."""

    def work(batches: Batches) -> Batches:
        store = Store(address)
        for batch in batches:
            for number in batch["id"].to_pylist():
                with ranged.opened(store, keys[number], schema.names) as file:
                    for part in file.iter_batches(columns=schema.names):
                        yield pa.RecordBatch.from_arrays(
                            [part[name].cast(schema.field(name).type) for name in schema.names], schema=schema
                        )

    return work


def send(spark: SparkSession) -> None:
    """Sends the modules that executors run, once a session, and where the store is."""
    with SENDING:
        send_once(spark)


def send_once(spark: SparkSession) -> None:
    """As `send`, one thread at a time."""
    home = Path(__file__).parents[1]
    spark.sparkContext.environment.update({name: os.environ[name] for name in WHERE if name in os.environ})
    if any(path.endswith("llmemb_parts.zip") for path in spark.sparkContext._python_includes or ()):
        return
    aside = Path(tempfile.mkdtemp(prefix="llmemb-"), "llmemb_parts.zip")
    with zipfile.ZipFile(aside, "w") as packed:
        for name in SENT:
            packed.write(home / f"{name}.py", f"jobs/{name}.py")
    spark.sparkContext.addPyFile(str(aside))
