"""Check and measure every kernel on this GPU, and remember which ones to use: `python -m golf_kernels tune`.

Each measurement runs in a process of its own with a time limit, so a crash, a hang or a full memory ends only that
process. After each measurement, tuning writes the tuned file of this machine (`golf_kernels.tuned`): all findings so
far, and the decisions that follow from them. So it may be killed at any moment, and the next start continues.
`benchmarks.decide` chooses the next measurements and makes the decisions.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks import decide
from benchmarks.decide import Candidate, Measurement
from benchmarks.jobs import OK, Job, Outcome, run_job
from benchmarks.measure.step_variants import kernel_problems, refuse_forced
from benchmarks.report.results import DATE, RESULTS, file_stem, read_results, rows_since
from golf_kernels import dispatch, operators, tuned
from golf_kernels.backend_names import without_variant
from train.common.errors import UserError, main_guard
from train.recipes import load_recipe, recipe_names

# a measurement starts only if this many seconds are left; its time limit in seconds depends on its kind
SHORTEST_S = 15.0
LIMITS_S = {"check": 120.0, "call": 120.0, "attention": 120.0, "step": 240.0}
# number of checks that run at the same time; each needs little of the GPU's memory
CHECKS_AT_ONCE = 4
ROUNDS = "15"
# operator → its benchmark, unless that is bench_OPERATOR
BENCHES = {
    "softcapped_cross_entropy": "bench_head",
    "muon_step": "bench_newton_schulz",
    "gptq_block": "bench_gptq",
}
Rows = Sequence[Mapping[str, Any]]


def bench_of(op: str) -> str:
    return BENCHES.get(op, f"bench_{op}")


def candidates() -> list[Candidate]:
    """Returns all kernels that can run on this GPU: each operator on each backend except PyTorch."""
    found = []
    for op, operator in operators.declared().items():
        for backend in dispatch.available_backends(op, "cuda"):
            if backend != "torch":
                in_step = operator.called_by in ("model", "optimize") and backend == "triton"
                bench = Path(__file__).with_name(f"{bench_of(op)}.py")
                found.append(Candidate(op, backend, in_step, bench.is_file()))
    return found


def job_of(measurement: Measurement, recipe: str, limit_s: float) -> Job:
    """Returns the process to start for a measurement."""
    return Job(measurement.name, ["-m", *_command(measurement, recipe)], limit_s)


def _command(measurement: Measurement, recipe: str) -> list[str]:
    candidate = measurement.candidate
    if measurement.kind == "check" and candidate:
        return ["golf_kernels", "--only", f"{candidate.op}={candidate.backend}", "--json"]
    if measurement.kind == "call" and candidate:
        return [f"benchmarks.{bench_of(candidate.op)}", "--rounds", ROUNDS]
    if measurement.kind == "attention":
        batch = measurement.name.removeprefix("attention ")
        return ["benchmarks.bench_attention", "--recipe", recipe, "--batches", batch, "--rounds", ROUNDS]
    if candidate:
        variants = f"torch,{candidate.op}={candidate.backend}"
    else:
        left_out = [op for op in kernel_problems() if op not in measurement.kernels]
        together = "-".join(["golf", *left_out])
        variants = f"{together},{together}-{measurement.without}" if measurement.without else f"torch,{together}"
    step = ["--recipe", recipe, "--phase", "before", "--rounds", ROUNDS]
    return ["benchmarks.bench_step", *step, "--variants", variants]


def finding_of(measurement: Measurement, outcome: Outcome, rows: Rows) -> dict[str, Any]:
    """Returns what is stored of a measurement: verdict, seconds, and a check's error or the measured times."""
    finding: dict[str, Any] = {"verdict": outcome.verdict, "seconds": round(outcome.seconds, 1)}
    if measurement.kind == "check":
        try:
            # the report is the last thing that the doctor prints
            (check,) = json.loads(outcome.output[outcome.output.index("{\n") :])["checks"]
        except (ValueError, KeyError):
            return finding if finding["verdict"] != OK else finding | {"verdict": "no check in the doctor's report"}
        if not check["passed"]:
            finding["verdict"] = check["problem"] or f"error {check['error']:.1e}, at most {check['limit']:.0e}"
        return finding | {"error": check["error"], "limit": check["limit"]}
    if outcome.verdict != OK:
        return finding
    if measurement.kind == "attention":
        found = [row for row in rows if row["op"] == "attention" and not row["impl"].endswith(" again")]
        if not found:
            return finding | {"verdict": "it ended without rows"}
        shape = f"{found[0]['shape']} {found[0]['dtype']}"
        return finding | {"shape": shape, "times": {row["impl"]: _quantiles([row]) for row in found}}
    times = _step_times(measurement, rows) if measurement.kind == "step" else _call_times(measurement, rows)
    if times is None:
        return finding | {"verdict": "it ended without rows"}
    return finding | {"times": times}


def _step_times(measurement: Measurement, rows: Rows) -> dict[str, list[float]] | None:
    steps = [row for row in rows if row["op"].startswith("step ")]
    if len(steps) != 2:
        return None
    names = [decide.TORCH, measurement.candidate.op if measurement.candidate else decide.ALL]
    if measurement.without:
        names = [decide.ALL, "without"]
    return {name: _quantiles([row]) for name, row in zip(names, steps, strict=True)}


def _call_times(measurement: Measurement, rows: Rows) -> dict[str, list[float]] | None:
    """Returns times of PyTorch and of the kernel, summed over the shapes at which all of them were measured."""
    assert measurement.candidate
    op, backend = measurement.candidate.op, measurement.candidate.backend
    by_form: dict[str, dict[tuple[str, str, str], Mapping[str, Any]]] = {}
    for row in rows:
        if row["op"] == op or row["op"].startswith((f"{op},", f"{op}_")):
            by_form.setdefault(row["impl"], {})[row["op"], row["shape"], row["dtype"]] = row
    forms = [form for form in (decide.TORCH, decide.COMPILE) if form in by_form]
    kernels = [form for form in by_form if without_variant(form) == backend and not form.endswith(" again")]
    if not forms or not kernels:
        return None
    shapes = set.intersection(*(set(by_form[form]) for form in (*forms, *kernels)))
    if not shapes:
        return None
    return {form: _quantiles([by_form[form][shape] for shape in shapes]) for form in (*forms, *kernels)}


def _quantiles(rows: Rows) -> list[float]:
    return [round(sum(float(row[name]) for row in rows), 6) for name in ("p20", "p50", "p80")]


class Tuner:
    """Makes all measurements and writes the tuned file after each.

    `run(job, output)` runs a process and writes its output to a file. `rows(since)` returns the rows that benchmarks
    stored since a date. `now()` returns a time in seconds.
    """

    def __init__(
        self,
        path: Path,
        here: Mapping[str, str],
        found: Sequence[Candidate],
        *,
        recipe: str,
        limit_s: float,
        only: Sequence[str] = (),
        run: Callable[[Job, Path], Outcome] = run_job,
        rows: Callable[[str], Rows] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.here, self.candidates, self.recipe, self.only = path, dict(here), found, recipe, only
        self._run, self._now, self._rows = run, now, rows or stored_rows
        self._end, self._lock = now() + limit_s, threading.Lock()
        self.findings: dict[str, dict[str, Any]] = {}
        # of other recipes' batches, too
        self.attention: dict[str, dict[str, str]] = {}
        self._read()
        for name in [name for name in self.findings if name in only]:
            del self.findings[name]

    def _read(self) -> None:
        """Take the findings of an earlier tuning, but not those of step and attention if they are for another recipe."""
        try:
            data = tuned.read(self.path)
        except FileNotFoundError:
            return
        except ValueError as error:
            print(f"{self.path} is damaged ({error}) and written again", flush=True)
            return
        same = data.get("recipe") == self.recipe
        for name, found in data.get("findings", {}).items():
            if same or not name.startswith(("step ", "attention ")):
                self.findings[name] = found
        self.attention = data.get("attention", {})

    def save(self) -> None:
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        decided = decide.decisions(self.candidates, self.findings)
        data = {"machine": self.here, "tuned": date, "recipe": self.recipe, "findings": self.findings}
        failed = [f"{c.op}={c.backend}" for c in self.candidates if decide.failed(c, self.findings)]
        self.attention |= decide.attention_decisions(self.findings)
        tuned.write(self.path, data | {"failed": failed, "decisions": decided, "attention": self.attention})

    def todo(self) -> list[Measurement]:
        found = decide.next_measurements(self.candidates, self.findings)
        return [one for one in found if not self.only or one.name in self.only]

    def run(self) -> bool:
        """Measures until the time is up or nothing is left to measure. Returns whether nothing is left."""
        self.save()
        while todo := self.todo():
            left = self._end - self._now()
            if left < SHORTEST_S:
                print(f"the time is up before {todo[0].name}: type {tuned.COMMAND} again to go on", flush=True)
                return False
            if todo[0].kind == "check":
                with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
                    done = list(pool.map(functools.partial(self._measure, left=left), todo[:CHECKS_AT_ONCE]))
            else:
                done = [self._measure(todo[0], left=left)]
            if not all(done):
                print(f"the time is up: type {tuned.COMMAND} again to go on", flush=True)
                return False
        return True

    def _measure(self, measurement: Measurement, left: float) -> bool:
        """Makes a measurement and stores its finding.

        Returns False, and stores nothing, if the measurement was stopped only because the time for all of them is up.
        """
        limit = LIMITS_S[measurement.kind]
        since = datetime.datetime.now(datetime.UTC).strftime(DATE)
        job = job_of(measurement, self.recipe, min(limit, left))
        outcome = self._run(job, self.path.with_suffix("") / f"{measurement.name.replace(' ', '_')}.txt")
        if outcome.verdict.startswith("stopped") and left < limit:
            return False
        rows = () if measurement.kind == "check" else self._rows(since)
        finding = finding_of(measurement, outcome, rows)
        with self._lock:
            self.findings[measurement.name] = finding
            self.save()
        print(f"{measurement.name}: {described(finding)}, {outcome.seconds:.0f} s", flush=True)
        return True


def described(finding: Mapping[str, Any]) -> str:
    if "times" in finding:
        return ", ".join(
            f"{name} {p50:.3f} ms ({p20:.3f}-{p80:.3f})" for name, (p20, p50, p80) in finding["times"].items()
        )
    error = finding.get("error")
    return f"{finding['verdict']}" + (f", error {error:.1e}" if error is not None else "")


def stored_rows(since: str) -> list[dict[str, str]]:
    """Returns the rows that benchmarks stored for this GPU since a date."""
    path = RESULTS / f"{file_stem(torch.cuda.get_device_name())}.csv"
    text = rows_since(path, since).decode() if path.exists() else ""
    return list(csv.DictReader(text.splitlines()))


def table(data: Mapping[str, Any]) -> str:
    """Returns the decisions and findings of a tuned file as text."""
    lines = [", ".join(f"{name} {value}" for name, value in data["machine"].items())]
    lines.append(f"tuned {data['tuned']} for {data.get('recipe', 'every recipe')}")
    for op, uses in sorted(data["decisions"].items()):
        for use, decision in uses.items():
            lines.append(f"  {op:<28}{use:<6}{decision['backend']:<8}{decision['reason']}")
    for shape, decision in sorted(data.get("attention", {}).items()):
        lines.append(f"  attention {shape}: {decision['backend']}, {decision['reason']}")
    lines += ["findings:", *(f"  {name}: {described(found)}" for name, found in data.get("findings", {}).items())]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        tuned.COMMAND,
        description="Check every kernel on this GPU against float64, measure it alone and in the training step, and remember "
        "which kernels to use. What is known already is not measured again.",
        epilog=f"examples:\n  {tuned.COMMAND}\n  {tuned.COMMAND} --show\n  {tuned.COMMAND} --only 'step xsa'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit; default 9")
    parser.add_argument(
        "--recipe", default="sp8192_sdclip", choices=recipe_names(), help="its step is measured; default sp8192_sdclip"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="measure this again, such as 'step xsa'"
    )
    parser.add_argument("--list", action="store_true", help="print what would be measured next, and exit")
    parser.add_argument(
        "--show", action="store_true", help="print the decisions and findings of this machine, and exit"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if not SHORTEST_S / 60 <= arguments.minutes < 1e6:
        raise UserError(f"--minutes: expected at least {SHORTEST_S / 60}, got {arguments.minutes}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    here = tuned.machine()
    if here is None:
        raise UserError("tune: PyTorch finds no CUDA GPU here: run it on the machine that trains")
    if arguments.show:
        found = tuned.load()
        if found is None:
            raise UserError(f"--show: this machine has no tuned file: type {tuned.COMMAND}")
        print(f"{found.path}\n{table(found.data)}")
        return 0
    refuse_forced()
    load_recipe(arguments.recipe)
    path = tuned.path_of(here)
    tuner = Tuner(
        path, here, candidates(), recipe=arguments.recipe, limit_s=60 * arguments.minutes, only=arguments.only
    )
    if arguments.list:
        print("\n".join(one.name for one in tuner.todo()) or "nothing is left to measure")
        return 0
    if unknown := set(arguments.only) - {one.name for one in tuner.todo()}:
        raise UserError(f"--only: {', '.join(sorted(unknown))} cannot be measured now; --list prints what can")
    # a damaged results file raises an error before anything is measured
    read_results(RESULTS)
    _end_on_signals()
    print(f"tuning for {arguments.recipe} on {here['gpu']}, at most {arguments.minutes:g} minutes: {path}", flush=True)
    try:
        tuner.run()
    except OSError as error:
        raise UserError(f"{error}: set GOLF_CACHE to a folder that you can write") from error
    print(table(tuned.read(path)))
    return int(any(finding["verdict"] != OK for finding in tuner.findings.values()))


def _end_on_signals() -> None:
    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup sets SIGHUP to be ignored
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end)


if __name__ == "__main__":
    main_guard(main)
