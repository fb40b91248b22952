"""Airflow's LocalExecutor, which counts what it has begun: a scheduler takes no more tasks than its machine has slots for.

Airflow's own (3.3) counts nothing: whatever AIRFLOW__CORE__PARALLELISM says, one scheduler takes all tasks that may start and
lets them wait in its queue, while another machine has nothing to do (apache/airflow, pull request 71914).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.executors import local_executor


class LocalExecutor(local_executor.LocalExecutor):  # type: ignore[misc]
    """AIRFLOW__CORE__EXECUTOR=slots.LocalExecutor names it, and AIRFLOW__CORE__PLUGINS_FOLDER this folder, for all parts."""

    def _process_workloads(self, workload_list: Sequence[Any]) -> None:
        """Hands tasks to the processes of this machine. A task's key goes when its process has ended (`change_state`)."""
        self.running.update(workload.key for workload in workload_list)
        super()._process_workloads(workload_list)

    def _check_workers(self) -> None:
        """Replaces processes that have died. What they were at is not known: nothing counts then, as in Airflow's own."""
        if not all(worker.is_alive() for worker in self.workers.values()):
            self.running.clear()
        super()._check_workers()
