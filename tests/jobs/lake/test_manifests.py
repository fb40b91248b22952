"""Manifests: one file a run; what `latest` means beside failures, experiments and older lakes; a night of several attempts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.lake import manifests, nights
from jobs.lake.partitions import write_json
from jobs.run import InputError, Run

DS = "2026-01-02"


def add(lake: Path, name: str, figure: int, ds: str = DS, status: str = "done", **more: Any) -> Path:
    """The manifest of a run that ended just now."""
    return manifests.append(lake, ds, name, {"status": status, "ds": ds, "result": {"figure": figure}, "seconds": 1.0, **more})


def figure(lake: Path, ds: str = DS, variant: str = "") -> int:
    return int(manifests.latest(Run(ds=ds, lake=lake, variant=variant), "rat")["figure"])


def test_the_newest_run_that_ended_well_counts_whatever_failed_after_it(tmp_path: Path) -> None:
    add(tmp_path, "rat", 1)
    add(tmp_path, "rat", 2)
    add(tmp_path, "rat", 3, status="failed")
    assert figure(tmp_path) == 2
    add(tmp_path, "rat", 4, ds="2026-01-03", status="failed")
    assert figure(tmp_path, "2026-01-03") == 2
    assert len(list(tmp_path.rglob("*.json"))) == 4, "nothing was replaced"
    with pytest.raises(InputError, match="run `python -m jobs rat` first"):
        figure(tmp_path, "2026-01-01")


def test_an_experiment_is_latest_for_itself_alone(tmp_path: Path) -> None:
    add(tmp_path, "rat", 1)
    add(tmp_path, "rat", 2, variant="wide")
    add(tmp_path, "rat", 3, variant="deep")
    assert [figure(tmp_path, variant=name) for name in ("", "wide", "deep", "new")] == [1, 2, 3, 1]


def test_the_file_of_an_older_lake_is_the_oldest_run(tmp_path: Path) -> None:
    old = {"status": "done", "result": {"figure": 1}, "seconds": 4.0, "earlier": [{"status": "failed", "seconds": 2.0}]}
    write_json(manifests.path_of(tmp_path, DS, "rat"), old)
    assert figure(tmp_path) == 1
    assert [run.seconds for run in nights.read_night(tmp_path, DS).attempts("rat")] == [2.0, 4.0]
    add(tmp_path, "rat", 2)
    assert figure(tmp_path) == 2
    assert sorted(run.seconds for run in nights.read_night(tmp_path, DS).attempts("rat")) == [1.0, 4.0]


def test_a_shard_is_no_run_of_the_whole(tmp_path: Path) -> None:
    add(tmp_path, "embed", 1)
    add(tmp_path, "embed-00001-of-00002", 2)
    add(tmp_path, "asked-lookup", 3)
    assert manifests.of_date(tmp_path, DS, "embed")["result"] == {"figure": 1}
    assert len(list(manifests.history(tmp_path, "embed*"))) == 2
    assert [run.name for run in nights.read_night(tmp_path, DS).runs] == ["embed", "embed-00001-of-00002"]


def test_a_night_shows_what_ended_well_counts_every_attempt_and_no_experiment(tmp_path: Path) -> None:
    add(tmp_path, "publish", 1, status="failed")
    add(tmp_path, "publish", 2)
    add(tmp_path, "publish", 3, status="refused")
    add(tmp_path, "publish", 4, variant="wide")
    (run,) = nights.read_night(tmp_path, DS).runs
    assert (run.status, run.result["figure"]) == ("done", 2)
    assert [one.result["figure"] for one in run.earlier] == [1, 3]
    assert nights.read_night(tmp_path, DS).total("publish", "figure") == 6


def test_of_a_night_that_never_ended_well_the_newest_attempt_is_shown(tmp_path: Path) -> None:
    add(tmp_path, "embed", 1, status="failed", error="first")
    add(tmp_path, "embed", 2, status="failed", error="second")
    (run,) = nights.read_night(tmp_path, DS).runs
    assert run.manifest["error"] == "second"


def test_a_manifest_that_is_cut_off_costs_itself_alone(tmp_path: Path) -> None:
    add(tmp_path, "rat", 1)
    add(tmp_path, "rat", 2).write_text("{")
    assert figure(tmp_path) == 1
    night = nights.read_night(tmp_path, DS)
    assert (len(night.runs), len(night.unreadable)) == (1, 1)
