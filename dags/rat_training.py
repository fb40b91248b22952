"""WHEN the recommender is trained: after each refresh of the encoder, and weekly on new logs; gates and people let it out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import TriggerRule, task
from job_process import setting
from job_task import Told, asset, job_dag, job_task, schedule

DOC = """
`embed` runs the catalogue through the newest encoder, `pretrain` trains the collaborative teacher, `rat` the recommender,
`embed_opponent` and `embed_reference` bring in what the encoders of the champion and of the fixed reference have not seen yet,
`evaluate` compares them all on the same held-out data, `promote` lets the new one out, refuses it, or leaves it to a person,
whose answer it records: where the data can't tell, a floor isn't beaten or a field leaks, and with `promote.always_ask` always.
People are told at LLMEMB_ALERT_URL when they are asked, and reminded two days later; after a third day without an answer it is
no. `refit` then trains a new champion again on all events, the newest too, by which it was judged: that is what serves.
"""
SHARDS = int(setting("SHARDS", "1"))
GATES = """
{%- set told = ti.xcom_pull("promote") -%}
Challenger {{ told["recommender_id"] }} (encoder {{ told["encoder_id"] }}) against
{{ told["champion_id"] or "no champion" }}, on the same held-out events. To approve also overrules floors that failed:

| gate | verdict | figures |
|---|---|---|
{% for reason in told["reasons"] -%}
| {{ reason["gate"] }} | {{ reason["verdict"] }} | {{ reason["text"] }} |
{% endfor %}
"""
LATER = "Ask again"
ANSWERED = """
{%- set answer = ti.xcom_pull("ask_again") or ti.xcom_pull("ask") -%}
{%- set who = (answer["responded_by_user"] or {"name": "nobody in time"})["name"] -%}
{{ (who if answer["chosen_options"] == ["OPTION"] else "") | toml }}"""
"""Who chose OPTION, empty where nobody did."""


@task.short_circuit(ignore_downstream_trigger_rules=False)  # type: ignore[untyped-decorator]
def undecided(result: dict[str, Any]) -> bool:
    """Goes on to a person only where `promote` left it to one."""
    return bool(result["decision"] == "undecided")


@task.short_circuit(ignore_downstream_trigger_rules=False)  # type: ignore[untyped-decorator]
def unanswered(answer: dict[str, Any]) -> bool:
    """Goes on to the second question only where the first had no yes or no."""
    return bool(answer["chosen_options"] == [LATER])


def promoted(result: Mapping[str, Any], _: Any) -> bool:
    """Whether the champion is of this run."""
    return bool(result["promoted"])


with job_dag(
    "rat_training",
    schedule=schedule("RAT_CRON", "0 4 * * 3", asset("encoder")),
    doc=DOC,
):
    promote = job_task("promote")
    (
        job_task("embed", settings={"encoder": "latest"}, shards=SHARDS)
        >> job_task("pretrain")
        >> job_task("rat")
        >> job_task("embed", task_id="embed_opponent", settings={"encoder": "opponent"}, shards=SHARDS)
        >> job_task("embed", task_id="embed_reference", settings={"encoder": "reference"}, shards=SHARDS)
        >> job_task("evaluate")
        >> promote
    )
    question = "Let recommender {{ ti.xcom_pull('promote')['recommender_id'] }} serve? Its gates leave it to you."
    ask = HITLOperator(
        task_id="ask",
        subject=question,
        body=GATES,
        options=["Approve", "Reject", LATER],
        defaults=LATER,
        response_timeout=dt.timedelta(days=2),
        notifiers=[Told(text=question)],
    )
    ask_again = HITLOperator(
        task_id="ask_again",
        subject=question,
        body=GATES,
        options=["Approve", "Reject"],
        defaults="Reject",
        response_timeout=dt.timedelta(days=1),
        notifiers=[Told(text=f"Reminder: {question} Without an answer within a day it is rejected.")],
    )
    by_hand = job_task(
        "promote",
        task_id="promote_by_hand",
        settings={
            "approved_by": ANSWERED.replace("OPTION", "Approve"),
            "overruled_by": ANSWERED.replace("OPTION", "Approve"),
            "rejected_by": ANSWERED.replace("OPTION", "Reject"),
        },
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
    )
    refit = job_task(
        "rat",
        task_id="refit",
        settings={"stage": "refit"},
        makes=asset("champion"),
        when=promoted,
        trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS,
    )
    [promote, by_hand] >> refit
    undecided(promote.output) >> ask
    unanswered(ask.output) >> ask_again
    [ask, ask_again] >> by_hand
