"""Files of a date that a load may still be writing: they are waited for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from jobs.engines.spark import AS_OF, IN_TICKS, address
from jobs.run import Unavailable

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

MARK = "_SUCCESS"
"""The file that Spark and Hadoop write into a folder once all others are in it."""
ASIDE = "/_temporary/"
"""Where they keep files that are not in their place yet."""


def check_settled(spark: SparkSession, table: str, key: str, minutes: float) -> None:
    """Raises Unavailable where a load may still write to a Parquet path: a folder without `_SUCCESS` has a file that is younger
    than so many minutes, or one in `_temporary`.

    Tables of a catalog pass, and so does what is not there: reading tells. A file without a pattern passes too: what makes it
    Parquet is written last.
    """
    if not minutes or "/" not in table or IN_TICKS.search(table) or AS_OF.fullmatch(table.strip()):
        return
    newest, aside = youngest(spark, address(spark, table.strip(), key))
    age = time.time() - newest
    if aside or age < 60 * minutes:
        why = f"files in {ASIDE.strip('/')}" if aside else f"a file of {max(age, 0) / 60:.0f} minutes ago"
        raise Unavailable(
            f"{key} = {table!r} has no {MARK}, and {why} (extract.settle_minutes = {minutes:g}): is the upstream load under way?"
        )


def youngest(spark: SparkSession, where: str) -> tuple[float, bool]:
    """(The unix second in which the newest file was written, 0 where all are whole; whether some are not in their place yet)."""
    assert spark._jvm is not None
    hadoop: Any = spark._jvm.org.apache.hadoop.fs
    pattern = hadoop.Path(where)
    files = pattern.getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())
    newest, aside, itself = 0, False, files.makeQualified(pattern).toString()
    for found in files.globStatus(pattern) or ():
        if found.isDirectory() and not files.exists(hadoop.Path(found.getPath(), MARK)):
            inside = files.listFiles(found.getPath(), True)
            while inside.hasNext():
                file = inside.next()
                newest = max(newest, file.getModificationTime())
                aside = aside or ASIDE in file.getPath().toString()
        elif not found.isDirectory() and found.getPath().toString() != itself:
            newest = max(newest, found.getModificationTime())
    return newest / 1000, aside
