"""WHEN the store is tidied and audited: daily, apart from the nights; and the way back, on demand."""

from __future__ import annotations

from airflow.sdk import Param
from job_process import setting
from job_task import job_dag, job_task, schedule, told_by

with job_dag(
    "maintenance",
    schedule=schedule("MAINTENANCE_CRON", "0 12 * * *"),
    doc="`collect` removes spaces past their grace period; `lookup` then compares every vector that serves with the lake's.",
):
    job_task("collect") >> job_task("lookup", settings={"sample": "0", "max_age_days": setting("MAX_AGE_DAYS", "3")})

with job_dag(
    "rollback",
    schedule=None,
    doc="Serves another space again: the one before, or the one given. One write, no copy.",
    params={"space": Param("", type="string", description="The space to go back to; empty takes the one before")},
):
    # what is gone back to may be of any age
    job_task("rollback", settings={"space": "{{ params.space | toml }}"}) >> job_task(
        "lookup", settings={**told_by("rollback"), "max_age_days": "0"}
    )

with job_dag(
    "forget",
    schedule=None,
    doc="Removes items everywhere, and keeps them away: lake, every space, indexes, history.",
    params={
        "item": Param("", type="string", description="An item's id"),
        "items": Param([], type="array", items={"type": "string", "minLength": 1}, description="Further ids"),
        "unknown": Param(False, type="boolean", description="Also ids that nothing knows, so that they never come"),
    },
):
    job_task(
        "forget",
        settings={
            "item": "{{ params.item | toml }}",
            "items": "{{ params['items'] | toml }}",
            "unknown": "{{ params.unknown | toml }}",
        },
    ) >> job_task("lookup", settings={"max_age_days": "0"})
