"""One job as a process of this machine, and what its exit status means to Airflow; settings are environment variables."""

from __future__ import annotations

import datetime as dt
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowRescheduleException, AirflowSkipException
from job_environment import environment_of
from job_redaction import redacted

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 30
"""What a job gets to save its checkpoint when it is told to stop."""
LONGEST_S = 600
"""At most so long until a job that is busy or away is asked again."""

log = logging.getLogger("airflow.task.job")


def setting(name: str, default: str = "") -> str:
    """The environment variable LLMEMB_NAME."""
    return os.environ.get(f"LLMEMB_{name}", default)


class JobProcess(BaseOperator):  # type: ignore[misc]
    """Runs a job as a process of this machine; its standard error is the task's log, as it comes, its Result the XCom."""

    template_fields: Sequence[str] = ("command",)
    ui_color = "#e8f4ea"

    def __init__(self, *, command: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.command = command
        self.child: subprocess.Popen[str] | None = None

    def execute(self, context: Any) -> Any:
        """The job's Result. Raises what `judge` makes of its exit status."""
        line = [setting("PYTHON", sys.executable), "-m", "jobs", *self.command]
        log.info("$ %s", redacted(" ".join(line)))
        started, printed, last = time.monotonic(), deque[str](maxlen=1), ""
        # a session of its own: stopping it stops what it started, a Spark driver or the ranks of a training
        self.child = subprocess.Popen(
            line,
            cwd=ROOT,
            env=environment_of(self.command[0], os.environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            assert self.child.stdout and self.child.stderr
            reader = threading.Thread(target=printed.extend, args=(self.child.stdout,), daemon=True)
            reader.start()
            for text in self.child.stderr:
                # not all of it went through the job's own net: Java's lines, a library's, Python's last words
                text = redacted(text.rstrip())
                last = text or last
                log.info("%s", text)
            status = self.child.wait()
            reader.join()
        finally:
            self.on_kill()
        judge(self.command[0], status, last, context)
        log.info("%s: done in %.1f s", self.command[0], time.monotonic() - started)
        return json.loads(printed[0])

    def on_kill(self) -> None:
        """Stops the process and what it started, if they still run: politely, then at once."""
        if self.child is None or self.child.poll() is not None:
            return
        os.killpg(self.child.pid, signal.SIGTERM)
        try:
            self.child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)


def judge(job: str, status: int | None, last: str, context: Any) -> None:
    """What an exit status means (README): 2, 3 and 5 are final, 4 (busy, away, not there yet) waits, all else is worth a retry.

    What fills the lake must not turn serving back, so a `publish` that refuses its date as older than what serves (5) is skipped
    there. Nor does a backfill wait: logs of an old date that are not there never come; a lease or store has the usual retries.
    """
    if status == 0:
        return
    if status == 5 and fills(context):
        raise AirflowSkipException(f"the lake is filled, what serves stays: {last}")
    if status in (2, 3, 5):
        raise AirflowFailException(last or f"{job} ended with status {status}")
    if status == 4 and context["dag_run"].run_type != "backfill":
        wait(f"{job} is busy or away: {last}", context)
    what = "is busy or away" if status == 4 else f"ended with status {status}"
    raise AirflowException(f"{job} {what}: {last}")


def fills(context: Any) -> bool:
    """Whether a run fills a date of the lake, whatever serves by then: a backfill, or a night that late logs started."""
    started_by = {asset.name for asset in context.get("triggering_asset_events") or ()}
    return context["dag_run"].run_type == "backfill" or started_by == {"logs"}


def wait(what: str, context: Any) -> None:
    """Has the task asked again later, in LLMEMB_RETRY_S seconds, then after twice as long each time, up to ten minutes.

    Logs that are not there yet, a lease that is held, a store or MLflow that is down: time heals it. A wait is none of the task's
    tries and holds no slot. Raises AirflowRescheduleException; AirflowFailException once it has lasted LLMEMB_WAIT_HOURS.
    """
    now, hours = dt.datetime.now(dt.UTC), float(setting("WAIT_HOURS", "6"))
    began = context["ti"].get_first_reschedule_date(context) or now
    if now - began >= dt.timedelta(hours=hours):
        raise AirflowFailException(f"{what} (still, after LLMEMB_WAIT_HOURS = {hours:g})")
    asked = int(context.get("task_reschedule_count", 0))
    seconds = min(float(setting("RETRY_S", "30")) * 2 ** min(asked, 20), LONGEST_S)
    log.warning("%s: asked again in %.0f s, for up to %g h", what, seconds, hours)
    raise AirflowRescheduleException(now + dt.timedelta(seconds=seconds))
