"""WHEN the recommender is trained: after each refresh of the encoder, and weekly on new logs; gates and people let it out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import task
from job_task import asset, job_dag, job_task, schedule, setting

DOC = """
`embed` runs the catalogue through the newest encoder, `pretrain` trains the collaborative teacher, `rat` the recommender,
`evaluate` compares it with the champion on held-out data, `promote` lets it out, refuses it, or, if the data can't tell, leaves
it to a person.
"""
GATES = """
| gate | verdict | figures |
|---|---|---|
{% for reason in ti.xcom_pull("promote")["reasons"] -%}
| {{ reason["gate"] }} | {{ reason["verdict"] }} | {{ reason["text"] }} |
{% endfor %}
"""


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
        job_task("embed", settings={"encoder": "latest"}, shards=int(setting("SHARDS", "1")))
        >> job_task("pretrain")
        >> job_task("rat")
        >> job_task("evaluate")
        >> promote
    )
    ask = ApprovalOperator(
        task_id="ask",
        subject="Let recommender {{ ti.xcom_pull('promote')['recommender_id'] }} serve? Its gates can't tell.",
        body=GATES,
        defaults="Reject",
        response_timeout=dt.timedelta(days=3),
    )
    undecided(promote.output) >> ask
    ask >> job_task(
        "promote",
        task_id="promote_by_hand",
        settings={"approved_by": "{{ ti.xcom_pull('ask')['responded_by_user']['name'] }}"},
        makes=asset("champion"),
        when=promoted,
    )
