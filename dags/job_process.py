"""One job as a process of this machine, and what its exit status means to Airflow; settings are environment variables."""

from __future__ import annotations

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
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException
from job_environment import environment_of

ROOT = Path(__file__).resolve().parent.parent
GRACE_S = 30
"""What a job gets to save its checkpoint when it is told to stop."""

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
        log.info("$ %s", " ".join(line))
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
                last = text.rstrip() or last
                log.info("%s", text.rstrip())
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
    """What an exit status means (README): 2, 3 and 5 are final, 4 (busy or away) and all else is worth a retry.

    A backfill must not turn serving back, so a `publish` that refuses its date as older than what serves (5) is skipped there.
    """
    if status == 0:
        return
    if status == 5 and context["dag_run"].run_type == "backfill":
        raise AirflowSkipException(f"the lake is filled, what serves stays: {last}")
    if status in (2, 3, 5):
        raise AirflowFailException(last or f"{job} ended with status {status}")
    # a lease that is held, a store or MLflow that is down: time heals it, and it is told as what it is
    what = "is busy or away" if status == 4 else f"ended with status {status}"
    raise AirflowException(f"{job} {what}: {last}")
