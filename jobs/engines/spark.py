"""The Spark session of the jobs that read tables: Java found or brought along, local defaults, clear errors."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.engines import java
from jobs.engines.java import find_java
from jobs.progress import on_terminal
from jobs.redaction import hides, redacted
from jobs.run import InputError, Unavailable

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

ALWAYS = {
    # days are days of UTC, whatever zone the cluster lives in
    "spark.sql.session.timeZone": "UTC",
    # rows that are sorted by their group already need neither a hash table nor a second sort
    "spark.sql.execution.replaceHashWithSortAgg": "true",
    # blocks kept on disk are compressed whole: compressing each column before that costs time and memory for nothing
    "spark.sql.inMemoryColumnarStorage.compressed": "false",
}
"""What the plan of `extract` is made for, on any master."""
SETTING = re.compile(r"\s*(spark\.\S+?)(?:\s*[=:]\s*|\s+)(.*?)\s*")
"""A line of spark-defaults.conf."""
IN_TICKS = re.compile(r"`([^`]*/[^`]*)`")
"""A path in the place of a table's name."""
AS_OF = re.compile(
    r"(?P<name>(?:`[^`]*`|[^\s;`])+)\s+(?P<kind>VERSION|TIMESTAMP)\s+AS\s+OF\s+(?P<when>'[^']*'|\d+)", re.IGNORECASE
)
ABSENT = ("TABLE_OR_VIEW_NOT_FOUND", "PATH_NOT_FOUND", "UNABLE_TO_INFER_SCHEMA")
"""Spark's conditions for a table or folder that is not there, or holds no file yet."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def session(job: str, settings: Mapping[str, str], *, keep_classes: bool = False) -> SparkSession:
    """A session with the recipe's settings; `spark.master` is `local[*]` unless set, submitted, or named by Spark's own settings.

    Laptop defaults are for a local master alone: what a cluster's settings say, they would overrule. Of a whole night Java may
    `keep_classes` for the next one.

    No secret goes over a command line: `private` says how.

    Raises InputError when no Java can be had, the master cannot be reached, or a secret would have to be an argument.
    """
    secrets = secrets_of(job, settings)
    find_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    from pyspark.sql import SparkSession

    known = {**given(), **settings}
    defaults = dict(ALWAYS)
    if known.get("spark.master", "local").startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        defaults |= {key: value for key, value in laptop(known, keep_classes, bool(secrets)).items() if key not in known}
    settings = defaults | dict(settings)
    builder = SparkSession.builder.appName(f"llmemb-{job}")
    if java_runs():
        secrets = {}  # none has to go by a command line
    for key, value in settings.items():
        if key not in secrets:
            builder = builder.config(key, value)
    try:
        spark = begun(builder, secrets)
    except Exception as error:
        raise InputError(f"Spark did not start ({first_line(error)}): check [{job}.spark] in the recipe") from error
    check_known(spark, job, secrets)
    spark.sparkContext.setLogLevel("ERROR")
    # PySpark writes every failed query's Java stack as one JSON line; the exception it raises says the same
    logging.getLogger("DataFrameQueryContextLogger").setLevel(logging.CRITICAL + 1)
    return spark


def begun(builder: SparkSession.Builder, secrets: Mapping[str, str]) -> SparkSession:
    """The session; where it does not start, once more without what was kept of Java's classes: a file cut short ends Java."""
    try:
        with private(secrets):
            return builder.getOrCreate()
    except Exception:
        if not java.drop_archives():
            raise
    with private(secrets):
        return builder.getOrCreate()


@contextlib.contextmanager
def ending(spark: SparkSession) -> Iterator[None]:
    """Stops the session after the block.

    Raises RuntimeError where Java no longer answers: that it can't be connected to would else pass for a service that is away.
    """
    from py4j.protocol import Py4JError, Py4JJavaError

    try:
        yield
    except (Unavailable, Py4JJavaError):
        raise
    except (ConnectionError, Py4JError) as error:
        raise RuntimeError(
            f"Spark's Java process ended ({first_line(error)}): out of memory? Give the machine or pod more than "
            "spark.driver.memory and Python take together"
        ) from error
    finally:
        with contextlib.suppress(ConnectionError, Py4JError):
            spark.stop()


def secrets_of(job: str, settings: Mapping[str, str]) -> dict[str, str]:
    """Those settings that are secret by their name or show one. Raises InputError for one among Java's options."""
    found = {key: value for key, value in settings.items() if hides(key, value) or redacted(value) != value}
    for key in found:
        if key.endswith("JavaOptions"):
            raise InputError(
                f"[{job}.spark] {key} holds a password, token or key, and Java's options are an argument list, which every user "
                "of the machine can read: put it into the variable JDK_JAVA_OPTIONS, "
                "for executors into spark.executorEnv.JDK_JAVA_OPTIONS"
            )
    return found


def java_runs() -> bool:
    """Whether this process has its Java process already: settings then go to it over their connection."""
    from pyspark import SparkContext

    return "PYSPARK_GATEWAY_PORT" in os.environ or SparkContext._gateway is not None


@contextlib.contextmanager
def private(secrets: Mapping[str, str]) -> Iterator[None]:
    """Spark's settings in a copy that only this user can read, with the secrets in it.

    PySpark starts Java by `spark-submit --conf key=value`, and an argument list is read by everybody on the machine. The secrets
    leave the disk once Spark has started; the rest of the copy (log4j2.properties, hive-site.xml) stays as long as this process.
    """
    if not secrets:
        yield
        return
    home = Path(tempfile.mkdtemp(prefix="llmemb-spark-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder, before = home / "conf", os.environ.get("SPARK_CONF_DIR")
    if (given := settings_folder()).is_dir():
        shutil.copytree(given, folder, ignore_dangling_symlinks=True)
    folder.mkdir(exist_ok=True)
    folder.chmod(0o700)
    file = folder / "spark-defaults.conf"
    shared = file.read_bytes() if file.is_file() else b""
    file.unlink(missing_ok=True)
    lines = "".join(f"{key} {escaped(value)}\n" for key, value in secrets.items())
    file.touch(0o600, exist_ok=False)
    file.write_bytes(shared + b"\n" + lines.encode())
    os.environ["SPARK_CONF_DIR"] = str(folder)
    try:
        yield
    finally:
        file.write_bytes(shared)
        os.environ.pop("SPARK_CONF_DIR")
        if before is not None:
            os.environ["SPARK_CONF_DIR"] = before


def escaped(value: str) -> str:
    """A value as a file of Java's properties holds it: any letter but plain ones by its UTF-16 code."""
    units = value.encode("utf-16-be", "surrogatepass")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if code < 128 and chr(code).isalnum() else f"\\u{code:04x}" for code in codes)


def check_known(spark: SparkSession, job: str, secrets: Mapping[str, str]) -> None:
    """Raises InputError where Spark has not read the secrets as they are."""
    known = spark.sparkContext.getConf()
    for key, value in secrets.items():
        if known.get(key) != value:
            spark.stop()
            raise InputError(
                f"[{job}.spark] {key} did not reach Spark as it is: it goes by spark-defaults.conf, which --properties-file and "
                "--conf of PYSPARK_SUBMIT_ARGS overrule, and which takes no blanks at an end: set it in one place"
            )


def settings_folder() -> Path:
    """The folder of Spark's settings."""
    return Path(os.environ.get("SPARK_CONF_DIR") or spark_home() / "conf")


def spark_home() -> Path:
    """Where Spark lies."""
    from pyspark.find_spark_home import _find_spark_home

    return Path(_find_spark_home())


def laptop(known: Mapping[str, str], keep_classes: bool, has_files: bool) -> dict[str, str]:
    """Settings of a local master beside those that are `known`; `has_files` says whether the folder of Spark's settings will
    have any."""
    options = ["-Dlog4j2.level=ERROR", "-Dderby.stream.error.file=/dev/null"]
    options += java.compiling(known.get("spark.driver.defaultJavaOptions", ""))
    # that folder stands first in Java's class path, in which an archive takes no folder with files
    if not has_files and not (settings_folder().is_dir() and any(settings_folder().iterdir())):
        options += java.archive(spark_home() / "jars", keep=keep_classes)
    return {
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(on_terminal()).lower(),
        "spark.sql.shuffle.partitions": "8",
        "spark.driver.extraJavaOptions": " ".join(options),
    }


def given() -> dict[str, str]:
    """Settings that were made before this process began: of the folder that SPARK_CONF_DIR names, or submitted."""
    if "PYSPARK_GATEWAY_PORT" in os.environ:  # started by spark-submit: its Java process has read all of them
        from pyspark import SparkConf, SparkContext

        SparkContext._ensure_initialized()
        return dict(SparkConf().getAll())
    found = {}
    file = settings_folder() / "spark-defaults.conf"
    for line in file.read_text().splitlines() if file.is_file() else ():
        if written := SETTING.fullmatch(line):
            found[written[1]] = written[2]
    words = shlex.split(os.environ.get("PYSPARK_SUBMIT_ARGS", ""))
    for word, value in itertools.pairwise(words):
        if word == "--master":
            found["spark.master"] = value
        if word == "--conf" and "=" in value:
            key, _, worth = value.partition("=")
            found[key] = worth
    return found


def source(spark: SparkSession, table: str, key: str, columns: Sequence[str], *, dated: bool = False) -> DataFrame:
    """A user's table: any name that the session's catalogs resolve, also as of a time, or a Parquet path (it has a `/`).

    Raises InputError that names the recipe's `key` when the table or one of `columns` is missing, or a path may mean two places;
    Unavailable for a missing table that is `dated`, one of each date: it may come later.
    """
    from pyspark.errors import PySparkException

    try:
        rows = opened(spark, table, key)
        known = rows.columns
    except PySparkException as error:
        absent = (error.getCondition() or "").split(".")[0] in ABSENT
        if dated and absent and not AS_OF.fullmatch(table.strip()):  # a table that keeps its past is there on every date
            raise Unavailable(f"{key} = {table!r} is not there: has the upstream load run? ({first_line(error)})") from error
        raise InputError(
            f"{key} = {table!r} cannot be read ({first_line(error)}): name a table or a Parquet path; a part of a name with "
            "dashes or blanks stands in backticks"
        ) from error
    for column in columns:
        if column not in known:
            raise InputError(f"{key} = {table!r} has no column {column!r}; it has {', '.join(known)}")
    return rows


def opened(spark: SparkSession, table: str, key: str) -> DataFrame:
    """A table by its name, or files in backticks as Spark's SQL names them, both also as of a time where their source keeps its
    past (Delta, Iceberg); or a Parquet path."""
    table = table.strip()
    past = AS_OF.fullmatch(table)
    bare = IN_TICKS.search(past["name"] if past else table)
    if bare and (whole := address(spark, bare[1], key)) != bare[1]:
        raise InputError(f"{key} = {table!r} names no file system: write {whole} in the backticks")
    if past:
        return spark.sql(f"SELECT * FROM {past['name']} {past['kind']} AS OF {past['when']}")
    return spark.read.parquet(address(spark, table, key)) if "/" in table and not bare else spark.table(table)


def on_disk(path: Path) -> str:
    """A path of this machine, or of a mount that all machines have, as Spark takes it: without a scheme it would mean whatever
    file system the cluster has by default."""
    return f"file://{path.absolute()}"


def address(spark: SparkSession, table: str, key: str) -> str:
    """A Parquet path of the recipe with its scheme. Raises InputError where it has none and the default is not this disk."""
    if SCHEME.match(table):
        return table
    default = spark.sparkContext._jsc.hadoopConfiguration().get("fs.defaultFS") or "file:///"
    if not default.startswith("file:"):
        raise InputError(
            f"{key} = {table!r} names no file system, and Spark's default is {default} (fs.defaultFS): write "
            f"{on_disk(Path(table))} for a disk or mount that every machine has, or {default.rstrip('/')}{table}"
        )
    return on_disk(Path(table))


def spread(rows: DataFrame, files: int, key: str) -> DataFrame:
    """Rows in so many partitions by the hash of `key`; into one they go without a shuffle."""
    return rows.repartition(files, key) if files > 1 else rows.coalesce(1)


def first_line(error: Exception) -> str:
    """An engine's error without its stack."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
