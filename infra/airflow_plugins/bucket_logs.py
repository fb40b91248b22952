"""Airflow's task logs in a bucket: each machine puts its own there, and the page shows those of all, also of one that has gone.

    LLMEMB_LOGS=s3://bucket/prefix    AIRFLOW__LOGGING__LOGGING_CONFIG_CLASS=bucket_logs.LOGGING    (for every part of Airflow)

A role or the variables AWS_... let in, as for a lake. A try's log is there once the try has ended, or waits in the triggerer.
"""

from __future__ import annotations

import datetime as dt
import os
from functools import cache
from pathlib import Path
from typing import Any

from airflow.config_templates.airflow_local_settings import BASE_LOG_FOLDER, DEFAULT_LOGGING_CONFIG
from airflow.utils.net import get_hostname

LOGGING = DEFAULT_LOGGING_CONFIG
ADDRESS = os.environ.get("LLMEMB_LOGS", "")


@cache
def store() -> Any:
    """The bucket. A log is worth a few seconds, no more: whatever comes of it, the task has ended as it has."""
    from obstore.store import from_url

    client: dict[str, Any] = {"timeout": "20s", "connect_timeout": "5s"}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        client["allow_http"] = True
    retry: Any = {"max_retries": 3, "retry_timeout": dt.timedelta(seconds=30)}
    return from_url(ADDRESS, client_options=client, retry_config=retry)  # type: ignore[call-overload]


class BucketLogs:
    """What Airflow calls a RemoteLogIO. A try that waited goes on elsewhere, or here once more: each part is an object."""

    processors = ()

    def upload(self, path: os.PathLike[str] | str, ti: Any = None) -> None:
        """Moves a file of this machine's log folder there, by its path below that."""
        import obstore

        file = Path(BASE_LOG_FOLDER, path)
        if file.exists():
            obstore.put(store(), f"{path}.{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%S%fZ}.{get_hostname()}", file)
            file.unlink()

    def read(self, relative_path: str, ti: Any) -> tuple[list[str], list[str]]:
        """Where all parts of a try's log lie, and what they say."""
        import obstore

        keys = sorted(str(one["path"]) for batch in obstore.list(store(), prefix=folder(relative_path)) for one in batch)
        mine = [key for key in keys if key.startswith(f"{relative_path}.")]
        return [f"{ADDRESS}/{key}" for key in mine], [bytes(obstore.get(store(), key).bytes()).decode() for key in mine]


def folder(path: str) -> str:
    """The folder of a task's tries: the store lists by whole names."""
    return path.rpartition("/")[0]


REMOTE_TASK_LOG = BucketLogs() if ADDRESS else None
