"""One command on a rented GPU: measure what decides a default, the most valuable first, within a time limit.

Each piece is a process of its own with its own limit, or one for each kernel or test file; its output goes to a file
line by line, and its rows are on disk as soon as they are measured. Whatever ends a process, a piece or the session leaves what
was measured before. Nothing is installed.
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

# a piece with less than this left is not begun; the last seconds belong to the summary
SHORTEST_S = 15.0
# the verdict on a piece of which every command said so by its exit code
NOTHING = "not possible here"
# a session of so many seconds has the limits that the plan says, a longer one longer ones
PLANNED_S = 1800.0
# test files that share a GPU at a time: at most so many, and each has so much of its memory
TESTS_AT_ONCE, TEST_BYTES = 4, 16e9
# bench_step's comparison of two variants
BESIDE = re.compile(r"^\S+ +[\d.]+ → .*", re.MULTILINE)


@dataclass
class Piece:
    """Something to run.

    Attributes:
        name: of the piece.
        limit_s: it is stopped after so many seconds.
        commands: arguments for Python by the name of the output file.
        each_s: one of them is stopped after so many seconds, and the next has its turn.
        at_once: how many of them run at the same time.
        instead_of: it is run only if this piece failed.
        verdict: how it ended; "not reached" until then.
        seconds: it took.
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
        """Whether more time would have given more."""
        return self.verdict in ("not reached", "interrupted") or "stopped" in self.verdict


def plan(*, tiny: bool = False) -> list[Piece]:
    """All pieces, by worth: the whole step, what each kernel gives in it, whether the kernels are right, and so on.

    Args:
        tiny: small shapes on a CPU, to see the session itself at work.
    """
    short = ["--tiny", "--device", "cpu"] if tiny else []

    def bench(name: str, limit_s: float, module: str, *arguments: str, instead_of: str = "") -> Piece:
        return Piece(name, limit_s, {name: ["-m", f"benchmarks.{module}", *arguments, *short]}, instead_of=instead_of)

    rounds = () if tiny else ("--rounds", "15")
    before, after = ("--phase", "before"), ("--phase", "after")

    def step(name: str, limit_s: float, *arguments: str, instead_of: str = "") -> Piece:
        return bench(name, limit_s, "bench_step", *rounds, *arguments, instead_of=instead_of)

    alone = [step(f"kernel_{op}", 200, *before, "--variants", f"torch,{op}=triton") for op in step_kernels()]
    kernels = Piece("kernel", 420, {label: c for piece in alone for label, c in piece.commands.items()}, each_s=200)
    tests = Piece(
        "tests", 240, {path.stem: _test(path, tiny) for path in gpu_tests()}, each_s=150, at_once=tests_at_once()
    )
    others = ("sp4096_recurrence", "sp2048_normuon", "sp1024_smear_bigram")
    return [
        step("step", 400, *before, "--variants", "published,torch,golf"),
        step("step_without_kernels", 200, *before, "--variants", "published,torch", instead_of="step"),
        # where no kernel can run, the output of the step says why
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


def stretch(pieces: Sequence[Piece], seconds: float) -> None:
    """Lengthen the limits where a session has more time than was planned with, or only these pieces to spend it on."""
    needed = sum(piece.limit_s for piece in pieces if not piece.instead_of) or math.inf
    factor = max(1.0, seconds / PLANNED_S, seconds / needed)
    for piece in pieces:
        piece.limit_s, piece.each_s = min(piece.limit_s * factor, seconds), piece.each_s * factor


def tests_at_once() -> int:
    """How many test files the GPU's memory has room for, or all that a CPU is given."""
    if not torch.cuda.is_available():
        return TESTS_AT_ONCE
    return max(1, min(TESTS_AT_ONCE, int(torch.cuda.get_device_properties(0).total_memory / TEST_BYTES)))


def op_benches() -> list[str]:
    """Names of the benchmarks of single operators, those of a training step first."""
    apart = {"step", "loss_curves", "evaluation", "artifact"}
    found = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} - apart
    return sorted(found, key=lambda name: (name in ("gptq", "int6", "quantize"), name))


def gpu_tests() -> list[Path]:
    """Test files in which something needs a GPU, and those of the Triton kernels, which run compiled on one.

    The longest one comes first.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.stem != "test_loop_gpu", path))
    return [path for path in files if path.stem.endswith("_triton") or "mark.gpu" in path.read_text()]


def _test(path: Path, tiny: bool) -> list[str]:
    # without a GPU the kernels' own tests would take minutes in the interpreter
    chosen = [] if path.stem.endswith("_triton") and not tiny else ["-m", "gpu"]
    # one more -v than the project's -q takes away: a line is begun with each test
    return ["-m", "pytest", "-vv", str(path.relative_to(ROOT)), *chosen]


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
        # what a kill during the first piece leaves
        self.keep(pieces)
        try:
            for piece in pieces:
                if piece.instead_of and ended.get(piece.instead_of) == "ok":
                    piece.verdict = f"not needed, {piece.instead_of} ran"
                elif self.left >= SHORTEST_S:
                    # what an interrupt or a kill leaves
                    piece.verdict = "interrupted"
                    self.keep(pieces)
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
        running: list[tuple[str, subprocess.Popen[bytes], float, contextlib.ExitStack]] = []
        verdicts: list[str] = []
        codes: list[int] = []
        with contextlib.ExitStack() as held:
            while waiting or running:
                while waiting and len(running) < piece.at_once:
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
                    elif now >= until or now - since >= piece.each_s:
                        limit = "the limit" if now >= until else f"{piece.each_s:.0f} s"
                        verdicts.append(f"{label} stopped at {limit}{self._reached(label)}")
                    else:
                        continue
                    running.remove(one)
                    own.close()
                if now >= until and waiting:
                    verdicts.append(f"stopped before {', '.join(label for label, _ in waiting)}")
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

    def _reached(self, label: str) -> str:
        """How far a file of tests had come, from what pytest has said."""
        text = "\n".join(self._tail(label, 0))
        collected = re.findall(r"collected (\d+) items?(?: / \d+ deselected / (\d+) selected)?", text)
        if not collected:
            return ""
        ended = re.findall(r"^(\S*::.*?) (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", text, re.MULTILINE)
        begun = re.findall(r"^\S*?::(.*?) *$", text.rpartition("\n")[2])
        return f" in {begun[0] if begun else 'its start'}, {len(ended)} of {collected[0][1] or collected[0][0]} tests had ended"

    def _tail(self, label: str, lines: int) -> list[str]:
        return (self.out / f"{label}.txt").read_text(errors="replace").splitlines()[-lines:]

    def _beside(self, pieces: Sequence[Piece]) -> str:
        """The lines of `bench_step` that compare variants."""
        outputs = [self.out / f"{label}.txt" for piece in pieces for label in piece.commands]
        lines = [line for path in outputs if path.exists() for line in BESIDE.findall(path.read_text(errors="replace"))]
        return (
            "\n".join(["ms per step of the first variant and of this one:\n", "```", *lines, "```\n\n"])
            if lines
            else ""
        )

    def keep(self, pieces: Sequence[Piece]) -> None:
        """Copy the rows measured since the session began, and write the summary anew."""
        for path in self.results.glob("*.csv"):
            if rows := rows_since(path, self.since):
                atomic_write(self.out / path.name, rows)
        try:
            measured = tables(read_results(self.out))
        except ResultsError as error:
            measured = str(error)
        atomic_write(self.out / "summary.md", f"{summary(pieces)}\n\n{rest(pieces)}{self._beside(pieces)}{measured}\n")


def summary(pieces: Sequence[Piece]) -> str:
    """The pieces as a Markdown table."""
    lines = ["| piece | how it ended | s | output |", "|---|---|---|---|"]
    for piece in pieces:
        files = ", ".join(f"`{label}.txt`" for label in piece.commands) if piece.seconds else "–"
        lines.append(f"| {piece.name} | {piece.verdict} | {piece.seconds:.0f} | {files} |")
    return "\n".join(lines)


def rest(pieces: Sequence[Piece]) -> str:
    """The commands that go on with what found no time, and without the kernels that failed."""
    failed = re.findall(r"\bkernel_(\w+) (?:failed|stopped at \d)", "; ".join(piece.verdict for piece in pieces))
    command = f"python -m benchmarks.bench_step --variants published,torch,golf-{'-'.join(failed)}"
    others = f"To measure the other kernels together: `{command}`\n\n" if failed else ""
    left = [piece for piece in pieces if piece.unfinished]
    minutes = math.ceil(sum(piece.limit_s for piece in left if not piece.instead_of) / 60)
    names = ",".join(piece.name for piece in left)
    command = f"python -m benchmarks session --minutes {max(minutes, 1)} --out session_2 --only {names}"
    return (f"To go on with what found no time: `{command}`\n\n" if left else "") + others


def _first_command(piece: Piece) -> str:
    """What the piece runs, as one would type it, how many more like it, and when."""
    command, *more = piece.commands.values()
    others = f"  (and {len(more)} more)" if more else ""
    condition = f"  (if {piece.instead_of} failed)" if piece.instead_of else ""
    return f"python {shlex.join(command)}{others}{condition}"


def _names(flag: str, text: str, pieces: Sequence[Piece]) -> set[str]:
    names = set(text.split(",")) if text else set()
    if unknown := sorted(names - {piece.name for piece in pieces}):
        raise ValueError(f"{flag}: no piece {', '.join(unknown)}: expected some of {', '.join(p.name for p in pieces)}")
    return names


def run_session(out: Path, minutes: float, only: str, skip: str = "", *, tiny: bool, listing: bool) -> int:
    """`python -m benchmarks session`.

    Raises:
        ValueError: there is no GPU, no such piece, no time for one, or the folder holds something already.
        UserError: GOLF_BACKEND is set, or a file that rows will be appended to is damaged.
    """
    if not SHORTEST_S / 60 <= minutes < math.inf:
        raise ValueError(
            f"--minutes: expected at least {SHORTEST_S / 60}, without which no piece is begun, got {minutes}"
        )
    pieces = plan(tiny=tiny)
    wanted, skipped = _names("--only", only, pieces), _names("--skip", skip, pieces)
    if not wanted:
        # what is run in the place of a piece is left out with it
        wanted = {piece.name for piece in pieces if piece.instead_of not in skipped or not piece.instead_of}
    pieces = [piece for piece in pieces if piece.name in wanted - skipped]
    if not pieces:
        raise ValueError("--skip: no piece is left: expected fewer names")
    stretch(pieces, 60 * minutes)
    if listing:
        for piece in pieces:
            print(f"{piece.name:<28}{piece.limit_s:>5.0f} s at most  {_first_command(piece)}")
        return 0
    refuse_forced()
    if not tiny and not torch.cuda.is_available():
        raise ValueError("there is no GPU here: --tiny runs the session on small shapes, which measures nothing")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: holds something already: choose a new --out")
    # damage is better found now than when the first rows are there
    read_results(RESULTS)

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
