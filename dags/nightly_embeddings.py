"""WHEN the catalogue is embedded and served: every night, and when a new champion is promoted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import TriggerRule
from job_process import fills, setting
from job_task import asset, job_dag, job_task, schedule, told_by

DOC = """
`pin` asks once who is champion, and whatever is promoted meanwhile waits for the next night. `extract` takes a snapshot, `embed`
runs what changed through the champion's encoder, `project` bends it with the champion's adapter, `publish` brings the space
online, `lookup` reads it back as a client would. `report` says how the night went, also after a failure; the run is green only
where `lookup` is. After a promotion it runs at once, with the newest snapshot there is, however old the training is by then. Logs
start it for their own date, the newest where several were told meanwhile; where a newer one serves by then, the lake is filled
and `publish` skipped.

A night waits for the logs where LLMEMB_NIGHTLY_CRON is empty and the load that brings them updates the asset `logs`
(`llmemb://logs`, the date as `ds` in its extra). By the clock, `extract` asks again where a day isn't there
(`extract.max_age_days`), after half a minute, then ever later up to ten minutes, for up to six hours (LLMEMB_WAIT_HOURS).

Before the first champion there is nothing to serve: `pin` then says so. Run `scft_refresh` and `rat_training` first.
A range of dates: `airflow backfill create --dag-id nightly_embeddings --from-date 2026-01-01 --to-date 2026-01-31`.
"""

PINNED = "{{ (ti.xcom_pull('pin') or {}).get('ds') or snapshot_date(params, dag_run, triggering_asset_events) }}"
"""The date that `pin` says; the run's own for the report of a run whose `pin` failed."""
TOLD = "{{{{ ti.xcom_pull('pin')['{}'] | toml }}}}"


def encoder_due(result: Mapping[str, Any], context: Any) -> bool:
    """Whether the encoder is to be trained again. The texts of an old date say nothing of it: not in a backfill, nor where late
    logs filled the lake and `publish` was skipped."""
    backfill = context["dag_run"].run_type == "backfill"
    old = fills(context) and (backfill or not context["ti"].xcom_pull("publish"))
    return bool(result["refresh_encoder"]) and not old


with job_dag(
    "nightly_embeddings",
    schedule=schedule("NIGHTLY_CRON", "0 1 * * *", asset("champion"), asset("logs")),
    doc=DOC,
):
    lookup = job_task("lookup", ds=PINNED, settings=told_by("publish"))
    (
        job_task("pin", settings={"newest": "{{ ('champion' in (triggering_asset_events | map(attribute='name'))) | toml }}"})
        >> job_task("extract", ds=PINNED, makes=asset("sequences"))
        >> job_task("embed", ds=PINNED, settings={"encoder": TOLD.format("encoder_id")}, shards=int(setting("SHARDS", "1")))
        >> job_task("project", ds=PINNED, settings={"recommender": TOLD.format("recommender_id")})
        >> job_task("publish", ds=PINNED, settings={"space": TOLD.format("space_id")}, makes=asset("space"))
        >> lookup
    )
    lookup >> job_task(
        "report",
        ds=PINNED,
        trigger_rule=TriggerRule.ALL_DONE,
        makes=asset("encoder_due"),
        when=encoder_due,
    )
    # a run is as good as its last tasks, and the report's success must not hide a failed night
    lookup >> EmptyOperator(task_id="served")
