"""One Spark session for all tests of a file: most of a small run's time is Spark's start, and then its compiler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
from pyspark.sql import SparkSession

from jobs.engines.spark import session

SPARK = {"spark.master": "local[1]", "spark.sql.shuffle.partitions": "2"}
QUICK = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}
"""Over a few rows generated Java costs more to compile than it saves. The nights of `test_end_to_end`, of `test_movielens` and of
the cluster run with it."""


@contextmanager
def shared(more: Mapping[str, str] = QUICK) -> Iterator[None]:
    """A session that a job's run may not stop."""
    with pytest.MonkeyPatch.context() as patch:
        spark = session("test", {**SPARK, **more})
        patch.setattr(SparkSession, "stop", lambda self: self.catalog.clearCache())
        yield
    spark.stop()
