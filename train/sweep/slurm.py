"""Starts the workers of a sweep as Slurm jobs, with submitit."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from train.common.errors import UserError
from train.sweep.plan import Plan
from train.sweep.work import work

_TIMEOUT_MINUTES = 24 * 60


@dataclass(frozen=True)
class Worker:
    """The program of one Slurm job: trains runs of the sweep until no run is left."""

    plan: Plan
    processes: int

    def __call__(self) -> None:
        work(self.plan, self.processes, "", threading.Event())

    def checkpoint(self) -> DelayedSubmission:
        """Return the job that submitit queues when Slurm preempts this job: the same worker again."""
        return DelayedSubmission(self)


def run_jobs(plan: Plan, jobs: int, processes: int, parameters: list[str]) -> None:
    """Start Slurm jobs, and wait until all of them end.

    Args:
        plan: the sweep.
        jobs: number of jobs.
        processes: number of processes of each run.
        parameters: parameters of submitit's AutoExecutor, as texts NAME=VALUE.

    Raises:
        UserError: a parameter is unknown, or a job failed.
    """
    executor = submitit.AutoExecutor(folder=plan.folder / "jobs")
    given: dict[str, Any] = {"name": plan.config.run_id, "timeout_min": _TIMEOUT_MINUTES}
    for text in parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--slurm: expected NAME=VALUE, such as slurm_partition=gpu, got {text!r}")
        given[name] = int(value) if value.isdigit() else value
    try:
        executor.update_parameters(**given)
    except (NameError, AssertionError) as error:
        raise UserError(f"--slurm: {str(error).splitlines()[0]}") from error
    with executor.batch():
        started = [executor.submit(Worker(plan, processes)) for _ in range(jobs)]
    failed = [job for job in started if job.exception()]
    if failed:
        raise UserError(
            f"{failed[0].paths.stderr}: {len(failed)} of {jobs} jobs failed: read this file, then type the same command"
        )
