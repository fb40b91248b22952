"""night: the jobs in their order, a challenger only where one is due, a report whatever came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import night
from jobs.night import Failed, Night
from jobs.run import Refused, Run

SERVING = ["pin", "embed", "project", "publish", "lookup", "report"]
TRAINING = ["embed", "pretrain", "rat", "embed", "evaluate", "promote"]


class Told(Night):
    """A night whose jobs only leave their names."""

    def job(self, name: str, *settings: str) -> dict[str, Any]:
        calls.append(name)
        told[name] = settings
        if name in fails:
            raise Failed(name, fails[name])
        return {
            "due": due[0],
            "space_id": "12e4",
            "encoder_id": "7",
            "recommender_id": "1e3",
            "items": 3,
            "path": "report.html",
            "sequence": 7,
            "decision": decisions[-1],
        }


calls: list[str] = []
told: dict[str, tuple[str, ...]] = {}
fails: dict[str, int] = {}
due = [False]
decisions = ["promoted"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    calls.clear()
    fails.clear()
    due[0] = False
    decisions[:] = ["promoted"]
    monkeypatch.setattr(night.registry, "champion", lambda run: {"recommender_id": "r"})
    return Run(ds="2026-01-01", lake=tmp_path)


TONIGHT = Told(recipe=Path("r.toml"), ds="2026-01-01")


def test_a_night_with_a_champion_trains_nothing(run: Run) -> None:
    assert night.run_night(TONIGHT, run, train=False) == {"space_id": "12e4", "items": 3, "report": "report.html"}
    assert calls == ["extract", "scft", *SERVING]
    assert (told["embed"], told["project"], told["publish"]) == (
        ('embed.encoder="7"',), ('project.recommender="1e3"',), ('publish.space="12e4"',),
    )  # fmt: skip


@pytest.mark.parametrize("asked", [True, False])
def test_a_challenger_is_trained_where_an_encoder_is_new_or_a_person_asks(run: Run, asked: bool) -> None:
    due[0] = not asked
    night.run_night(TONIGHT, run, train=asked)
    assert calls == ["extract", "scft", *TRAINING, *SERVING]


@pytest.mark.parametrize("status", [0, 3])
def test_a_champion_of_this_date_is_trained_on_all_events_before_it_serves(
    run: Run, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    # as after a person's yes
    monkeypatch.setattr(night.registry, "champion", lambda run: {"recommender_id": "r", "ds": "2026-01-01", "gated_id": ""})
    if status:
        fails["rat"] = status
    night.run_night(TONIGHT, run, train=False)
    assert calls == ["extract", "scft", "rat", *SERVING]
    assert told["rat"] == ("rat.stage=refit",)


def test_a_champion_that_knows_all_events_already_is_not_trained_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(night.registry, "champion", lambda run: {"recommender_id": "r", "ds": "2026-01-01", "gated_id": "g"})
    night.run_night(TONIGHT, run, train=False)
    assert "rat" not in calls


def test_lookup_is_told_what_this_night_published(run: Run) -> None:
    night.run_night(TONIGHT, run, train=False)
    assert told["lookup"] == ('lookup.space="12e4"', "lookup.sequence=7")


def test_a_refused_challenger_leaves_the_champion_serving(run: Run) -> None:
    fails["promote"] = 3
    night.run_night(TONIGHT, run, train=True)
    assert calls[-6:] == SERVING


@pytest.mark.parametrize("decision", ["undecided", "promoted"])
def test_a_challenger_that_waits_for_a_person_is_told_with_the_command_that_says_yes(
    run: Run, caplog: pytest.LogCaptureFixture, decision: str
) -> None:
    decisions[:] = [decision]
    night.run_night(TONIGHT, run, train=True)
    assert calls[-6:] == SERVING
    waits = "waits for a person, the champion goes on serving; to say yes: python -m jobs promote --recipe r.toml --ds 2026-01-01"
    assert (waits in caplog.text) is (decision == "undecided")


def test_without_a_champion_a_person_is_asked_and_the_report_is_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(night.registry, "champion", lambda run: None)
    with pytest.raises(Refused, match=r"promote\.approved_by=NAME"):
        night.run_night(TONIGHT, run, train=False)
    assert calls == ["extract", "scft", *TRAINING, "report"]


@pytest.mark.parametrize(("job", "status"), [("extract", 2), ("lookup", 3)])
def test_a_job_that_fails_ends_the_night_with_its_status_and_a_report(run: Run, job: str, status: int) -> None:
    fails[job] = status
    with pytest.raises(Failed) as failed:
        night.run_night(TONIGHT, run, train=False)
    assert failed.value.status == status
    assert calls[-2:] == [job, "report"]
