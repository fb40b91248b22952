"""Spark's settings: laptop defaults are for a local master alone, and never over what somebody has set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs.engines import spark

ROOT = Path(__file__).parents[3]
LAPTOP = {"spark.ui.enabled", "spark.ui.showConsoleProgress", "spark.sql.shuffle.partitions", "spark.driver.extraJavaOptions"}

Built = Callable[..., dict[str, str]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Built:
    """The settings that a session would have been built with; none is started."""
    for name in ("SPARK_CONF_DIR", "SPARK_HOME", "PYSPARK_SUBMIT_ARGS", "PYSPARK_GATEWAY_PORT", "SPARK_LOCAL_IP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(spark, "find_java", lambda: None)

    class Builder:
        def __init__(self) -> None:
            self.made: dict[str, str] = {}

        def appName(self, name: str) -> Builder:
            return self

        def config(self, key: str, value: str) -> Builder:
            self.made[key] = value
            return self

        def getOrCreate(self) -> Any:
            raise RuntimeError("none is started")

    def build(settings: dict[str, str] | None = None, **environment: str) -> dict[str, str]:
        builder = Builder()
        monkeypatch.setattr(SparkSession, "builder", builder)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="none is started"):
            spark.session("extract", settings or {})
        return builder.made

    return build


def test_a_local_master_gets_laptop_defaults(built: Built) -> None:
    for settings in ({}, {"spark.master": "local[2]"}):
        assert built(settings).keys() >= LAPTOP
    assert built({"spark.sql.shuffle.partitions": "3"})["spark.sql.shuffle.partitions"] == "3"


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
