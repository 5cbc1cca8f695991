"""Compute the time of each kernel of a training step without a GPU; nothing is measured.

One rank's step of each variant runs on a fake CUDA device, on tensors without data. Inductor plans the compiled graphs
(`benchmarks.computed.inductor_plan`); all other launches are recorded (`benchmarks.computed.recorder`). A kernel takes
max(bytes / bandwidth, FLOP / matrix rate), and no less than the shortest launch. `benchmarks.measure.devices` has the
rates and their sources. Kernels do not overlap; the host and communication take no time.
"""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.computed import fake_cuda
from benchmarks.computed.attention import stand_in
from benchmarks.computed.inductor_plan import Scheduled, planning_for_an_absent_gpu
from benchmarks.computed.recorder import Recorder, fused_muon_listed
from benchmarks.measure.argument_types import parse_positive
from benchmarks.measure.devices import DEVICES, REACHED, Device, Kernel
from benchmarks.measure.step_variants import check_names, make_variants, step_config
from benchmarks.measure.tokens import rank_sequences
from golf_kernels import dispatch, native
from train.common.errors import UserError, main_guard
from train.config import Config
from train.describe import describe
from train.optimize.cuda_graph import Captured
from train.recipes import recipe_names
from train.run.profiling import kernel_family

CUDA = torch.device("cuda", 0)
# milliseconds per step of the published runs on 8 H100, from their logs: before recurrence, then after its start. The
# runs of the baseline and of #262 (sp1024_smear_bigram) used PyTorch's attention
PUBLISHED_MS = {
    "baseline": (43.5,),
    "sp1024_smear_bigram": (96.3,),
    "sp2048_normuon": (53.9,),
    "sp4096_recurrence": (95.3, 102.9),
    "sp8192_sdclip": (102.3, 125.8),
}


class Step(NamedTuple):
    """The kernels of one step of a variant.

    `rest` has the kernels outside the compiled passes: clipping, optimizers and moving average. `waits` counts how
    often the host waits for the device. `graphs` has Inductor's schedules of both passes.
    """

    variant: str
    forward: list[Kernel]
    backward: list[Kernel]
    rest: list[Kernel]
    waits: int
    graphs: list[list[Scheduled]]

    @property
    def kernels(self) -> list[Kernel]:
        return [*self.forward, *self.backward, *self.rest]

    def ms(self, device: Device) -> float:
        return sum(kernel.reached_ms(REACHED[device.name]) for kernel in self.kernels)


@contextlib.contextmanager
def planning(recorder: Recorder, plan: Callable[[list[Scheduled]], Callable[[], None]]) -> Iterator[str]:
    """Run code on tensors without data and with the fake attention. `plan` gets the schedules of compiled graphs.

    A real or fake CUDA device must exist. Yields the name of the attention backend.
    """
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        stack.enter_context(fake_cuda.tensors_without_data())
        for owner, attribute, value in (
            (dispatch, "triton_problem", lambda **_: None),
            (native, "problem", lambda part: None),
            (Captured, "__call__", lambda captured: captured.run()),
            (Tensor, "pin_memory", lambda tensor: tensor),
            (Tensor, "item", lambda tensor: recorder.item(tensor)),
            # tensors without data cannot be moved; they are created on the device, so `to` does nothing
            (torch.nn.Module, "to", lambda module, device: module),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        attention = stack.enter_context(stand_in())
        stack.enter_context(planning_for_an_absent_gpu(plan))
        stack.enter_context(fused_muon_listed(recorder))
        yield attention


def step_kernels(config: Config, name: str, recurrence: bool) -> Step:
    """Run a variant's step twice and record the second. A real or fake CUDA device must exist."""
    recorder = Recorder()
    graphs: list[list[Scheduled]] = []
    passes: list[list[Kernel]] = []

    def plan(schedule: list[Scheduled]) -> Callable[[], None]:
        graphs.append(schedule)
        kernels = [kernel for scheduled in schedule for kernel in scheduled.kernels]
        return lambda: passes.append(kernels)

    with planning(recorder, plan) as attention:
        with CUDA:
            variant = make_variants(config.replace(attention=attention), [name], CUDA)[0]
        tokens = np.zeros((rank_sequences(config), config.train_seq_len + 1), dtype=np.uint16)
        # the first step compiles and allocates the optimizer's state
        variant.run(tokens, recurrence)
        passes.clear()
        recorder.kernels.clear()
        recorder.waits = 0
        with recorder:
            variant.run(tokens, recurrence)
    forward, backward = passes
    return Step(name, forward, backward, recorder.kernels, recorder.waits, graphs)


def described_flops(config: Config, recurrence: bool) -> float:
    """FLOPs of one rank's forward and backward pass, as `python -m train --describe` counts them."""
    phase = "after_recurrence" if recurrence else "before_recurrence"
    tokens = rank_sequences(config) * config.train_seq_len
    return float(1e6 * tokens * describe(config, {})["mflop_per_token"][phase])


def check_complete(step: Step, flops: float) -> None:
    """Raise an error if the schedule of a step has fewer FLOPs than described.

    Products are missing, for example, if Inductor nested one graph in another.
    """
    found = sum(kernel.flops for kernel in (*step.forward, *step.backward))
    if found < (1 - 1e-9) * flops:
        raise UserError(
            f"--variants: {step.variant}: its schedule has {found / 1e12:.2f} TFLOP of the {flops / 1e12:.2f} described: nested graphs "
            "are not listed: leave this variant out"
        )


def table(config: Config, steps: Sequence[Step], recurrence: bool, device: Device) -> str:
    """A text table of milliseconds per step: a row for each kernel family, a column for each variant, and totals."""
    reached = REACHED[device.name]
    tokens = rank_sequences(config) * config.train_seq_len
    phase = f" {'after' if recurrence else 'before'} recurrence," if config.recur_layers else ""
    flops = described_flops(config, recurrence)
    times = [family_ms(step.kernels, device) for step in steps]
    totals = [step.ms(device) for step in steps]
    rows: list[tuple[str, list[str]]] = [
        (family, [f"{found[family]:.2f}" if family in found else "–" for found in times])
        for family, _ in Counter({name: ms for found in times for name, ms in found.items()}).most_common()
    ]
    rows += [
        ("ms per step", [f"{total:.2f}" for total in totals]),
        ("at peak rates", [f"{sum(kernel.floor_ms(device) for kernel in step.kernels):.2f}" for step in steps]),
        ("GB moved", [f"{sum(kernel.bytes for kernel in step.kernels) / 1e9:.1f}" for step in steps]),
        ("launches", [str(len(step.kernels)) for step in steps]),
        ("waits of the host", [str(step.waits) for step in steps]),
        (f"tokens/s, {steps[0].variant} = 1", [f"{totals[0] / total:.2f}" for total in totals]),
        (
            f"utilisation of {reached.tflops['cublas']:.0f} TFLOP/s",
            [f"{flops / total / 1e9 / reached.tflops['cublas']:.0%}" for total in totals],
        ),
    ]
    published = PUBLISHED_MS.get(config.recipe, ())
    if len(published) > recurrence and device.name == "H100" and tokens > 10_000:
        run_ms = published[recurrence]
        rows.append((f"published run ({run_ms} ms) / computed", [f"{run_ms / total:.2f}" for total in totals]))
    width = max(len(name) for name, _ in rows)
    widths = [max(12, len(step.variant) + 2) for step in steps]
    lines = [f"{config.recipe}, {tokens:,} tokens,{phase} {device.name}: computed, not measured"]
    lines += [
        f"{name:<{width}}" + "".join(f"{value:>{wide}}" for value, wide in zip(values, widths, strict=True))
        for name, values in [("", [step.variant for step in steps]), *rows]
    ]
    return "\n".join(lines)


def family_ms(kernels: Sequence[Kernel], device: Device) -> dict[str, float]:
    """Milliseconds of the kernels, by kernel family."""
    found: dict[str, float] = {}
    for kernel in kernels:
        family = kernel_family(kernel.name)
        found[family] = found.get(family, 0.0) + kernel.reached_ms(REACHED[device.name])
    return found


def largest(step: Step, device: Device, count: int) -> str:
    """Lists the `count` kernels that take longest.

    Launches with the same pass, name and bytes are added up.
    """
    times: Counter[tuple[str, str, float]] = Counter()
    launches: Counter[tuple[str, str, float]] = Counter()
    for part in ("forward", "backward", "rest"):
        for kernel in getattr(step, part):
            key = (part, kernel.name, kernel.bytes)
            times[key] += kernel.reached_ms(REACHED[device.name])
            launches[key] += 1
    lines = [f"largest of {step.variant}:"]
    for key, ms in times.most_common(count):
        part, name, size = key
        lines.append(f"{ms:8.3f} ms  {launches[key]:4} x {size / 1e6:8.1f} MB  {part:<8}  {name[:100]}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks schedule", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument("--variants", default="published,torch,golf", help="comma-separated; see bench_step --help")
    parser.add_argument(
        "--phase", default="both", choices=("before", "after", "both"), help="before: recurrence off; after: on"
    )
    parser.add_argument("--device", default="h100", choices=[device.name.lower() for device in DEVICES])
    parser.add_argument("--largest", type=parse_positive, default=12, metavar="N", help="kernels to list; default 12")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try the command")
    arguments = parser.parse_args(argv)
    device = next(device for device in DEVICES if device.name.lower() == arguments.device)
    config = step_config(arguments.recipe, CUDA, tiny=arguments.tiny)
    if arguments.phase == "after" and not config.recur_layers:
        raise UserError(f"--phase after: {arguments.recipe} repeats no layers: expected before or both")
    names = arguments.variants.split(",")
    with mock.patch.object(dispatch, "triton_problem", return_value=None):
        check_names(names)
    # PyTorch warns about tensors without data
    warnings.simplefilter("ignore")
    for recurrence in sorted({False, bool(config.recur_layers)}):
        if arguments.phase in ("both", "after" if recurrence else "before"):
            steps = [step_kernels(config, name, recurrence) for name in names]
            for step in steps:
                check_complete(step, described_flops(config, recurrence))
            print(table(config, steps, recurrence, device), end="\n\n")
            for step in steps:
                print(largest(step, device, arguments.largest), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    main_guard(main)
