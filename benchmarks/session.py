"""Run the benchmarks and GPU tests within a time limit, the most important first: `python -m benchmarks session`.

A job is one process with a time limit, or one process for each kernel or test file. Output and rows are written at
once, so an error, a timeout or an interrupt loses no earlier measurement. Nothing is installed.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from benchmarks.measure.common import NOTHING_TO_RUN, RESULTS, ROOT
from benchmarks.measure.step_variants import refuse_forced, step_kernels
from benchmarks.report.results import ResultsError, read_results, rows_since
from benchmarks.report.tables import tables
from train.common.files import atomic_write

# seconds that must be left for a job to start
SHORTEST_S = 15.0
# the verdict if every command of a job ended with NOTHING_TO_RUN
NOTHING = "not possible here"
# seconds of a session for which the jobs' time limits are made; a longer session scales the limits up
PLANNED_S = 1800.0
# largest number of test files that run at once on a GPU, and bytes of GPU memory that each needs
TESTS_AT_ONCE, TEST_BYTES = 4, 16e9
# a line of bench_step's output that compares two variants
BESIDE = re.compile(r"^\S+ +[\d.]+ → .*", re.MULTILINE)


@dataclass
class Job:
    """One or more commands with a time limit.

    `commands` maps the name of an output file to the arguments for Python. `limit_s` limits the seconds of the job,
    `each_s` those of each command. At most `at_once` commands run at the same time. A job with `instead_of` is skipped
    if the job of that name succeeded.
    """

    name: str
    limit_s: float
    commands: dict[str, list[str]]
    each_s: float = math.inf
    at_once: int = 1
    instead_of: str = ""
    verdict: str = "not reached"
    seconds: float = field(default=0.0)

    @property
    def unfinished(self) -> bool:
        return self.verdict in ("not reached", "interrupted") or "stopped" in self.verdict


def plan(*, tiny: bool = False) -> list[Job]:
    """All jobs, the most important first.

    They are the step with all kernels, the step with each kernel alone, the GPU tests, and then the other benchmarks.
    """
    short = ["--tiny", "--device", "cpu"] if tiny else []

    def bench(name: str, limit_s: float, module: str, *arguments: str, instead_of: str = "") -> Job:
        return Job(name, limit_s, {name: ["-m", f"benchmarks.{module}", *arguments, *short]}, instead_of=instead_of)

    rounds = () if tiny else ("--rounds", "15")
    before, after = ("--phase", "before"), ("--phase", "after")

    def step(name: str, limit_s: float, *arguments: str, instead_of: str = "") -> Job:
        return bench(name, limit_s, "bench_step", *rounds, *arguments, instead_of=instead_of)

    alone = [step(f"kernel_{op}", 200, *before, "--variants", f"torch,{op}=triton") for op in step_kernels()]
    kernels = Job("kernel", 420, {label: c for job in alone for label, c in job.commands.items()}, each_s=200)
    tests = Job(
        "tests", 240, {path.stem: _test(path, tiny) for path in gpu_tests()}, each_s=150, at_once=tests_at_once()
    )
    others = ("sp4096_recurrence", "sp2048_normuon", "sp1024_smear_bigram")
    return [
        step("step", 400, *before, "--variants", "published,torch,golf"),
        step("step_without_kernels", 200, *before, "--variants", "published,torch", instead_of="step"),
        # if no kernel can run, the output of the job `step` says why
        *([kernels] if alone else []),
        tests,
        *([] if tiny else [step("graph", 200, *before, "--variants", "torch,torch+optimizer_graph=on")]),
        step("step_after_recurrence", 300, *after, "--variants", "published,torch,golf"),
        *(bench(name, 100, f"bench_{name}") for name in op_benches()),
        *(step(f"step_{name}", 300, "--recipe", name, "--variants", "published,torch,golf") for name in others),
        bench("evaluation", 150, "bench_evaluation"),
        bench(
            "loss_curves",
            400,
            "bench_loss_curves",
            "--variants",
            "published,torch,golf",
            *(() if tiny else ("--steps", "300")),
        ),
    ]


def stretch(jobs: Sequence[Job], seconds: float) -> None:
    """Scale up the jobs' time limits if the session is longer than planned, or if the limits add up to less than it."""
    needed = sum(job.limit_s for job in jobs if not job.instead_of) or math.inf
    factor = max(1.0, seconds / PLANNED_S, seconds / needed)
    for job in jobs:
        job.limit_s, job.each_s = min(job.limit_s * factor, seconds), job.each_s * factor


def tests_at_once() -> int:
    """How many test files run at once: as many as fit into the GPU's memory, at most `TESTS_AT_ONCE`."""
    if not torch.cuda.is_available():
        return TESTS_AT_ONCE
    return max(1, min(TESTS_AT_ONCE, int(torch.cuda.get_device_properties(0).total_memory / TEST_BYTES)))


def op_benches() -> list[str]:
    """Names of the benchmarks of single operators. The operators of a training step come first."""
    apart = {"step", "loss_curves", "evaluation", "artifact"}
    found = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - apart
    return sorted(found, key=lambda name: (name in ("gptq", "int6", "quantize"), name))


def gpu_tests() -> list[Path]:
    """Test files that contain GPU tests or test Triton kernels. The slowest, test_loop_gpu, comes first."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.stem != "test_loop_gpu", path))
    return [path for path in files if path.stem.endswith("_triton") or "mark.gpu" in path.read_text()]


def _test(path: Path, tiny: bool) -> list[str]:
    # with --tiny only GPU tests: the other kernel tests would take minutes in Triton's interpreter
    chosen = [] if path.stem.endswith("_triton") and not tiny else ["-m", "gpu"]
    # the option -q in pyproject.toml cancels one -v; the other prints a line per test
    return ["-m", "pytest", "-vv", str(path.relative_to(ROOT)), *chosen]


class Session:
    """Runs jobs and keeps their outputs, their rows and a summary in the folder `out`.

    `results` is the folder in which the benchmarks store their rows.
    """

    def __init__(self, out: Path, seconds: float, results: Path = RESULTS) -> None:
        self.out, self.results = out, results
        self.started, self.limit = time.monotonic(), seconds
        self.since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.started)

    def run(self, jobs: Sequence[Job]) -> bool:
        """Run the jobs in order until the time is up. Returns whether no job failed."""
        ended: dict[str, str] = {}
        self.keep(jobs)
        try:
            for job in jobs:
                if job.instead_of and ended.get(job.instead_of) == "ok":
                    job.verdict = f"not needed, {job.instead_of} ran"
                elif self.left >= SHORTEST_S:
                    # this is what the summary says if the session is killed during the job
                    job.verdict = "interrupted"
                    self.keep(jobs)
                    self._run(job)
                ended[job.name] = job.verdict
                self.keep(jobs)
        finally:
            self.keep(jobs)
        return all(job.verdict == "ok" or job.verdict.startswith("not ") for job in jobs)

    def _run(self, job: Job) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {job.name} …", flush=True)
        begun = time.monotonic()
        until = begun + min(job.limit_s, self.left)
        waiting = list(job.commands.items())
        running: list[tuple[str, subprocess.Popen[bytes], float, contextlib.ExitStack]] = []
        verdicts: list[str] = []
        codes: list[int] = []
        with contextlib.ExitStack() as held:
            while waiting or running:
                while waiting and len(running) < job.at_once:
                    label, command = waiting.pop(0)
                    own = held.enter_context(contextlib.ExitStack())
                    process = own.enter_context(self._process(label, command))
                    running.append((label, process, time.monotonic(), own))
                time.sleep(0.1)
                now = time.monotonic()
                for one in list(running):
                    label, process, since, own = one
                    if process.poll() is not None:
                        codes.append(process.returncode)
                        if codes[-1] not in (0, NOTHING_TO_RUN):
                            died = self._reached(label) if codes[-1] < 0 else ""
                            verdicts.append(f"{label} failed ({codes[-1]}){died}")
                    elif now >= until or now - since >= job.each_s:
                        limit = "the limit" if now >= until else f"{job.each_s:.0f} s"
                        verdicts.append(f"{label} stopped at {limit}{self._reached(label)}")
                    else:
                        continue
                    running.remove(one)
                    own.close()
                if now >= until and waiting:
                    verdicts.append(f"stopped before {', '.join(label for label, _ in waiting)}")
                    break
        job.seconds = time.monotonic() - begun
        job.verdict = "; ".join(verdicts) or ("ok" if 0 in codes else NOTHING)
        print(f"          {job.verdict}, {job.seconds:.0f} s", flush=True)
        for label in job.commands:
            if job.verdict == NOTHING or f"{label} " in job.verdict:
                lines = self._tail(label, 1 if job.verdict == NOTHING else 4)
                print("".join(f"          | {line}\n" for line in lines), end="", flush=True)

    @contextlib.contextmanager
    def _process(self, label: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        environ = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
        with (self.out / f"{label}.txt").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip
            # a shell that kills the job when this process ends, for whatever reason
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

    def _reached(self, label: str) -> str:
        """Which test was running and how many tests had ended, from pytest's output."""
        text = "\n".join(self._tail(label, 0))
        collected = re.findall(r"collected (\d+) items?(?: / \d+ deselected / (\d+) selected)?", text)
        if not collected:
            return ""
        ended = re.findall(r"^(\S*::.*?) (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text, re.MULTILINE)
        begun = re.findall(r"^\S*?::(.*?) *$", text.rpartition("\n")[2])
        return f" in {begun[0] if begun else 'its start'}, {len(ended)} of {collected[0][1] or collected[0][0]} tests had ended"

    def _tail(self, label: str, lines: int) -> list[str]:
        return (self.out / f"{label}.txt").read_text(errors="replace").splitlines()[-lines:]

    def _beside(self, jobs: Sequence[Job]) -> str:
        """The lines that compare two variants, from the outputs of `bench_step`. Empty if there are none."""
        outputs = [self.out / f"{label}.txt" for job in jobs for label in job.commands]
        lines = [line for path in outputs if path.exists() for line in BESIDE.findall(path.read_text(errors="replace"))]
        return (
            "\n".join(["ms per step of the first variant and of this one:\n", "```", *lines, "```\n\n"])
            if lines
            else ""
        )

    def keep(self, jobs: Sequence[Job]) -> None:
        """Copy the rows measured in this session to `out`, and rewrite the summary."""
        for path in self.results.glob("*.csv"):
            if rows := rows_since(path, self.since):
                atomic_write(self.out / path.name, rows)
        try:
            measured = tables(read_results(self.out))
        except ResultsError as error:
            measured = str(error)
        atomic_write(self.out / "summary.md", f"{summary(jobs)}\n\n{rest(jobs)}{self._beside(jobs)}{measured}\n")


def summary(jobs: Sequence[Job]) -> str:
    lines = ["| job | how it ended | s | output |", "|---|---|---|---|"]
    for job in jobs:
        files = ", ".join(f"`{label}.txt`" for label in job.commands) if job.seconds else "–"
        lines.append(f"| {job.name} | {job.verdict} | {job.seconds:.0f} | {files} |")
    return "\n".join(lines)


def rest(jobs: Sequence[Job]) -> str:
    """Commands for the user: one that runs the unfinished jobs, one that measures a step without the failed kernels."""
    failed = re.findall(r"\bkernel_(\w+) (?:failed|stopped at \d)", "; ".join(job.verdict for job in jobs))
    command = f"python -m benchmarks.bench_step --variants published,torch,golf-{'-'.join(failed)}"
    others = f"To measure the other kernels together: `{command}`\n\n" if failed else ""
    left = [job for job in jobs if job.unfinished]
    minutes = math.ceil(sum(job.limit_s for job in left if not job.instead_of) / 60)
    names = ",".join(job.name for job in left)
    command = f"python -m benchmarks session --minutes {max(minutes, 1)} --out session_2 --only {names}"
    return (f"To run the jobs that did not finish: `{command}`\n\n" if left else "") + others


def _first_command(job: Job) -> str:
    """A job's first command, how many more it has, and the condition under which the job runs."""
    command, *more = job.commands.values()
    others = f"  (and {len(more)} more)" if more else ""
    condition = f"  (if {job.instead_of} failed)" if job.instead_of else ""
    return f"python {shlex.join(command)}{others}{condition}"


def _names(flag: str, text: str, jobs: Sequence[Job]) -> set[str]:
    names = set(text.split(",")) if text else set()
    if unknown := sorted(names - {job.name for job in jobs}):
        raise ValueError(f"{flag}: no job {', '.join(unknown)}: expected some of {', '.join(p.name for p in jobs)}")
    return names


def run_session(out: Path, minutes: float, only: str, skip: str = "", *, tiny: bool, listing: bool) -> int:
    if not SHORTEST_S / 60 <= minutes < math.inf:
        raise ValueError(
            f"--minutes: expected at least {SHORTEST_S / 60}, because no job starts with less, got {minutes}"
        )
    jobs = plan(tiny=tiny)
    wanted, skipped = _names("--only", only, jobs), _names("--skip", skip, jobs)
    if not wanted:
        # a skipped job's replacement is skipped too
        wanted = {job.name for job in jobs if job.instead_of not in skipped or not job.instead_of}
    jobs = [job for job in jobs if job.name in wanted - skipped]
    if not jobs:
        raise ValueError("--skip: no job is left: skip fewer")
    stretch(jobs, 60 * minutes)
    if listing:
        for job in jobs:
            print(f"{job.name:<28}{job.limit_s:>5.0f} s at most  {_first_command(job)}")
        return 0
    refuse_forced()
    if not tiny and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: --tiny tests the session on small shapes and measures nothing")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: the folder is not empty: choose a new --out")
    # a damaged results file raises an error before anything is measured
    read_results(RESULTS)

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup sets SIGHUP to be ignored
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    if tiny:
        # more threads would only compete for the cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    fine = Session(out, 60 * minutes).run(jobs)
    print((out / "summary.md").read_text())
    return int(not fine)
