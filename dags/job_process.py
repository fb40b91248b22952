"""One job as a process of this machine, and what its exit status means to Airflow; settings are environment variables."""

from __future__ import annotations

import datetime as dt
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
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
"""At most so long until a job that waits is asked again."""
TOLD_S = 900
"""People are told once of a task that has been asked again for so long."""
IN_PERSON = ("rollback", "forget")
"""Jobs that a person has started and waits for: they are asked again for TOLD_S at most, then they fail."""

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
    """What an exit status means (docs/jobs.md): 2, 3, 5 are final, 4 (busy, away, not there yet) waits, else a retry is worth it.

    What fills the lake must not turn serving back, so a `publish` that refuses its date as older than what serves (5) is skipped
    there. Nor does a backfill wait: logs of an old date that are not there never come; a lease or store has the usual retries, as
    everything has where LLMEMB_WAIT_HOURS is 0.
    """
    if status == 0:
        return
    if status == 5 and fills(context):
        raise AirflowSkipException(f"the lake is filled, what serves stays: {last}")
    if status in (2, 3, 5):
        raise AirflowFailException(last or f"{job} ended with status {status}")
    hours = min(float(setting("WAIT_HOURS", "6")), TOLD_S / 3600 if job in IN_PERSON else math.inf)
    if status == 4 and hours and context["dag_run"].run_type != "backfill":
        wait(f"{job} waits for what is busy, away or not there yet: {last}", hours, context)
    what = "met what is busy, away or not there yet" if status == 4 else f"ended with status {status}"
    raise AirflowException(f"{job} {what}: {last}")


def fills(context: Any) -> bool:
    """Whether a run fills a date of the lake, whatever serves by then: a backfill, or a night that late logs started."""
    started_by = {asset.name for asset in context.get("triggering_asset_events") or ()}
    return context["dag_run"].run_type == "backfill" or started_by == {"logs"}


def wait(what: str, hours: float, context: Any) -> None:
    """Has the task asked again later, in LLMEMB_RETRY_S seconds, then after twice as long each time, up to ten minutes.

    Logs that are not there yet, a lease that is held, a store or MLflow that is down: time heals it. A wait is none of the task's
    tries and holds no slot. Raises AirflowRescheduleException; AirflowFailException once it has lasted so many hours, counted in
    this try: Airflow forgets the waits of earlier ones.
    """
    now, asked = dt.datetime.now(dt.UTC), int(context.get("task_reschedule_count", 0))
    began = context["ti"].get_first_reschedule_date(context) or now
    if now - began >= dt.timedelta(hours=hours):
        raise AirflowFailException(f"{what} (still, after {hours:g} h: LLMEMB_WAIT_HOURS)")
    if asked == told_at():
        tell(f"{context['ti'].dag_id}.{context['ti'].task_id} waits since {began:%H:%M} UTC: {what}", facts_of(context["ti"]))
    seconds = delay_s(asked)
    log.warning("%s: asked again in %.0f s, for up to %g h", what, seconds, hours)
    raise AirflowRescheduleException(now + dt.timedelta(seconds=seconds))


def delay_s(asked: int) -> float:
    """Seconds until a task that was asked again so often is asked once more."""
    return min(float(setting("RETRY_S", "30")) * 2.0 ** min(asked, 20), LONGEST_S)


def told_at() -> int:
    """How often a task was asked again when its delays come to TOLD_S: by a number people are told once, and nothing is kept."""
    asked, passed = 0, 0.0
    while passed < TOLD_S and asked < 100:
        asked, passed = asked + 1, passed + delay_s(asked)
    return asked


# ------------------------------------------------------------------------------------------------------------------ alerts


def facts_of(ti: Any) -> dict[str, Any]:
    """Which task instance an alert is about."""
    return {"dag": ti.dag_id, "task": ti.task_id, "run": ti.run_id, "try": ti.try_number}


def tell(text: str, facts: Mapping[str, Any]) -> None:
    """Logs an alert and posts it as JSON, with a `text` as chat systems take it; never fails the caller."""
    text = redacted(text)
    log.error("ALERT %s", text)
    if url := setting("ALERT_URL"):
        try:
            body = json.dumps({"text": text, **facts}).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=10).close()
        except Exception as error:  # whatever it is: its text may quote the address, and whoever has that may post there
            log.error("the alert did not reach LLMEMB_ALERT_URL: %s %s", type(error).__name__, getattr(error, "code", ""))
