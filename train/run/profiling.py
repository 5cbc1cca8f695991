"""Profiles training steps: a Perfetto trace per rank, and ms per step for each kernel family and part of the model."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from train.common.distributed import Ranks
from train.common.errors import UserError
from train.common.files import atomic_write, atomic_writer
from train.run.clocks import WallClock
from train.run.logger import RunLogger
from train.run.profile_parts import named_ranges

# (family, pattern). A kernel (on a CPU: an operator) belongs to the first family whose pattern matches the kernel's
# name. A pattern `^(…)_kernel` lists full names of golf_kernels' Triton kernels.
_ELEMENTWISE = "elementwise and norms"
FAMILIES: tuple[tuple[str, str], ...] = (
    # first, because Inductor's kernel names list all fused operations; triton_tem kernels are matrix products
    (_ELEMENTWISE, r"^triton_(?!tem)"),
    ("communication", r"nccl|gloo|c10d"),
    (
        "muon kernels",
        r"newton_schulz|muon|^(pack|norm|aol_sums|aol_scale|symmetric|product|momentum|moments|apply)_kernel",
    ),
    ("mlp kernels", r"leaky_relu2|linear_residual|^(inverse_rms|up|down|dpre|dx)_kernel"),
    ("head and loss kernels", r"cross_entropy|nll_|softcap|^(loss_and_gradient|row_nll)_kernel"),
    ("attention", r"flash|fmha|attention|attn|sdpa|qkv?_norm_rope|xsa|^(rotate|unrotate)_kernel"),
    ("matrix products", r"^triton_tem|gemm|cutlass|cublas|nvjet|xmma|aten::(mm|addmm|bmm|baddbmm|linear|matmul)\b"),
    ("optimizer and average", r"multi_tensor|foreach|adam|lerp"),
    ("copies", r"memcpy|memset|copy|aten::(cat|clone|contiguous|fill|zero|ones|empty|index|nonzero|arange)"),
    (_ELEMENTWISE, r"mix_rms_norm|^(mix|unmix)_kernel|fake_quantize|elementwise|vectorized|reduce_kernel|aten::[a-z]"),
)
OTHER = "other"
# ranges that name phases of the training loop, not parts of the model
LOOP_RANGES = ("forward", "backward")

NO_KERNELS = (
    "the trace has no kernels; the driver may forbid profiling (CUPTI): run as root, in a container with "
    "--cap-add=SYS_ADMIN, or load the driver with NVreg_RestrictProfilingToAdminUsers=0"
)


def kernel_family(name: str) -> str:
    lowered = name.lower()
    return next((family for family, pattern in FAMILIES if re.search(pattern, lowered)), OTHER)


def part_of_any_layer(part: str) -> str:
    """Remove the layer numbers from a part's name: "blocks.3.mlp" becomes "blocks.mlp"."""
    return re.sub(r"\.\d+", "", part)


def breakdown(
    events: Iterable[tuple[str, float]], steps: int, group: Callable[[str], str] = kernel_family
) -> dict[str, float]:
    """Add up the times of each group of kernels.

    Args:
        events: (name, microseconds) of each kernel in `steps` steps.
        steps: number of steps.
        group: function that returns the group of a kernel's name.

    Returns:
        Group → milliseconds per step, largest first.
    """
    total: dict[str, float] = {}
    for name, microseconds in events:
        total[group(name)] = total.get(group(name), 0.0) + microseconds / 1e3 / steps
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def kernel_times(trace: profile) -> list[tuple[str, float]]:
    """Return (name, microseconds) of each kernel; on a CPU, of each operator without the operators that it calls."""
    # not `trace.key_averages()`, which would take seconds
    if _of_gpu(trace):
        return [(e.name, e.self_device_time_total) for e in trace.events() if _is_kernel(e)]
    return [(e.name, e.self_cpu_time_total) for e in trace.events() if e.self_cpu_time_total > 0]


def part_times(trace: profile) -> list[tuple[str, float]]:
    """Return (part of the model, microseconds) for each operator that launches kernels. On a CPU: for each operator.

    The part is the name of the innermost range around the operator. A backward operator has the part of its forward
    operator, followed by " backward". Kernels outside all ranges, and kernels of CUDA graphs, belong to "elsewhere".
    """
    events = [event for event in trace.events() if event.device_type.name == "CPU"]
    whole = sum(microseconds for _, microseconds in kernel_times(trace))
    # autograd numbers its nodes per thread. An operator's sequence_nr is the number of the next node, so the last
    # operator with a number is the one that created this node.
    operators = [event for event in events if event.sequence_nr >= 0 and not event.fwd_thread]
    made_in = {(event.thread, event.sequence_nr): _part(event, {}) for event in operators}
    found = []
    for event in events:
        microseconds = sum(kernel.duration for kernel in event.kernels) if _of_gpu(trace) else event.self_cpu_time_total
        part = _part(event, made_in)
        if part and microseconds > 0:
            found.append((part, microseconds))
    return [*found, ("elsewhere", max(0.0, whole - sum(microseconds for _, microseconds in found)))]


def busy_ms(trace: profile, steps: int) -> float | None:
    """Return the milliseconds per step in which the GPU ran at least one kernel, or None if it ran no kernel."""
    spans = sorted((e.time_range.start, e.time_range.end) for e in trace.events() if _is_kernel(e))
    busy, until = 0.0, -math.inf
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e3 / steps if spans else None


def _part(event: Any, made_in: Mapping[tuple[int, int], str]) -> str:
    """Return the name of the innermost range around an event or its forward operator; "" if there is no range."""
    while event is not None and not _is_range(event):
        part = made_in.get((event.fwd_thread, event.sequence_nr), "")
        if part and part not in LOOP_RANGES:
            return f"{part} backward"
        event = event.cpu_parent
    return event.name if event is not None else ""


def _of_gpu(trace: profile) -> bool:
    return ProfilerActivity.CUDA in trace.activities


def _is_kernel(event: Any) -> bool:
    # exclude the ranges of record_function, which also appear as GPU events
    return event.device_type.name == "CUDA" and not event.is_user_annotation


def _is_range(event: Any) -> bool:
    # exclude torch.compile's own ranges, whose names are checksums of the graph
    return event.is_user_annotation and not event.name.startswith(("## Call", "Torch-Compiled Region"))


class StepProfiler:
    """Profiles the steps `steps` of a run, counted from 0.

    Every rank writes a trace to `<run>/profile/`. Rank 0 also writes tables of milliseconds per kernel family and part.
    Starting and writing the profile do not count as training time. Training continues if a file cannot be written. The
    profile ends early before a validation, a checkpoint, or the first step with recurrence. `parts` is the model if it
    is not compiled; the trace then names its modules. None: the model is compiled.
    """

    def __init__(
        self, steps: range, folder: Path, ranks: Ranks, log: RunLogger, clock: WallClock, parts: nn.Module | None = None
    ) -> None:
        self.steps = steps
        self.folder = folder / "profile"
        # _settled: the profile has begun, or the log says why it will not begin
        self._settled = self._recurrence = False
        self._ranks = ranks
        self._log = log
        self._clock = clock
        self._parts = parts
        self._trace: profile | None = None
        self._ranges = contextlib.ExitStack()

    def before(self, step: int, *, recurrence: bool) -> None:
        """Start the profile before its first step. Call this before each step.

        If an earlier process has done the first step already, log this.
        """
        if not self._settled and step > self.steps.start:
            self._settled = True
            self._log.line(
                f"profile:none, an earlier process did step {self.steps.start}, this process began with step {step}: choose later "
                "PROFILE_STEPS"
            )
        if self._trace is not None and recurrence != self._recurrence:
            with self._paused():
                self.end(step, "recurrence begins")
        if step == self.steps.start:
            # pausing the clock waits for the queued work of earlier steps
            with self._paused():
                self._settled, self._recurrence = True, recurrence
                self._trace = new_trace(self._ranks.device)
                if self._parts is not None:
                    self._ranges.enter_context(named_ranges(self._parts))
                self._trace.start()

    def after(self, done: int) -> None:
        """End the profile after its last step. Call this after each step, with the number of finished steps."""
        if self._trace is not None and done >= self.steps.stop:
            with self._paused():
                self.end(done)

    def finish(self, done: int) -> None:
        """End the profile, or log why there is none. Call this at the end of training, with the clock paused."""
        if not self._settled:
            self._log.line(f"profile:none, this process did not reach step {self.steps.start}")
        self.end(done, "training ends")

    def end(self, done: int, why: str = "") -> None:
        """If a profile runs, end it after `done` steps and write its files. The clock must be paused."""
        if self._trace is None:
            return
        trace, self._trace = self._trace, None
        trace.stop()
        self._ranges.close()
        said = f"steps:{self.steps.start}-{done - 1}"
        if done < self.steps.stop:
            said += f" of {self.steps.start}-{self.steps.stop - 1}, {why}"
        problems = [problem for problem in self._ranks.gather(self._write(trace, done)) if problem]
        self._log.line(f"profile:{'; '.join(problems) or self.folder} {said} (profiling slows steps down)")

    def _write(self, trace: profile, done: int) -> str:
        device, steps = self._ranks.device, done - self.steps.start
        try:
            self.folder.mkdir(exist_ok=True)
            write_trace(self.folder / f"trace_rank{self._ranks.rank}.json.gz", trace)
            if self._ranks.is_main:
                name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
                title = f"steps {self.steps.start}-{done - 1} on {name}"
                return write_breakdowns(self.folder, "", trace, steps, title) or ""
        # no exception may leave this method, because the other ranks wait for its answer
        except (OSError, RuntimeError, UserError) as error:
            return f"not all written ({error})"
        return ""

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._clock.pause()
        yield
        self._clock.resume()


def new_trace(device: torch.device) -> profile:
    """Make a profiler of operators and, on a GPU, of kernels. The caller starts it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    return profile(activities=activities)


def write_trace(path: Path, trace: profile) -> None:
    """Write a finished profile as compressed JSON, which Perfetto and chrome://tracing open.

    Raises:
        OSError: the trace could not be written. No file is left.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".trace") as folder:
        plain = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(plain))
        # the profiler does not raise if it cannot write
        if not plain.exists():
            raise OSError(errno.EIO, "the profiler could not write its trace; is the disk full?", str(path))
        with atomic_writer(path) as file:
            file.write(gzip.compress(plain.read_bytes()))


def write_breakdowns(folder: Path, prefix: str, trace: profile, steps: int, title: str) -> str | None:
    """Write the milliseconds per step of each kernel family and of each part of the model, as JSON and PNG.

    `parts.json` lists every layer; `parts.png` shows sums over layers. Return None, or why nothing was written.
    """
    families, parts = breakdown(kernel_times(trace), steps), breakdown(part_times(trace), steps, str)
    if not families:
        return NO_KERNELS
    for name, times in (("breakdown", families), ("parts", parts)):
        atomic_write(folder / f"{prefix}{name}.json", json.dumps(times, indent=1) + "\n")
    plot_breakdown(folder / f"{prefix}breakdown.png", families, title)
    of_any_layer = breakdown(((name, 1e3 * ms) for name, ms in parts.items()), 1, part_of_any_layer)
    plot_breakdown(folder / f"{prefix}parts.png", of_any_layer, title)
    return None


def plot_breakdown(path: Path, times: Mapping[str, float], title: str) -> None:
    # imported here, because only a profile needs matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(times) + 1.4), layout="constrained")
    axis = figure.subplots()
    total = sum(times.values())
    bars = axis.barh(list(times), list(times.values()), color="#0072B2")
    labels = [f"{ms:.2f} ms, {100 * ms / total:.0f} %" for ms in times.values()]
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set(xlabel="ms per step")
    figure.suptitle(f"{total:.2f} ms of kernels per step\n{title}", fontsize=10, x=0.01, ha="left")
    axis.spines[["top", "right"]].set_visible(False)
    with atomic_writer(path) as file:
        FigureCanvasAgg(figure).print_png(file)
