"""Run measurements in processes of their own, each with a time limit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.report.provenance import ROOT

OK = "ok"


class Job(NamedTuple):
    """A process to run: its name, Python's arguments, and its time limit in seconds."""

    name: str
    command: list[str]
    limit_s: float


class Outcome(NamedTuple):
    """How a job ended: its verdict (`ok`, or what went wrong), its duration in seconds, and its output."""

    verdict: str
    seconds: float
    output: str


def run_job(job: Job, output: Path) -> Outcome:
    """Run a job and write its output to the file `output`. A crash, a hang or a full memory ends only this job."""
    began = time.monotonic()
    with _process(job.command, output) as process:
        try:
            code = process.wait(timeout=job.limit_s)
        except subprocess.TimeoutExpired:
            code = None
    text = output.read_text(errors="replace")
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "no output")
    if code is None:
        verdict = f"stopped after {job.limit_s:.0f} s"
    elif code < 0:
        verdict = f"killed by {signal.Signals(-code).name}: {last[:200]}"
    else:
        verdict = OK if code == 0 else f"exit code {code}: {last[:200]}"
    return Outcome(verdict, time.monotonic() - began, text)


@contextlib.contextmanager
def _process(command: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environ, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        # this shell waits until the current process ends, for whatever reason, and then kills the job
        heir = subprocess.Popen(
            ["sh", "-c", f"read _; kill -KILL -{process.pid}"], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            yield process
        finally:
            heir.kill()
            heir.communicate()
            # also kill the job's children, such as a compiler's workers
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
