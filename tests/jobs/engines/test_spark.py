"""Spark's settings: laptop defaults are for a local master alone, and never over what somebody has set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyspark.java_gateway
import pytest
from py4j.protocol import Py4JError, Py4JNetworkError
from pyspark import SparkContext
from pyspark.sql import SparkSession

from jobs import extract
from jobs.__main__ import build, judged
from jobs.engines import java, spark
from jobs.run import InputError, Refused, Unavailable

ROOT = Path(__file__).parents[3]
LAPTOP = {"spark.ui.enabled", "spark.ui.showConsoleProgress", "spark.sql.shuffle.partitions", "spark.driver.extraJavaOptions"}

SMALL = {
    "run": {"ds": "2026-03-10", "lake": "lake"},
    "items": {"table": "shop.items", "attributes": ["title"]},
    "interactions": {"table": "shop.logs"},
}

Built = Callable[..., dict[str, str]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Built:
    """The settings that a session would have been built with; none is started."""
    for name in ("SPARK_CONF_DIR", "SPARK_HOME", "PYSPARK_SUBMIT_ARGS", "PYSPARK_GATEWAY_PORT", "SPARK_LOCAL_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(spark, "find_java", lambda: None)

    class Builder:
        def __init__(self) -> None:
            self.made: dict[str, str] = {}
            self.starts = 0

        def appName(self, name: str) -> Builder:
            return self

        def config(self, key: str, value: str) -> Builder:
            self.made[key] = value
            return self

        def getOrCreate(self) -> Any:
            self.starts += 1
            raise RuntimeError("none is started")

    def build(settings: dict[str, str] | None = None, **environment: str) -> dict[str, str]:
        builder = Builder()
        monkeypatch.setattr(SparkSession, "builder", builder)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="none is started"):
            spark.session("extract", settings or {}, keep_classes=True)
        return builder.made

    return build


def test_a_local_master_gets_laptop_defaults(built: Built) -> None:
    for settings in ({}, {"spark.master": "local[2]"}):
        assert built(settings).keys() >= LAPTOP
    assert built({"spark.sql.shuffle.partitions": "3"})["spark.sql.shuffle.partitions"] == "3"


def test_java_options_are_a_laptop_s_unless_somebody_gives_some(built: Built) -> None:
    assert "Tier4" in built()["spark.driver.extraJavaOptions"]
    assert built({"spark.driver.extraJavaOptions": "-Xss8m"})["spark.driver.extraJavaOptions"] == "-Xss8m"
    given = built({"spark.driver.defaultJavaOptions": "-XX:+UseZGC"})
    assert "GC" not in given["spark.driver.extraJavaOptions"]
    assert "spark.driver.extraJavaOptions" not in built({"spark.master": "yarn"})


def test_java_keeps_its_classes_where_no_folder_of_settings_has_files(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in java.OPTIONS:
        monkeypatch.delenv(name, raising=False)

    def kept(settings: dict[str, str] | None = None) -> bool:
        return ".jsa" in built(settings).get("spark.driver.extraJavaOptions", "")

    assert kept()
    assert not kept({"spark.hadoop.fs.s3a.secret.key": SECRET}), "it lies in such a folder"
    assert not kept({"spark.master": "yarn"})
    (tmp_path / "conf").mkdir()
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path / "conf"))
    assert kept()
    (tmp_path / "conf" / "log4j2.properties").touch()
    assert not kept()


def test_an_archive_that_java_may_have_failed_over_goes_and_java_is_started_again(built: Built, tmp_path: Path) -> None:
    archive = tmp_path / "cache" / "java" / "0123.jsa"
    archive.parent.mkdir(parents=True)
    archive.touch()
    built({"spark.master": "yarn"})
    assert not archive.exists() and SparkSession.builder.starts == 2
    built({"spark.master": "yarn"})
    assert SparkSession.builder.starts == 1, "there was none"


@pytest.mark.parametrize("kind", ["standalone", "yarn", "kubernetes"])
def test_a_cluster_s_settings_are_not_overruled(built: Built, kind: str) -> None:
    made = built(SPARK_CONF_DIR=str(ROOT / "infra" / "spark" / kind))
    assert not made.keys() & LAPTOP
    assert made["spark.sql.session.timeZone"] == "UTC", "days are days of UTC on any master"
    shipped = (ROOT / "infra" / "spark" / kind / "spark-defaults.conf").read_text()
    assert not [key for key in made if key in shipped]


@pytest.mark.parametrize(
    "how",
    [
        {"settings": {"spark.master": "yarn"}},
        {"PYSPARK_SUBMIT_ARGS": "--master spark://a:7077 pyspark-shell"},
        {"PYSPARK_SUBMIT_ARGS": "--conf 'spark.master=k8s://https://a' pyspark-shell"},
    ],
)
def test_a_master_that_was_submitted_or_stands_in_the_recipe_counts(built: Built, how: dict[str, Any]) -> None:
    assert not built(**how).keys() & LAPTOP


@pytest.mark.parametrize(
    "line", ["spark.sql.shuffle.partitions 400", "spark.sql.shuffle.partitions=400", "spark.ui.enabled: true"]
)
def test_what_somebody_set_for_a_local_master_stays(built: Built, tmp_path: Path, line: str) -> None:
    (tmp_path / "spark-defaults.conf").write_text(f"# a comment\n\nspark.master local[4]\n{line}\n")
    made = built(SPARK_CONF_DIR=str(tmp_path))
    key = line.replace("=", " ").replace(":", " ").split()[0]
    assert key not in made and made.keys() >= LAPTOP - {key}


SECRET = "hunter2"
SECRETS = {
    "spark.hadoop.fs.s3a.secret.key": f"{SECRET}\\ #!= \U0001f600",
    "spark.hadoop.fs.azure.account.key.shop.dfs.core.windows.net": SECRET,
    "spark.sql.catalog.shop.uri": f"jdbc:postgresql://feast:p/{SECRET}@db/shop",
    "spark.hadoop.javax.jdo.option.ConnectionPassword": SECRET,
}


def test_no_secret_of_spark_s_settings_is_in_an_argument_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "spark-defaults.conf").write_text("spark.ui.port 4050")
    (tmp_path / "hive-site.xml").write_text("<configuration/>")
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    monkeypatch.setattr(spark, "find_java", lambda: None)
    monkeypatch.setattr(SparkContext, "_gateway", None)
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    monkeypatch.setattr(SparkSession, "_instantiatedSession", None)
    seen: dict[str, Any] = {}

    def popen(command: list[str], **given: Any) -> None:
        folder = Path(given["env"]["SPARK_CONF_DIR"])
        file = folder / "spark-defaults.conf"
        seen.update(command=command, env=given["env"], folder=folder, text=file.read_text())
        seen["modes"] = [path.stat().st_mode & 0o777 for path in (file, folder, folder.parent)]
        raise OSError("none is started")

    monkeypatch.setattr(pyspark.java_gateway, "Popen", popen)
    with pytest.raises(InputError, match="none is started"):
        spark.session("extract", {**SECRETS, "spark.executor.cores": "3"})
    assert "spark.executor.cores=3" in seen["command"]
    assert SECRET not in repr(seen["command"]) + repr(seen["env"])
    assert not [word for word in seen["command"] if any(key in word for key in SECRETS)]
    assert seen["modes"] == [0o600, 0o700, 0o700]
    assert seen["text"].startswith("spark.ui.port 4050\n") and seen["text"].count(SECRET) == len(SECRETS)
    assert (seen["folder"] / "hive-site.xml").exists() and os.environ["SPARK_CONF_DIR"] == str(tmp_path)
    assert (seen["folder"] / "spark-defaults.conf").read_text() == "spark.ui.port 4050", "the secrets have left the disk"
    assert SECRET not in (tmp_path / "spark-defaults.conf").read_text()


def test_a_session_has_its_secrets_as_they_are_and_no_process_shows_them() -> None:
    """With a real Java process, in a process of its own."""
    code = (
        "import sys, json, pathlib\nfrom jobs.engines import spark\nsecrets = json.load(sys.stdin)\n"
        "session = spark.session('extract', {'spark.master': 'local[1]', **secrets})\n"
        "known = session.sparkContext.getConf()\nassert {key: known.get(key) for key in secrets} == secrets\n"
        "hadoop = session.sparkContext._jsc.hadoopConfiguration()\n"
        "assert hadoop.get('fs.s3a.secret.key') == secrets['spark.hadoop.fs.s3a.secret.key']\n"
        "shown = [path.read_bytes() for path in pathlib.Path('/proc').glob('[0-9]*/cmdline')]\n"
        "assert any(b'llmemb-extract' in line for line in shown)\n"
        f"assert not any(b'{SECRET[:4]}' + b'{SECRET[4:]}' in line for line in shown)\n"
        "session.stop()\nprint('held')\n"
    )
    here = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_", "SPARK_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=json.dumps(SECRETS), capture_output=True, text=True, check=False, env=here
    )
    assert done.stdout == "held\n", done.stderr


@pytest.mark.parametrize("key", ["spark.driver.extraJavaOptions", "spark.executor.extraJavaOptions"])
def test_a_secret_among_java_s_options_is_refused_without_repeating_it(key: str) -> None:
    with pytest.raises(InputError, match="JDK_JAVA_OPTIONS") as refused:
        spark.session("extract", {key: f"-Xmx1g -Djavax.net.ssl.keyStorePassword={SECRET}"})
    assert SECRET not in str(refused.value)


def test_a_secret_that_another_file_of_settings_hides_is_told() -> None:
    class Context:
        def getConf(self) -> dict[str, str]:
            return {"spark.authenticate.secret": "another"}

    class Session:
        sparkContext, stopped = Context(), False

        def stop(self) -> None:
            self.stopped = True

    session: Any = Session()
    with pytest.raises(InputError, match="PYSPARK_SUBMIT_ARGS") as told:
        spark.check_known(session, "extract", {"spark.authenticate.secret": SECRET})
    assert session.stopped and SECRET not in str(told.value)


class Gone:
    """A session whose Java process was killed."""

    def stop(self) -> None:
        raise ConnectionRefusedError(111, "Connection refused")


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "refused"), Py4JNetworkError("Answer from Java side is empty"), Py4JError("o1.collect")]
)
def test_a_java_process_that_was_killed_is_no_service_that_is_away(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot(*_: Any) -> None:
        raise error

    monkeypatch.setattr(extract, "session", lambda *_, **__: Gone())
    monkeypatch.setattr(extract, "snapshot", snapshot)
    made = build(extract.Config, SMALL, "extract")
    with pytest.raises(RuntimeError, match=r"Java process ended .*: out of memory") as told:
        extract.in_session(made)
    assert judged(told.value, {})[0] == 1


@pytest.mark.parametrize("arriving", [False, True])
def test_only_a_whole_night_keeps_java_s_classes(monkeypatch: pytest.MonkeyPatch, arriving: bool) -> None:
    told = dict[str, bool]()

    def session(*_: Any, **how: bool) -> Gone:
        told.update(how)
        return Gone()

    monkeypatch.setattr(extract, "session", session)
    monkeypatch.setattr(extract, "snapshot", lambda *_: None)
    monkeypatch.setattr(extract.arrivals, "take", lambda *_: None)
    extract.in_session(build(extract.Config, {**SMALL, "arriving": arriving}, "extract"))
    assert told == {"keep_classes": not arriving}


@pytest.mark.parametrize("error", [Unavailable("late"), InputError("no column"), Refused("too few")])
def test_what_a_job_says_itself_outlives_the_end_of_java(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), spark.ending(Gone()):  # type: ignore[arg-type]
        raise error
    with spark.ending(Gone()):  # type: ignore[arg-type]
        done = True
    assert done
