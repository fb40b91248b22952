"""drift: a measure alarms only past what its own history shows."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs.lake import manifests
from jobs.lake.nights import trained_on
from jobs.lake.partitions import write_json
from jobs.report import drift
from jobs.report.drift import Bounds
from jobs.run import as_json
from tests.jobs.report.small_night import DS, record, results, tables, tell, whole_night


def nights(lake: Path, count: int) -> str:
    """Nights before DS, each with its report; gives the last one's date."""
    date = ""
    for back in range(count, 0, -1):
        date = f"{dt.date.fromisoformat(DS) - dt.timedelta(days=back)}"
        whole_night(lake, date)
        # the encoder was trained on the first night: texts are judged against the nights since
        record(lake, "scft", results()["scft"] | {"due": back == count}, date)
        record(lake, "report", as_json(tell(lake, date)[0]), date)
    return date


def test_a_few_long_texts_embedded_on_a_night_do_not_make_the_encoder_due(tmp_path: Path) -> None:
    whole_night(tmp_path)
    assert not any("token" in name for name in tell(tmp_path)[0].drift), "forty texts are too few"
    record(tmp_path, "embed", {**results()["embed"], "embedded": 200, "tokens": 5000})
    assert tell(tmp_path)[0].drift["embedded.tokens"] == 25.0
    assert not "embedded.tokens".startswith(drift.TEXTS)


def test_an_attribute_that_vanishes_overnight_alarms_and_makes_the_encoder_due(tmp_path: Path) -> None:
    nights(tmp_path, 2)
    whole_night(tmp_path)
    record(tmp_path, "scft", results()["scft"] | {"due": False})
    quiet, _ = tell(tmp_path, bounds=Bounds(nights=2))
    assert (quiet.state, quiet.refresh_encoder) == ("good", "")
    extract = results()["extract"]
    extract["fill"]["genre"] = 0.4
    record(tmp_path, "extract", extract)
    loud, html = tell(tmp_path, bounds=Bounds(nights=2))
    assert loud.state == "look"
    assert loud.refresh_encoder == "fill.genre is 0.4, was 0.9 ± 0.01"
    assert "1 of" in loud.points[0]
    assert "! alarm" in html


def test_a_measure_alarms_only_past_what_its_own_history_shows() -> None:
    noisy = [{"x": 1.0 + 0.1 * (-1) ** night} for night in range(8)]
    verdicts = {value: drift.judge({"x": value}, noisy, Bounds())[0].verdict for value in (1.0, 1.3, 1.7)}
    assert verdicts == {1.0: "steady", 1.3: "steady", 1.7: "alarm"}
    assert drift.judge({"x": float("nan")}, noisy, Bounds())[0].verdict == "alarm"
    assert drift.judge({"x": 9.0}, noisy[:4], Bounds())[0].verdict == "too few nights"
    clean = [{"quarantine.items": 0.0}] * 8
    assert drift.judge({"quarantine.items": 0.001}, clean, Bounds())[0].verdict == "steady", "one bad record is no drift"
    assert drift.judge({"quarantine.items": 0.03}, clean, Bounds())[0].verdict == "alarm"
    assert drift.judge({"y": 9.0}, noisy, Bounds())[0].nights == 0


def test_effective_rank_counts_the_directions_that_vectors_use() -> None:
    random = np.random.default_rng(1)
    wide = random.normal(size=(4000, 6)).astype(np.float32)
    assert drift.effective_rank(wide) == pytest.approx(6, abs=0.05)
    assert drift.effective_rank(wide[:, :2] @ random.normal(size=(2, 6)).astype(np.float32)) <= 2.001
    assert drift.effective_rank(wide[:5]) <= 4.001, "five points span four directions"


def test_coverage_is_the_share_of_events_whose_item_has_a_vector(tmp_path: Path) -> None:
    tables(tmp_path)
    ids = pa.array([f"i{number}" for number in range(20)])
    # events i0…i39, then i0…i9 again
    assert drift.coverage(tmp_path, f"ds={DS}", ids, 1000) == pytest.approx(30 / 50)


def test_a_lasting_change_of_texts_makes_an_encoder_due_once_and_not_again_after_it_was_trained(tmp_path: Path) -> None:
    """Twenty nights at 100 characters, then 140 for good: the median of all would say so on ten nights and more."""
    before, trained, due = [{"text.characters": 100.0 + night % 3, "coverage": 0.9} for night in range(20)], 0, []
    for night in range(20, 40):
        tonight = {"text.characters": 140.0 + night % 3, "coverage": 0.9}
        if drift.refresh_reason(drift.judge(tonight, before, drift.Bounds(), before[trained:])):
            due.append(night)
            trained = len(before)
        before.append(tonight)
    assert due == [20]


def lasting(lake: Path, *, trained: bool) -> tuple[str, int]:
    """Five nights with genres, then two and tonight where most lack theirs; the encoder was trained on the first of the two.

    Why the report says that it is due, and the nights that the fill was judged against.
    """
    for back in range(7, 0, -1):
        date = f"{dt.date.fromisoformat(DS) - dt.timedelta(days=back)}"
        record(lake, "scft", results()["scft"] | {"due": back == 7 or (trained and back == 2)}, date)
        record(lake, "report", {"drift": {"fill.genre": 0.4 if back <= 2 else 0.9}}, date)
    whole_night(lake)
    record(lake, "scft", results()["scft"] | {"due": False})
    extract = results()["extract"]
    extract["fill"]["genre"] = 0.4
    record(lake, "extract", extract)
    told, _ = tell(lake, bounds=Bounds(nights=2))
    return told.refresh_encoder, next(one.nights for one in told.measures if one.name == "fill.genre")


def test_the_report_judges_texts_against_the_nights_since_the_training(tmp_path: Path) -> None:
    assert lasting(tmp_path / "trained", trained=True) == ("", 2)
    why, nights = lasting(tmp_path / "left", trained=False)
    assert nights == 7 and why.startswith("fill.genre is 0.4, was 0.9")


def test_a_training_that_the_gates_refused_is_not_asked_for_night_after_night(tmp_path: Path) -> None:
    write_json(manifests.path_of(tmp_path, "2026-01-01", "scft"), {"status": "done", "result": {"due": True}})
    write_json(manifests.path_of(tmp_path, "2026-01-08", "scft"), {"status": "refused", "error": "recall fell"})
    assert trained_on(tmp_path, "2026-01-09") == "2026-01-08"


def test_only_a_training_counts_and_not_a_night_on_which_none_was_due(tmp_path: Path) -> None:
    for ds, due, status in (("2026-01-01", True, "done"), ("2026-01-05", False, "done"), ("2026-01-07", True, "failed")):
        write_json(manifests.path_of(tmp_path, ds, "scft"), {"status": status, "result": {"due": due}})
    assert trained_on(tmp_path, "2026-01-09") == "2026-01-01"
    assert trained_on(tmp_path, "2025-12-31") == ""
