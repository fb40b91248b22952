"""WHEN the catalogue is embedded and served: every night, and when a new champion is promoted."""

from __future__ import annotations

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import TriggerRule
from job_process import setting
from job_task import asset, job_dag, job_task, schedule

DOC = """
`extract` takes a snapshot, `embed` runs what changed through the champion's encoder, `project` bends it with the champion's
adapter, `publish` brings the space online, `lookup` reads it back as a client would. `report` says how the night went, also after
a failure; the run is green only where `lookup` is.

A night waits for the logs where LLMEMB_NIGHTLY_CRON is empty and the load that brings them updates the asset `logs`
(`llmemb://logs`, the date as `ds` in its extra). By the clock, `extract` ends where a day isn't there (`extract.max_age_days`).

Before the first champion there is nothing to serve: `embed` then says so. Run `scft_refresh` and `rat_training` first.
A range of dates: `airflow backfill create --dag-id nightly_embeddings --from-date 2026-01-01 --to-date 2026-01-31`.
"""

with job_dag(
    "nightly_embeddings",
    schedule=schedule("NIGHTLY_CRON", "0 1 * * *", asset("champion"), asset("logs")),
    doc=DOC,
):
    lookup = job_task("lookup")
    (
        job_task("extract", makes=asset("sequences"))
        >> job_task("embed", settings={"encoder": "champion"}, shards=int(setting("SHARDS", "1")))
        >> job_task("project")
        # the space that this run projected: another may have become champion meanwhile
        >> job_task("publish", settings={"space": "{{ ti.xcom_pull('project')['space_id'] | tojson }}"}, makes=asset("space"))
        >> lookup
    )
    lookup >> job_task(
        "report",
        trigger_rule=TriggerRule.ALL_DONE,
        makes=asset("encoder_due"),
        when=lambda result: bool(result["refresh_encoder"]),
    )
    # a run is as good as its last tasks, and the report's success must not hide a failed night
    lookup >> EmptyOperator(task_id="served")
