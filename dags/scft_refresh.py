"""WHEN the encoder is trained again: weekly, or as soon as a night's report finds that the texts have moved too far.

(Airflow looks for DAGs only in files that name it: this line makes this one a DAG file.)
"""

from __future__ import annotations

from job_task import asset, job_dag, job_task, schedule

DOC = """
`extract` takes a snapshot, `scft` fine-tunes the LLM on the items' own attributes, if its own figures say that it is due.
Then `rat_training` starts by itself.
"""

with job_dag(
    "scft_refresh",
    schedule=schedule("SCFT_CRON", "0 4 * * 6", asset("encoder_due")),
    doc=DOC,
):
    job_task("extract", makes=asset("sequences")) >> job_task(
        "scft",
        makes=asset("encoder"),
        # where it was not due, the encoder is the one of before: nothing to train a recommender on
        when=lambda result, _: bool(result.get("due", True)),
    )
