"""One command on a rented GPU: measure what decides a default, the most valuable first, within a time limit.

Each piece is a process of its own with its own limit, whose output goes to a file line by line and whose rows are on disk as
soon as they are measured; whatever ends a piece, or the session, leaves what was measured before. Nothing is installed.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import math
import os
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

from benchmarks.common import COLUMNS, NOTHING_TO_RUN, RESULTS, ROOT
from benchmarks.report import tables
from benchmarks.results import ResultsError, read_results
from train.files import atomic_write

# a piece with less than this left is not begun; the last seconds belong to the summary
SHORTEST_S = 15.0
# the verdict on a piece of which every command said so by its exit code
NOTHING = "not possible here"
# test files that share the GPU at a time
TESTS_AT_ONCE = 4


@dataclass
class Piece:
    """Something to run.

    Attributes:
        name: of the piece.
        limit_s: it is stopped after so many seconds.
        commands: arguments for Python by the name of the output file.
        at_once: how many of them run at the same time.
        instead_of: it is run only if this piece failed.
        verdict: how it ended; "not reached" until then.
        seconds: it took.
    """

    name: str
    limit_s: float
    commands: dict[str, list[str]]
    at_once: int = 1
    instead_of: str = ""
    verdict: str = "not reached"
    seconds: float = field(default=0.0)


def plan(*, tiny: bool = False) -> list[Piece]:
    """All pieces, by worth: the whole step, what each kernel gives in it, whether the kernels are right, and so on.

    Args:
        tiny: small shapes on a CPU, to see the session itself at work.
    """
    short = ["--tiny", "--device", "cpu"] if tiny else []

    def bench(name: str, limit_s: float, module: str, *arguments: str, instead_of: str = "") -> Piece:
        return Piece(name, limit_s, {name: ["-m", f"benchmarks.{module}", *arguments, *short]}, instead_of=instead_of)

    def step(name: str, limit_s: float, *arguments: str, instead_of: str = "") -> Piece:
        return bench(
            name, limit_s, "bench_step", *(() if tiny else ("--rounds", "15")), *arguments, instead_of=instead_of
        )

    before, after = ("--phase", "before"), ("--phase", "after")
    tests = Piece("tests", 240, {path.stem: _test(path, tiny) for path in gpu_tests()}, at_once=TESTS_AT_ONCE)
    others = ("sp4096_recurrence", "sp2048_normuon", "sp1024_smear_bigram")
    return [
        step("step", 240, *before, "--ways", "published,torch,golf"),
        step("step_without_kernels", 150, *before, "--ways", "published,torch", instead_of="step"),
        step("each_kernel_in_the_step", 240, *before, "--each-kernel"),
        tests,
        step("compiler_switches", 300, *before, "--ways", "torch", "--inductor", "all"),
        bench("start", 200, "bench_start"),
        step("step_after_recurrence", 240, *after, "--ways", "published,torch,golf"),
        *(bench(name, 100, f"bench_{name}") for name in op_benches()),
        *(step(f"step_{name}", 240, "--recipe", name, "--ways", "published,torch,golf") for name in others),
        bench("evaluation", 150, "bench_evaluation"),
        bench(
            "loss_curves",
            400,
            "bench_loss_curves",
            "--ways",
            "published,torch,golf",
            *(() if tiny else ("--steps", "300")),
        ),
    ]


def op_benches() -> list[str]:
    """Names of the benchmarks of single operators, those of a training step first."""
    apart = {"step", "start", "loss_curves", "evaluation", "artifact"}
    found = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - apart
    return sorted(found, key=lambda name: (name in ("gptq", "int6", "quantize"), name))


def gpu_tests() -> list[Path]:
    """Test files in which something needs a GPU, and those of the Triton kernels, which run compiled on one.

    The longest one comes first.
    """
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: (path.stem != "test_loop_gpu", path))
    return [path for path in files if path.stem.endswith("_triton") or "mark.gpu" in path.read_text()]


def _test(path: Path, tiny: bool) -> list[str]:
    # without a GPU the kernels' own tests would take minutes in the interpreter
    chosen = [] if path.stem.endswith("_triton") and not tiny else ["-m", "gpu"]
    return ["-m", "pytest", "-v", "-x", str(path.relative_to(ROOT)), *chosen]


class Session:
    """Runs pieces and keeps what they leave.

    Args:
        out: folder for outputs, rows and the summary; new or empty.
        seconds: the whole session's limit.
        results: folder that the benchmarks append their rows to.
    """

    def __init__(self, out: Path, seconds: float, results: Path = RESULTS) -> None:
        self.out, self.results = out, results
        self.started, self.limit = time.monotonic(), seconds
        self.since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.limit - (time.monotonic() - self.started)

    def run(self, pieces: Sequence[Piece]) -> bool:
        """Run the pieces in order until the time is over; whether none of those that ran failed."""
        ended: dict[str, str] = {}
        try:
            for piece in pieces:
                if piece.instead_of and ended.get(piece.instead_of) == "ok":
                    piece.verdict = f"not needed, {piece.instead_of} ran"
                elif self.left >= SHORTEST_S:
                    self._run(piece)
                ended[piece.name] = piece.verdict
                self.keep(pieces)
        finally:
            self.keep(pieces)
        return all(piece.verdict == "ok" or piece.verdict.startswith("not ") for piece in pieces)

    def _run(self, piece: Piece) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {piece.name} …", flush=True)
        begun = time.monotonic()
        until = begun + min(piece.limit_s, self.left)
        waiting = list(piece.commands.items())
        running: list[tuple[str, subprocess.Popen[bytes]]] = []
        verdicts: list[str] = []
        codes: list[int] = []
        # what an interrupt finds
        piece.verdict = "interrupted"
        with contextlib.ExitStack() as held:
            while waiting or running:
                while waiting and len(running) < piece.at_once:
                    label, command = waiting.pop(0)
                    running.append((label, held.enter_context(self._process(label, command))))
                time.sleep(0.1)
                for label, process in list(running):
                    if process.poll() is not None:
                        running.remove((label, process))
                        codes.append(process.returncode)
                        if codes[-1] not in (0, NOTHING_TO_RUN):
                            verdicts.append(f"{label} failed ({codes[-1]})")
                if time.monotonic() >= until and running:
                    labels = ", ".join(label for label, _ in running)
                    verdicts.append(
                        f"{labels} stopped at the limit" + (f", {len(waiting)} not begun" if waiting else "")
                    )
                    break
        piece.seconds = time.monotonic() - begun
        piece.verdict = "; ".join(verdicts) or ("ok" if 0 in codes else NOTHING)
        print(f"          {piece.verdict}, {piece.seconds:.0f} s", flush=True)
        for label in piece.commands:
            if piece.verdict == NOTHING or f"{label} " in piece.verdict:
                lines = self._tail(label, 1 if piece.verdict == NOTHING else 4)
                print("".join(f"          | {line}\n" for line in lines), end="", flush=True)

    @contextlib.contextmanager
    def _process(self, label: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
        environ = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
        with (self.out / f"{label}.txt").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip
            # its input ends with this process, also where nothing here can run any more
            heir = subprocess.Popen(
                ["sh", "-c", f"read _; kill -KILL -{process.pid}"], stdin=subprocess.PIPE, start_new_session=True
            )
            try:
                yield process
            finally:
                heir.kill()
                heir.communicate()
                # its own children, such as a compiler's workers, are in its group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _tail(self, label: str, lines: int) -> list[str]:
        return (self.out / f"{label}.txt").read_text(errors="replace").splitlines()[-lines:]

    def keep(self, pieces: Sequence[Piece]) -> None:
        """Copy the rows measured since the session began, and write the summary anew."""
        for path in self.results.glob("*.csv"):
            with path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("date") or "") >= self.since]
            if rows:
                with (self.out / path.name).open("w", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                    writer.writeheader()
                    writer.writerows(rows)
        try:
            measured = tables(read_results(self.out))
        except ResultsError as error:
            measured = str(error)
        atomic_write(self.out / "summary.md", f"{summary(pieces)}\n\n{measured}\n")


def summary(pieces: Sequence[Piece]) -> str:
    """The pieces as a Markdown table."""
    lines = ["| piece | how it ended | s | output |", "|---|---|---|---|"]
    for piece in pieces:
        files = ", ".join(f"`{label}.txt`" for label in piece.commands) if piece.seconds else "–"
        lines.append(f"| {piece.name} | {piece.verdict} | {piece.seconds:.0f} | {files} |")
    return "\n".join(lines)


def _first_command(piece: Piece) -> str:
    """What the piece runs, as one would type it, how many more like it, and when."""
    command, *more = piece.commands.values()
    others = f", and {len(more)} more" if more else ""
    condition = f", if {piece.instead_of} failed" if piece.instead_of else ""
    return f"python {shlex.join(command)}{others}{condition}"


def run_session(out: Path, minutes: float, only: str, *, tiny: bool, listing: bool) -> int:
    """`python -m benchmarks session`.

    Raises:
        ValueError: there is no GPU, no such piece, no time for one, or the folder holds something already.
    """
    if not SHORTEST_S / 60 <= minutes < math.inf:
        raise ValueError(
            f"--minutes: expected at least {SHORTEST_S / 60}, without which no piece is begun, got {minutes}"
        )
    pieces = plan(tiny=tiny)
    wanted = only.split(",") if only else [piece.name for piece in pieces]
    if unknown := sorted(set(wanted) - {piece.name for piece in pieces}):
        raise ValueError(f"--only: no piece {', '.join(unknown)}: expected some of {', '.join(p.name for p in pieces)}")
    pieces = [piece for piece in pieces if piece.name in wanted]
    if listing:
        for piece in pieces:
            print(f"{piece.name:<28}{piece.limit_s:>5.0f} s at most  {_first_command(piece)}")
        return 0
    if not tiny and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: --tiny runs the session on small shapes, which measures nothing")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: holds something already: choose a new --out")

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup ignores the second
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)
    if tiny:
        # on tiny shapes more threads only wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    fine = Session(out, 60 * minutes).run(pieces)
    print((out / "summary.md").read_text())
    return int(not fine)
