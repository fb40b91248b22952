"""WHEN new and changed items are served between two nights: every hour, and when the catalogue's owner says so.

(Airflow looks for DAGs only in files that name it: this line makes this one a DAG file.)
"""

from __future__ import annotations

from job_task import asset, job_dag, job_task, schedule

DOC = """
`pin` asks what serves, `extract` looks what is new or changed in the table of items since that snapshot, `embed` and `project`
take it through the models of what serves, `publish` lays it over the space that serves. Nothing is trained, no log is read, and
no table of the nights is touched: the next night ends with the same bytes. Where a night publishes meanwhile, the hour does
nothing.

It starts hourly, and at once where another DAG makes the asset `llmemb://catalogue`. Before the first publish there is nothing to
lay anything over, and `pin` says so.
"""
DS = "{{ ti.xcom_pull('pin')['ds'] }}"
TOLD = "{{{{ ti.xcom_pull('pin')['{}'] | toml }}}}"

with job_dag("hourly_items", schedule=schedule("HOURLY_CRON", "30 * * * *", asset("catalogue")), doc=DOC):
    (
        job_task("pin", settings={"which": "serving"})
        >> job_task("extract", ds=DS, settings={"arriving": "true"})
        # a pool of its own: behind a training in `gpu` the hour would become a day
        >> job_task("embed", ds=DS, pool="hourly", settings={"arriving": "true", "encoder": TOLD.format("encoder_id")})
        >> job_task("project", ds=DS, settings={"arriving": "true", "recommender": TOLD.format("recommender_id")})
        >> job_task("publish", ds=DS, settings={"arriving": "true", "space": TOLD.format("space_id")})
    )
