"""The DAGs: what each runs, in which order, for which date, and what becomes of a job's exit status."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.dags.conftest import ROOT, Stub, Worker

FILES = sorted(path.stem for path in (ROOT / "dags").glob("*.py") if not path.stem.startswith("job_"))
ORDER = {
    "scft_refresh": ["extract", "scft"],
    "rat_training": ["embed", "pretrain", "rat", "embed", "embed", "evaluate", "promote", "rat"],
    "nightly_embeddings": ["pin", "extract", "embed", "project", "publish", "lookup", "report"],
    "hourly_items": ["pin", "extract", "embed", "project", "publish"],
    "maintenance": ["collect", "lookup"],
    "rollback": ["rollback", "lookup"],
    "forget": ["forget", "lookup"],
}
ODD = [
    "\U0001f600 film",
    "it's \"so\" \\ 5 'o clock",
    "$HOME $(HOME) $$ {{ ds }} {% raw %}",
    "l1\nl2\t\x7f",
    "ü–☃",
    "1_000",
    "#7",
]
"""Ids that something on the way could take for something else."""
GPU = {"scft", "embed", "embed_opponent", "embed_reference", "pretrain", "rat", "refit", "evaluate"}


def test_dag_files_bring_no_engine_and_none_of_our_own_packages(tmp_path: Path) -> None:
    code = (
        f"import importlib, json, sys\nfor name in {FILES}:\n    importlib.import_module(name)\n"
        "heavy = {'jobs', 'models', 'feature_repo', 'torch', 'pyspark', 'feast', 'mlflow', 'numpy', 'pandas', 'pyarrow', "
        "'kubernetes'}\n"
        "print(json.dumps(['airflow' in sys.modules, sorted(heavy & set(sys.modules))]))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "dags"), "AIRFLOW_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [True, []]


def test_every_task_has_retries_with_backoff_a_timeout_a_pool_and_an_alert(worker: Worker) -> None:
    pools = json.loads((ROOT / "infra" / "pools.json").read_text())
    dags = worker.ask("describe", {"DEADLINE_HOURS": "3", "OWNER": "search"})
    assert set(dags) == set(ORDER)
    purposes = {name: set(dag["tags"]) - {"llmemb"} for name, dag in dags.items()}
    assert purposes["scft_refresh"] == purposes["rat_training"] == {"training"} and purposes["forget"] == {"on demand"}
    for name, dag in dags.items():
        assert dag["max_active_runs"] == 1
        assert dag["deadline_hours"] == [1 if name == "hourly_items" else 3]
        for task_id, task in dag["tasks"].items():
            if task["type"] == "EmptyOperator":
                continue
            where = f"{name}.{task_id}"
            assert task["retries"] == 3 and task["backoff"] == 2, where
            assert task["hours"] or task["type"] == "HITLOperator", where
            assert task["alerts"] == [True] and task["owner"] == "search", where
            usual = "gpu" if task_id in GPU else "default_pool"
            assert task["pool"] == ("hourly" if where == "hourly_items.embed" else usual), where
            assert task["pool"] in pools and pools[task["pool"]]["include_deferred"], where


@pytest.mark.parametrize("dag", sorted(ORDER))
def test_a_dag_runs_its_jobs_in_order_for_one_explicit_date(worker: Worker, stub: Stub, dag: str) -> None:
    stub.plan()
    conf = {"item": "m7"} if dag == "forget" else None
    done = worker.run(dag, "1998-04-22", conf)
    assert done["state"] == "success"
    calls = stub.calls()
    assert [call["job"] for call in calls] == ORDER[dag]
    for call in calls:
        assert call["words"][:2] == ["-m", "jobs"]
        assert call["words"][3:7] == ["--recipe", "recipe.toml", "--ds", "1998-04-22"]


def test_a_night_starts_with_a_new_champion_or_with_the_logs_whichever_comes(worker: Worker) -> None:
    for cron in ("0 1 * * *", ""):
        night = worker.ask("describe", {"NIGHTLY_CRON": cron})["nightly_embeddings"]
        assert (night["waits_for"], night["any"]) == (["champion", "logs"], "AssetAny")


def test_one_champion_and_one_date_are_pinned_for_the_whole_night(worker: Worker, stub: Stub) -> None:
    pinned = {"ds": "2026-03-05", "recommender_id": "12e4", "encoder_id": "77", "space_id": "0123456789abcdef"}
    published = {"space_id": "0123456789abcdef", "sequence": 9}
    stub.plan(results={"pin": pinned, "project": {"space_id": "another"}, "publish": published})
    worker.run("nightly_embeddings")
    calls = {call["job"]: call for call in stub.calls()}
    assert {name for name, call in calls.items() if call["ds"] != "2026-03-05"} == {"pin"}
    assert calls["embed"]["set"]["embed.encoder"] == '"77"'
    assert calls["project"]["set"] == {"project.recommender": '"12e4"'}
    assert calls["publish"]["set"] == {"publish.space": '"0123456789abcdef"'}
    assert calls["lookup"]["set"] == {"lookup.space": '"0123456789abcdef"', "lookup.sequence": "9"}
    assert worker.ask("announced", asset="space")[0] == {"ds": "2026-03-05"}


def test_the_hour_goes_by_what_serves_and_touches_no_table_of_the_nights(worker: Worker, stub: Stub) -> None:
    pinned = {"ds": "2026-03-05", "recommender_id": "12e4", "encoder_id": "77", "space_id": "s"}
    stub.plan(results={"pin": pinned})
    assert worker.run("hourly_items", "2026-03-09")["state"] == "success"
    calls = {call["job"]: call for call in stub.calls()}
    assert calls["pin"]["set"] == {"pin.which": "serving"}
    assert {call["ds"] for name, call in calls.items() if name != "pin"} == {"2026-03-05"}
    assert all(call["set"][f"{name}.arriving"] == "true" for name, call in calls.items() if name != "pin")
    assert (calls["embed"]["set"]["embed.encoder"], calls["publish"]["set"]["publish.space"]) == ('"77"', '"s"')


def test_after_a_promotion_the_newest_snapshot_is_asked_for_and_on_schedule_the_date(worker: Worker) -> None:
    def asks(run_type: str, *assets: str) -> list[str]:
        return list(worker.ask("rendered", dag="nightly_embeddings", task="pin", run_type=run_type, assets=assets))[-3:]

    for assets in (["champion"], ["logs", "champion"]):
        assert asks("asset_triggered", *assets) == ["2026-03-01", "--set", "pin.newest=true"]
    assert asks("asset_triggered", "logs") == ["2026-03-01", "--set", "pin.newest=false"], "logs say which date they are of"
    assert asks("scheduled") == ["2026-03-01", "--set", "pin.newest=false"]
    assert asks("backfill")[-1] == asks("manual")[-1] == "pin.newest=false"


def test_a_run_without_logical_date_works_on_its_parameter(worker: Worker, stub: Stub) -> None:
    stub.plan()
    assert worker.run("nightly_embeddings", None, {"ds": "2025-12-31"})["state"] == "success"
    assert {call["ds"] for call in stub.calls()} == {"2025-12-31"}


def test_a_run_without_any_date_works_on_the_last_day_that_was_over(worker: Worker) -> None:
    def date(params: dict[str, Any], logical: str | None, told: list[str], run_type: str = "manual") -> str:
        return str(worker.ask("snapshot_date", params=params, logical_date=logical, told=told, run_type=run_type))

    assert date({}, None, []) == "2026-03-01"
    assert date({}, None, [""]) == "2026-03-01"
    assert date({}, None, ["2026-02-20", "2026-02-27"]) == "2026-02-27"
    assert date({}, "2026-02-15T01:00:00+00:00", ["2026-02-20"]) == "2026-02-15"
    assert date({"ds": "2026-01-01"}, "2026-02-15T01:00:00+00:00", []) == "2026-01-01"
    for run_type in ("scheduled", "backfill"):  # of a week: its last day
        assert date({}, "2026-02-23T01:00:00+00:00", [], run_type) == "2026-03-01"
    assert date({"ds": "2026-01-01"}, "2026-02-23T01:00:00+00:00", [], "scheduled") == "2026-01-01"


def test_dates_that_a_run_leaves_out_are_named(worker: Worker) -> None:
    def left_out(*told: str) -> str:
        more = {"by": "snapshot_date", "params": {}, "logical_date": None, "run_type": "asset_triggered"}
        return "".join(worker.ask("logged", told=told, **more)).partition("left out: ")[2].partition(".")[0]

    assert left_out("2026-02-26", "2026-02-27", "2026-02-20", "2026-02-26", "") == "2026-02-20, 2026-02-26"
    assert left_out("2026-02-27", "2026-02-27") == left_out() == ""


def test_a_date_that_is_none_never_starts(worker: Worker, stub: Stub) -> None:
    stub.plan()
    with pytest.raises(AssertionError, match="yesterday"):
        worker.run("nightly_embeddings", None, {"ds": "yesterday"})
    assert stub.calls() == []


@pytest.mark.parametrize("status", [2, 3])
def test_a_fault_of_the_input_and_a_refusal_are_final(worker: Worker, stub: Stub, status: int) -> None:
    stub.plan(acts={"extract": [status]})
    done = worker.run("nightly_embeddings")
    assert done["state"] == "failed"
    assert done["tasks"]["extract"] == ["failed", 1]
    assert done["tasks"]["publish"][0] == done["tasks"]["served"][0] == "upstream_failed"
    assert [call["job"] for call in stub.calls()] == ["pin", "extract", "report"], "the report is made also after a failure"


def test_a_first_night_without_champion_ends_at_pin_with_its_remedy_and_a_report(worker: Worker, stub: Stub) -> None:
    stub.plan(acts={"pin": [2]})
    done = worker.run("nightly_embeddings", "2026-03-04")
    assert done["state"] == "failed" and done["tasks"]["pin"] == ["failed", 1]
    assert [(call["job"], call["ds"]) for call in stub.calls()] == [("pin", "2026-03-04"), ("report", "2026-03-04")]
    assert "planned, with a remedy" in worker.log.read_text()


def test_anything_else_is_tried_again(worker: Worker, stub: Stub) -> None:
    stub.plan(acts={"collect": [1, 1, 0]})
    done = worker.run("maintenance")
    assert done["state"] == "success" and done["tasks"]["collect"] == ["success", 3]


def test_a_night_whose_logs_come_late_waits_and_uses_up_no_try(worker: Worker, stub: Stub) -> None:
    stub.plan(acts={"extract": [4, 4, 4, 4, 4, 1, 4, 0]})
    done = worker.run("nightly_embeddings", "2026-03-15", RETRIES="1")
    assert done["state"] == "success" and done["tasks"]["extract"] == ["success", 2], "its one fault is its one retry"
    assert [call["job"] for call in stub.calls()].count("extract") == 8


def test_what_is_busy_or_away_is_asked_ever_later_and_not_for_ever(worker: Worker, stub: Stub) -> None:
    def asks(asked: int, hours: float = 0.0, run_type: str = "scheduled", **settings: str) -> str:
        more = {"job": "extract", "status": 4, "run_type": run_type, "asked": asked, "hours": hours}
        return str(worker.ask("judge", {"RETRY_S": "30", **settings}, **more))

    delays = [asks(asked) for asked in (0, 1, 2, 5, 400)]
    assert delays == [f"AirflowRescheduleException {seconds} s" for seconds in (30, 60, 120, 600, 600)]
    assert asks(40, 5.9).startswith("AirflowRescheduleException") and asks(40, 6.1) == "AirflowFailException"
    assert asks(9, 1.1, WAIT_HOURS="1") == "AirflowFailException"
    stub.plan(acts={"extract": [4] * 9})
    done = worker.run("nightly_embeddings", "2026-03-16", WAIT_HOURS="0.0001")
    assert done["tasks"]["extract"] == ["failed", 1]
    assert "planned, with a remedy (still, after 0.0001 h: LLMEMB_WAIT_HOURS)" in worker.log.read_text()


def test_without_a_time_to_wait_what_is_busy_has_the_usual_retries(worker: Worker, stub: Stub) -> None:
    for job in ("extract", "forget"):
        assert worker.ask("judge", {"WAIT_HOURS": "0"}, job=job, status=4, run_type="scheduled") == "AirflowException"
    stub.plan(acts={"collect": [4, 4, 0]})
    done = worker.run("maintenance", "2026-03-16", WAIT_HOURS="0", RETRIES="2")
    assert done["tasks"]["collect"] == ["success", 3]


def test_people_are_told_once_of_a_task_that_waits_for_a_quarter_of_an_hour(worker: Worker) -> None:
    def told(*asked: int, retry_s: str = "30") -> list[str]:
        more = {"by": "judge", "job": "lookup", "status": 4, "run_type": "manual", "hours": 0.3}
        lines = [line for number in asked for line in worker.ask("logged", {"RETRY_S": retry_s}, asked=number, **more)]
        return [line for line in lines if line.startswith("ALERT ")]

    assert len(told(*range(12))) == 1
    assert told(5)[0].startswith("ALERT d.t waits since ") and told(5)[0].endswith(
        " UTC: lookup waits for what is busy, away or not there yet: last line"
    )
    assert len(told(5)) == len(told(2, retry_s="400")) == 1 and told(2, 3, 4, 6, 40) == []


def test_who_waits_in_person_for_a_rollback_is_not_kept_for_hours(worker: Worker) -> None:
    def asks(job: str, hours: float, **settings: str) -> str:
        return str(worker.ask("judge", settings, job=job, status=4, run_type="manual", asked=4, hours=hours)).split()[0]

    for job in ("rollback", "forget"):
        assert [asks(job, hours) for hours in (0.2, 0.3)] == ["AirflowRescheduleException", "AirflowFailException"]
        assert asks(job, 0.2, WAIT_HOURS="0.1") == "AirflowFailException"
    assert asks("publish", 0.3) == "AirflowRescheduleException"


def test_a_killed_shard_is_repeated_and_no_other(worker: Worker, stub: Stub) -> None:
    stub.plan(acts={"embed#1": ["kill"]})
    done = worker.run("rat_training", SHARDS="3")
    assert done["state"] == "success"
    shards = [call["set"] for call in stub.calls() if call["job"] == "embed"]
    assert all(settings["embed.shards"] == "3" for settings in shards)
    known = ("latest", "opponent", "reference")
    tries = {who: sorted(one["embed.shard"] for one in shards if one["embed.encoder"] == who) for who in known}
    assert tries == {"latest": ["0", "1", "1", "2"], "opponent": ["0", "1", "2"], "reference": ["0", "1", "2"]}


def test_a_dag_run_twice_for_one_date_does_the_same_again(worker: Worker, stub: Stub) -> None:
    stub.plan()
    states = [worker.run("nightly_embeddings", *when)["state"] for when in (("2026-03-07",), (None, {"ds": "2026-03-07"}))]
    calls = [call["words"] for call in stub.calls()]
    assert states == ["success", "success"]
    assert len(calls) == 14 and calls[:7] == calls[7:]


@pytest.mark.parametrize(
    ("dag", "conf", "setting"),
    [
        ("forget", {"item": "405"}, {"forget.item": "405", "forget.items": [], "forget.unknown": False}),
        ("forget", {"items": ["405", *ODD]}, {"forget.item": "", "forget.items": ["405", *ODD], "forget.unknown": False}),
        *[("forget", {"item": odd}, {"forget.item": odd, "forget.items": [], "forget.unknown": False}) for odd in ODD[:3]],
        ("rollback", {"space": "1e10"}, {"rollback.space": "1e10"}),
    ],
)
def test_what_a_person_types_reaches_the_job_as_text(
    worker: Worker, stub: Stub, dag: str, conf: dict[str, str], setting: dict[str, Any]
) -> None:
    stub.plan()
    worker.run(dag, "2026-03-08", conf)
    said = stub.calls()[0]["set"]
    assert {key: tomllib.loads(f"value = {text}")["value"] for key, text in said.items()} == setting
    assert all(text.isascii() and "$" not in text for text in said.values())  # a pod's arguments replace $(NAME)


def test_a_task_s_process_has_its_job_s_environment_and_no_more(worker: Worker, stub: Stub) -> None:
    stub.plan()
    secrets = {"ONLINE_STORE": "redis:6379,password=hunter2", "ALERT_URL": ""}
    assert worker.run("scft_refresh", "2026-03-12", None, **secrets)["state"] == "success"
    assert worker.run("maintenance", "2026-03-12", None, **secrets)["state"] == "success"
    seen = {call["job"]: set(call["environment"]) for call in stub.calls()}
    assert all("AIRFLOW_HOME" not in names for names in seen.values())
    assert {job for job, names in seen.items() if "LLMEMB_ONLINE_STORE" in names} == {"collect", "lookup"}
    assert seen.keys() == {"extract", "scft", "collect", "lookup"}


def test_what_is_gone_back_to_may_be_of_any_age_and_must_be_what_serves(worker: Worker, stub: Stub) -> None:
    stub.plan(results={"rollback": {"space_id": "s0", "sequence": 8}})
    worker.run("rollback", "2026-03-08")
    assert stub.calls()[1]["set"] == {"lookup.space": '"s0"', "lookup.sequence": "8", "lookup.max_age_days": "0"}


def test_half_a_character_starts_no_job(worker: Worker, stub: Stub) -> None:
    stub.plan()
    assert worker.run("forget", "2026-03-08", {"item": "a\ud83d"})["state"] == "failed"
    assert stub.calls() == []


def test_a_promoted_or_refused_challenger_asks_nobody(worker: Worker, stub: Stub) -> None:
    stub.plan()
    done = worker.run("rat_training")["tasks"]
    assert (done["ask"][0], done["refit"][0]) == ("skipped", "success")
    stub.plan(acts={"promote": [3]})
    done = worker.run("rat_training", "2026-03-02")
    assert done["state"] == "failed" and done["tasks"]["ask"][0] == done["tasks"]["refit"][0] == "upstream_failed"


def test_a_persons_yes_and_no_both_reach_promote_and_so_does_silence(worker: Worker) -> None:
    def settings(option: str, name: str | None) -> Any:
        who = None if name is None else {"id": "7", "name": name}
        return worker.ask("answered", answer={"chosen_options": [option], "responded_by_user": who})

    def said(yes: str, no: str) -> dict[str, str]:
        return {"promote.approved_by": yes, "promote.overruled_by": yes, "promote.rejected_by": no}

    assert settings("Approve", "Ada") == said('"Ada"', '""')
    assert settings("Reject", "405") == said('""', '"405"')
    assert settings("Reject", None) == said('""', '"nobody in time"')


def test_people_are_told_when_they_are_asked_and_reminded_before_the_answer_becomes_no(worker: Worker) -> None:
    asked = worker.ask("questions")
    assert asked["ask"]["default"] == ["Ask again"] and asked["ask_again"]["default"] == ["Reject"]
    assert asked["ask"]["downstream"] == ["promote_by_hand", "unanswered"]
    assert asked["ask_again"]["downstream"] == ["promote_by_hand"]
    assert [asked[name]["days"] for name in ("ask", "ask_again")] == [2, 1]
    assert asked["ask"]["told"] == ["ALERT rat_training.ask: Let recommender r7 serve? Its gates leave it to you."]
    assert "rat_training.ask_again: Reminder: Let recommender r7 serve?" in asked["ask_again"]["told"][0]


def test_a_champion_is_announced_once_it_is_trained_on_all_events(worker: Worker) -> None:
    assert worker.ask("announces", dag="rat_training", task="refit", results=[{"promoted": True}, {"promoted": False}]) == [
        True,
        False,
    ]
    assert worker.ask("describe")["rat_training"]["tasks"]["promote_by_hand"]["downstream"] == ["refit"]


def test_an_encoder_is_announced_only_where_one_was_made(worker: Worker) -> None:
    assert worker.ask("announces", dag="scft_refresh", task="scft", results=[{"due": True}, {"due": False}]) == [True, False]


def test_an_old_date_never_says_that_the_encoder_is_due(worker: Worker) -> None:
    def says(run_type: str, *assets: str, published: Any = None) -> list[bool]:
        results = [{"refresh_encoder": "moved"}, {"refresh_encoder": ""}]
        more = {"run_type": run_type, "assets": assets, "published": published}
        return list(worker.ask("announces", dag="nightly_embeddings", task="report", results=results, **more))

    serves = {"space_id": "s1", "sequence": 2}
    for run_type, assets in (("scheduled", []), ("asset_triggered", ["champion"]), ("asset_triggered", ["logs"])):
        assert says(run_type, *assets, published=serves) == [True, False]
    assert says("scheduled") == [True, False], "a night that failed to publish still has the newest texts"
    assert says("asset_triggered", "logs") == [False, False], "its `publish` was skipped"
    assert says("backfill") == says("backfill", published=serves) == [False, False]


def test_a_backfill_leaves_what_serves_and_hides_nothing_else(worker: Worker) -> None:
    def verdict(job: str, status: int, run_type: str, *assets: str) -> str:
        return str(worker.ask("judge", job=job, status=status, run_type=run_type, assets=assets))

    assert verdict("publish", 5, "backfill") == "AirflowSkipException"
    assert verdict("publish", 5, "asset_triggered", "logs") == "AirflowSkipException", "logs of a day came after the next day's"
    for assets in (["champion"], ["logs", "champion"], []):
        assert verdict("publish", 5, "asset_triggered", *assets) == "AirflowFailException"
    assert verdict("publish", 3, "backfill") == "AirflowFailException", "what it read back differs, say: no night may hide that"
    assert (
        verdict("publish", 5, "scheduled")
        == verdict("publish", 3, "scheduled")
        == verdict("extract", 3, "backfill")
        == "AirflowFailException"
    )
    assert verdict("publish", 1, "backfill") == verdict("embed", -9, "manual") == "AirflowException"
    assert verdict("publish", 4, "backfill") == "AirflowException", "busy or away: again, but nobody waits for logs of long ago"
    assert verdict("publish", 0, "manual") == ""


def test_a_pod_ends_as_its_job_did_whatever_libraries_say_last(worker: Worker) -> None:
    def end(status: int | None, *lines: str) -> list[Any]:
        return list(worker.ask("pod_end", status=status, lines=lines))

    chat = "[rank0]: Warning: destroy_process_group() was not called before program exit"
    assert end(0, "scft: step 1", '{"encoder_id": "e1"}', chat) == ["", "", {"encoder_id": "e1"}]
    for status in (2, 3):
        assert end(status, "scft: refused: it collapsed", chat) == ["AirflowFailException", "scft: refused: it collapsed", None]
    assert end(3, "scft: no answer from http://u:hunter2@h", chat)[1] == "scft: no answer from http://***@h"
    assert end(1, "scft: step 1", chat)[0] == end(137)[0] == "AirflowException"
    assert end(4, "scft: MLflow is away", chat)[0] == "AirflowRescheduleException"
    assert end(None, "scft: step 1") == ["AirflowException", "Pod returned a failure", None], "evicted: tried again"


@pytest.mark.parametrize("how", ["execute", "trigger_reentry"])
def test_a_pod_s_result_comes_back_whether_the_worker_waited_or_the_triggerer_did(worker: Worker, how: str) -> None:
    def ran(status: int | None, *lines: str) -> Any:
        return worker.ask("pod_run", how=how, status=status, lines=lines)

    done = ran(0, "scft: step 1", '{"encoder_id": "e1"}', "[rank0]: a warning at the end")
    assert (done["value"], done["raised"]) == ({"encoder_id": "e1"}, "")
    assert done["pushed"] == [["return_value", {"encoder_id": "e1"}]]
    assert done["given"] == [[{"status": "success"}] if how == "trigger_reentry" else []]
    for status in (2, 3):
        refused = ran(status, "scft: refused: it collapsed")
        assert (refused["raised"], refused["pushed"]) == ("AirflowFailException: scft: refused: it collapsed", [])
    assert ran(1, "scft: step 1")["raised"].startswith("AirflowException: scft ended with status 1")
    assert ran(4, "scft: MLflow is away")["raised"].startswith("AirflowRescheduleException")
    for nothing in (ran(0, "scft: step 1"), ran(None)):  # its log was lost, or the pod with it: the job is run again
        assert nothing["raised"].startswith("AirflowException: scft ended well, but its Result is in no line")
        assert nothing["pushed"] == []


class Inbox(http.server.BaseHTTPRequestHandler):
    """Keeps what was posted."""

    letters: list[dict[str, Any]] = []  # noqa: RUF012 — http.server makes an instance for each request

    def do_POST(self) -> None:
        Inbox.letters.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


def test_a_failure_is_told_once_at_the_alert_address(worker: Worker, stub: Stub) -> None:
    stub.plan(acts={"collect": [1, 3]})
    server = http.server.HTTPServer(("127.0.0.1", 0), Inbox)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    worker.run("maintenance", "2026-03-05", ALERT_URL=f"http://127.0.0.1:{server.server_port}/")
    server.shutdown()
    assert [letter["text"] for letter in Inbox.letters] == ["maintenance.collect failed: collect: error: planned, with a remedy"]
    assert Inbox.letters[0]["try"] == 2


def test_an_alert_address_that_is_down_changes_nothing(worker: Worker, stub: Stub) -> None:
    stub.plan(acts={"collect": [3]})
    assert worker.run("maintenance", "2026-03-06", ALERT_URL="http://127.0.0.1:9/")["state"] == "failed"
    assert "did not reach LLMEMB_ALERT_URL" in worker.log.read_text()


def test_stopping_a_task_stops_the_job_and_what_it_started(tmp_path: Path) -> None:
    job = tmp_path / "python"
    job.write_text('#!/bin/sh\nsleep 600 &\necho "$$ $!" >"$(dirname "$0")/pids"\nwait\n')
    job.chmod(0o755)
    code = (
        "import os, pathlib, threading, time; from job_process import JobProcess; "
        "task = JobProcess(task_id='t', command=['embed']); "
        "thread = threading.Thread(target=lambda: task.execute({}), daemon=True); thread.start(); "
        f"pids = pathlib.Path({str(tmp_path / 'pids')!r}); "
        "exec('while not (pids.exists() and pids.read_text().strip()): time.sleep(0.02)'); task.on_kill(); time.sleep(0.2); "
        "print([pid for pid in pids.read_text().split() if os.path.exists(f'/proc/{pid}') "
        "and open(f'/proc/{pid}/stat').read().split()[2] != 'Z'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "dags"), "AIRFLOW_HOME": str(tmp_path), "LLMEMB_PYTHON": str(job)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]
