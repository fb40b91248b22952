"""WHEN the recommender is trained: after each refresh of the encoder, and weekly on new logs; gates and people let it out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import task
from job_process import setting
from job_task import asset, job_dag, job_task, schedule

DOC = """
`embed` runs the catalogue through the newest encoder, `pretrain` trains the collaborative teacher, `rat` the recommender,
`embed_opponent` brings in what the champion's encoder has not seen yet, `evaluate` compares the two on the same held-out data,
`promote` lets the new one out, refuses it, or, if the data can't tell, leaves it to a person, whose answer it records.
"""
SHARDS = int(setting("SHARDS", "1"))
GATES = """
{%- set told = ti.xcom_pull("promote") -%}
Challenger {{ told["recommender_id"] }} (encoder {{ told["encoder_id"] }}) against
{{ told["champion_id"] or "no champion" }}, on the same held-out events. Differences in NDCG with paired 95 % intervals:

| gate | verdict | figures |
|---|---|---|
{% for reason in told["reasons"] -%}
| {{ reason["gate"] }} | {{ reason["verdict"] }} | {{ reason["text"] }} |
{% endfor %}
"""
ANSWERED = """
{%- set answer = ti.xcom_pull("ask") -%}
{%- set who = (answer["responded_by_user"] or {"name": "nobody in time"})["name"] -%}
{{ (who if answer["chosen_options"] == ["OPTION"] else "") | tojson }}"""
"""Who chose OPTION, empty where nobody did."""


@task.short_circuit
def undecided(result: dict[str, Any]) -> bool:
    """Goes on to a person only where the gates could not tell."""
    return bool(result["decision"] == "undecided")


def promoted(result: Mapping[str, Any]) -> bool:
    """Whether there is a new champion."""
    return bool(result["decision"] == "promoted")


with job_dag(
    "rat_training",
    schedule=schedule("RAT_CRON", "0 4 * * 3", asset("encoder")),
    doc=DOC,
):
    promote = job_task("promote", makes=asset("champion"), when=promoted)
    (
        job_task("embed", settings={"encoder": "latest"}, shards=SHARDS)
        >> job_task("pretrain")
        >> job_task("rat")
        >> job_task("embed", task_id="embed_opponent", settings={"encoder": "opponent"}, shards=SHARDS)
        >> job_task("evaluate")
        >> promote
    )
    ask = HITLOperator(
        task_id="ask",
        subject="Let recommender {{ ti.xcom_pull('promote')['recommender_id'] }} serve? Its gates can't tell.",
        body=GATES,
        options=["Approve", "Reject"],
        defaults="Reject",
        response_timeout=dt.timedelta(days=3),
    )
    undecided(promote.output) >> ask
    ask >> job_task(
        "promote",
        task_id="promote_by_hand",
        settings={"approved_by": ANSWERED.replace("OPTION", "Approve"), "rejected_by": ANSWERED.replace("OPTION", "Reject")},
        makes=asset("champion"),
        when=promoted,
    )
