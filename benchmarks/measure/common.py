"""Check and time the variants of an operator.

A benchmark defines a `Case` (the inputs and the true results) and several `Variant`s (implementations), and passes them
to `measure`. `append_rows` stores rows measured on a GPU in `benchmarks/results/<gpu>.csv`. Rows measured on a CPU are
never stored, because benchmarks run on a CPU only for tests.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import math
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure.argument_types import parse_device, parse_milliseconds, parse_positive
from benchmarks.report import provenance
from benchmarks.report.results import COLUMNS as COLUMNS
from benchmarks.report.results import RESULTS as RESULTS
from benchmarks.report.results import ROOT as ROOT
from benchmarks.report.results import Row as Row
from benchmarks.report.results import append_rows as append_rows
from benchmarks.report.results import check_columns, file_stem, relative

# shorter calls are replayed as CUDA graphs, because launching them takes the host longer than the GPU runs them
GRAPH_BELOW_MS = 0.1
NUMBERS = itertools.count()


class CheckFailed(Exception):
    """A variant's result is wrong, so the benchmark writes no row."""


@dataclass(frozen=True)
class Case:
    """One operation on inputs of one shape.

    `make(seed)` returns random inputs, because a GPU is faster on zeros. `truth(inputs)` returns results in float64.
    `flops` and `bytes` are the arithmetic and the least memory traffic of one call. A variant fails if its
    ‖got − truth‖ / ‖truth‖ exceeds `max_rel_err`.
    """

    op: str
    shape: str
    dtype: str
    make: Callable[[int], Any]
    truth: Callable[[Any], Sequence[Tensor]]
    flops: float
    bytes: float
    max_rel_err: float


@dataclass(frozen=True)
class Variant:
    """One implementation of a case's operation.

    `graph` says whether a CUDA graph of `run` is timed. None: only if a call takes less than `GRAPH_BELOW_MS`.
    """

    impl: str
    run: Callable[[Any], Sequence[Tensor]]
    graph: bool | None = None


class Ceilings(NamedTuple):
    """Rates of this machine, measured at the start of a benchmark.

    `tflops` is the rate of a large matrix product (bfloat16 on a GPU, float32 on a CPU), `gbps` the rate of a large
    copy.
    """

    tflops: float
    gbps: float

    def floor_ms(self, flops: float, traffic_bytes: float) -> float:
        """The least possible time in milliseconds, at these rates."""
        return max(flops / (self.tflops * 1e9), traffic_bytes / (self.gbps * 1e6))


@dataclass
class Clock:
    """Times calls on one device. Each variant is warmed up for `warmup_ms` and then measured `rounds` times."""

    device: torch.device
    warmup_ms: float = 300.0
    rounds: int = 50
    cache_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size if on_gpu else 0

    def once_ms(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call. The device is idle before and after the call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        run()
        last.record()
        last.synchronize()
        elapsed: float = first.elapsed_time(last)
        return elapsed

    def warm_up(self, run: Callable[[], Any]) -> float:
        """Call `run` for `warmup_ms`, at least twice. Returns the milliseconds of the last call."""
        end = time.perf_counter() + self.warmup_ms / 1e3
        self.once_ms(run)
        duration = self.once_ms(run)
        while time.perf_counter() < end:
            duration = self.once_ms(run)
        return duration


def ceilings(clock: Clock) -> Ceilings:
    on_gpu = clock.device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    a, b = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.randn(max(4 * clock.cache_bytes, 2**30 if on_gpu else 2**20) // 4, device=clock.device)
    target = torch.empty_like(source)
    times = []
    for run in (lambda: torch.mm(a, b), lambda: target.copy_(source)):
        clock.warm_up(run)
        times.append(statistics.median(clock.once_ms(run) for _ in range(clock.rounds)))
    return Ceilings(2 * size**3 / times[0] / 1e9, 2 * source.numel() * 4 / times[1] / 1e6)


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Returns the largest ‖got − want‖ / ‖want‖ of the tensors, in float64; infinity if a value is not finite."""
    errors = []
    for one, other in zip(got, want, strict=True):
        exact = other.double()
        error = float((one.to(exact) - exact).norm() / exact.norm())
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def input_bytes(inputs: Any) -> int:
    """Total bytes of all tensors in nested lists, tuples and dicts."""
    if isinstance(inputs, Tensor):
        return inputs.numel() * inputs.element_size()
    nested = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (list, tuple)) else ()
    return sum(input_bytes(value) for value in nested)


def runs(variant: Variant, inputs: Any) -> bool:
    """Whether a variant that uses another library runs here. If it does not, prints the error."""
    try:
        variant.run(inputs)
        if variant.graph and torch.cuda.is_available():
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                variant.run(inputs)
    except Exception as error:
        print(f"{variant.impl}: left out: {type(error).__name__}: {str(error).strip().split(chr(10))[0]}")
        return False
    return True


def measure(case: Case, variants: Sequence[Variant], clock: Clock, limits: Ceilings) -> list[Row]:
    """Check every variant, then time the variants alternately.

    The first variant is timed twice, as itself and as `<first> again`; the difference shows the noise. Successive calls
    get different inputs. Together the inputs are at least three times as large as the GPU's L2 cache, so no call finds
    its inputs in the cache. Returns one row for each timed variant.

    Raises:
        CheckFailed: a result differs from the truth by more than `case.max_rel_err`.
    """
    inputs = [case.make(0)]
    # inputs that hold no tensors, such as texts, need only two copies
    size = input_bytes(inputs[0])
    copies = math.ceil(3 * clock.cache_bytes / size) if size else 0
    inputs += [case.make(seed) for seed in range(1, max(2, copies))]
    want = case.truth(inputs[0])
    errors = {}
    for variant in variants:
        # each variant gets new inputs, because an optimizer changes its inputs
        errors[variant.impl] = error = relative_error(variant.run(case.make(0)), want)
        if not error <= case.max_rel_err:
            raise CheckFailed(f"{case.op}, {variant.impl}: relative error {error:.2e}, at most {case.max_rel_err:.0e}")
    timed = [*variants, Variant(f"{variants[0].impl} again", variants[0].run, variants[0].graph)]
    errors[timed[-1].impl] = errors[variants[0].impl]
    calls = {variant.impl: _prepare(variant, inputs, clock) for variant in timed}
    times: dict[str, list[float]] = {variant.impl: [] for variant in timed}
    for number in range(clock.rounds):
        # vary the order, so that no variant always runs first or always after the same variant
        order = timed[number % len(timed) :] + timed[: number % len(timed)]
        for variant in order if number % 2 else reversed(order):
            call, per_call, _ = calls[variant.impl]
            times[variant.impl].append(clock.once_ms(call) / per_call)
    floor = limits.floor_ms(case.flops, case.bytes)
    rows = []
    for variant in timed:
        p20, p50, p80 = quantiles(times[variant.impl])
        rows.append(
            {"op": case.op, "impl": variant.impl, "mode": calls[variant.impl][2], "shape": case.shape}
            | {"dtype": case.dtype, "p50": p50, "p20": p20, "p80": p80, "tflops": case.flops / p50 / 1e9}
            | {"gbps": case.bytes / p50 / 1e6, "floor": floor, "rel_err": errors[variant.impl], "n": clock.rounds}
        )
    return rows


def _prepare(variant: Variant, inputs: Sequence[Any], clock: Clock) -> tuple[Callable[[], Any], int, str]:
    """Returns the function to time, how often that function calls the variant, and the mode: eager or graph."""
    turn = 0

    def one() -> None:
        nonlocal turn
        turn = (turn + 1) % len(inputs)
        variant.run(inputs[turn])

    duration = clock.warm_up(one)
    wanted = variant.graph if variant.graph is not None else duration < GRAPH_BELOW_MS
    if clock.device.type != "cuda" or not wanted:
        return one, 1, "eager"
    # a variant's first call on an input may compile or allocate, which a graph must not capture
    for given in inputs:
        variant.run(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in inputs:
            variant.run(given)
    clock.warm_up(graph.replay)
    return graph.replay, len(inputs), "graph"


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Returns p20, p50 and p80, interpolated between measurements."""
    ordered = torch.tensor(sorted(times), dtype=torch.float64)
    p20, p50, p80 = torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Returns the function under torch.compile. On a CPU it is traced, but no code is generated."""
    # copy the code object, because Dynamo caches compiled code and limits recompilations per code object
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(NUMBERS)}")
    own = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    if device.type == "cpu":
        return torch.compile(own, backend="aot_eager")
    return torch.compile(own, dynamic=False)


def peak_bytes(variant: Variant, inputs: Any, device: torch.device) -> int:
    """Bytes of GPU memory that one call allocates at its peak, including its results."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    variant.run(inputs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(device: torch.device) -> Row:
    """Returns the columns that are equal in all rows of a run: date, commit, device, driver and versions."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    on_gpu = device.type == "cuda"
    code = provenance.code_version()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": code.commit,
        "dirty": int(code.dirty),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "triton": triton,
    }


def check_results_file(device: torch.device, folder: Path = RESULTS, columns: Sequence[str] = COLUMNS) -> None:
    """Check that the results file of this GPU, if there is one, has the expected columns."""
    if device.type == "cuda":
        check_columns(folder / f"{file_stem(torch.cuda.get_device_name(device))}.csv", columns)


def render(rows: Sequence[Row], gpu: str) -> str:
    """Returns the rows as a text table."""
    width = max(len(row["impl"]) for row in rows)
    lines = [f"{rows[0]['op']}, {rows[0]['shape']}, {rows[0]['dtype']}, on {gpu}, ms per call"]
    lines.append(
        f"{'':<{width}}  {'mode':<5}  {'p20':>9}  {'p50':>9}  {'p80':>9}  {'TF/s':>7}  {'GB/s':>7}  rel. error"
    )
    for row in rows:
        times = "  ".join(f"{row[name]:>9.4f}" for name in ("p20", "p50", "p80"))
        rates = f"{row['tflops']:>7.1f}  {row['gbps']:>7.0f}"
        lines.append(f"{row['impl']:<{width}}  {row['mode']:<5}  {times}  {rates}  {row['rel_err']:.1e}")
    lines.append(f"{'floor, computed':<{width}}  {'':<5}  {'':>9}  {rows[0]['floor']:>9.4f}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose defaults depend on `--tiny`.

    On a GPU without `--tiny` it also checks that the rows can be stored.
    """

    def __init__(self, full: dict[str, float], **options: Any) -> None:
        super().__init__(**options)
        self.full = full

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        given, rest = super().parse_known_args(args, namespace)
        for name, value in self.full.items():
            if getattr(given, name) is None:
                setattr(given, name, _TINY[name] if given.tiny else value)
        if given.device.type == "cuda" and not given.tiny:
            check_results_file(given.device)
            code = provenance.code_version()
            if code.problem:
                print(provenance.warning(code), file=sys.stderr, flush=True)
        return given, rest


# pytest's exit code when no test was selected
NOTHING_TO_RUN = 5
_TINY = {"rounds": 2, "warmup_ms": 1.0}


def parser(
    prog: str, description: str, *, rounds: int | None = 50, warmup_ms: float = 300.0
) -> argparse.ArgumentParser:
    """Returns a parser with the options that benchmarks share. `rounds=None` omits `--rounds` and `--warmup-ms`."""
    command = f"python -m benchmarks.{prog}"
    full = {} if rounds is None else {"rounds": rounds, "warmup_ms": warmup_ms}
    made = _Parser(
        full,
        prog=command,
        description=description,
        epilog=f"examples:\n  {command}\n  {command} --tiny      (runs anywhere; the times mean nothing)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", default=default, type=parse_device, help="default: cuda if there is a GPU")
    if full:
        ends = {name: f"default {value:g}, or {_TINY[name]:g} with --tiny" for name, value in full.items()}
        made.add_argument("--rounds", type=parse_positive, help=f"measurements of each variant; {ends['rounds']}")
        made.add_argument("--warmup-ms", type=parse_milliseconds, help=f"warm-up of each variant; {ends['warmup_ms']}")
    made.add_argument("--tiny", action="store_true", help="small shapes that run anywhere; the times mean nothing")
    return made


def report(rows: Sequence[Row], surroundings: Row, *, keep: bool = True) -> None:
    """Print the rows as a table. On a GPU also store them, unless `keep` is false."""
    print(render(rows, surroundings["gpu"]))
    path = append_rows(rows, surroundings) if keep else None
    print(f"-> {relative(path)}\n" if path else "not stored: only full-size GPU results are stored\n")
