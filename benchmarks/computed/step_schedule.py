"""Compute the time of each kernel of a training step without a GPU; nothing is measured.

One rank's step of each variant runs on a fake CUDA device, on tensors without data. Inductor plans the compiled graphs
(`benchmarks.computed.inductor_plan`); all other launches are recorded (`benchmarks.computed.recorder`). A kernel takes
max(bytes / bandwidth, FLOP / matrix rate), and no less than the shortest launch. `benchmarks.measure.devices` has a fast
and a slow value of each rate, with their sources. So a step's time is a range. Its fast end assumes no gaps between
kernels and no time for communication. Its slow end has gaps, and communication takes the time that
`benchmarks.computed.communication` computes. Kernels do not overlap.
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
from benchmarks.computed.communication import exchanged_bytes, link_ms
from benchmarks.computed.inductor_plan import Scheduled, planning_for_an_absent_gpu
from benchmarks.computed.recorder import Recorder, fused_muon_listed
from benchmarks.measure.argument_types import parse_positive
from benchmarks.measure.devices import DEVICES, REACHED, Device, Kernel, Range, total
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
# milliseconds per step of published runs on 8 H100, from their logs: of the fastest and the slowest run, before
# recurrence starts and after. The runs of the baseline and of #262 (sp1024_smear_bigram) used PyTorch's attention.
# sp8192_sdclip: #1471, #1394 and #1493, which repeat different layers; 118.8 is the mean over a whole run of #1471
PUBLISHED_MS = {
    "baseline": (Range(43.5, 43.5),),
    "sp1024_smear_bigram": (Range(96.3, 96.3),),
    "sp2048_normuon": (Range(53.9, 53.9),),
    "sp4096_recurrence": (Range(95.3, 95.3), Range(102.9, 102.9)),
    "sp8192_sdclip": (Range(101.9, 102.3), Range(118.8, 150.3)),
}


class Step(NamedTuple):
    """The kernels of one step of a variant.

    `rest` has the kernels outside the compiled passes: clipping, optimizers and moving average. `waits` counts how
    often the host waits for the device. `graphs` has Inductor's schedules of both passes. `communication_ms` is the time
    of the collectives.
    """

    variant: str
    forward: list[Kernel]
    backward: list[Kernel]
    rest: list[Kernel]
    waits: int
    graphs: list[list[Scheduled]]
    communication_ms: float

    @property
    def kernels(self) -> list[Kernel]:
        return [*self.forward, *self.backward, *self.rest]

    def ms(self, device: Device) -> Range:
        kernels = [kernel.reached_ms(REACHED[device.name]) for kernel in self.kernels]
        return total([*kernels, Range(0.0, self.communication_ms)])


@contextlib.contextmanager
def planning(recorder: Recorder, plan: Callable[[list[Scheduled]], Callable[[], None]]) -> Iterator[str]:
    """Let code run on tensors without data and with the fake attention. `plan` gets the schedules of compiled graphs.

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
    sent = sum(exchanged_bytes(config).values())
    return Step(name, forward, backward, recorder.kernels, recorder.waits, graphs, link_ms(sent))


def described_flops(config: Config, recurrence: bool) -> float:
    """Returns the FLOPs of one rank's forward and backward pass, as `python -m train --describe` counts them."""
    phase = "after_recurrence" if recurrence else "before_recurrence"
    tokens = rank_sequences(config) * config.train_seq_len
    return float(1e6 * tokens * describe(config, {})["mflop_per_token"][phase])


def check_complete(step: Step, flops: float) -> None:
    """Raise an error if the kernels of a step have fewer FLOPs than `flops`.

    Kernels are missing, for example, if Inductor nested one graph in another.
    """
    found = sum(kernel.flops for kernel in (*step.forward, *step.backward))
    if found < (1 - 1e-9) * flops:
        raise UserError(
            f"--variants: {step.variant}: its schedule has {found / 1e12:.2f} TFLOP of the {flops / 1e12:.2f} described: nested graphs "
            "are not listed: leave this variant out"
        )


def between(low: float, high: float, form: str = ".2f") -> str:
    """Returns both ends of a range as text, or one number if both look the same."""
    texts = list(dict.fromkeys(format(value, form) for value in sorted((low, high))))
    return "–".join(texts)


def table(config: Config, steps: Sequence[Step], recurrence: bool, device: Device) -> str:
    """Returns a text table of milliseconds per step: kernel families as rows, variants as columns, and totals."""
    peak = REACHED[device.name].tflops["cublas"].fast
    tokens = rank_sequences(config) * config.train_seq_len
    phase = f" {'after' if recurrence else 'before'} recurrence," if config.recur_layers else ""
    flops = described_flops(config, recurrence)
    times = [family_ms(step.kernels, device) for step in steps]
    totals = [step.ms(device) for step in steps]
    order = Counter({family: ms.fast for found in times for family, ms in found.items()})
    rows: list[tuple[str, list[str]]] = [
        (family, [between(*found[family]) if family in found else "–" for found in times])
        for family, _ in order.most_common()
    ]
    rows += [
        ("communication", [between(0.0, step.communication_ms) for step in steps]),
        ("ms per step", [between(*ms) for ms in totals]),
        ("at peak rates", [f"{sum(kernel.floor_ms(device) for kernel in step.kernels):.2f}" for step in steps]),
        ("GB moved", [f"{sum(kernel.bytes for kernel in step.kernels) / 1e9:.1f}" for step in steps]),
        ("launches", [str(len(step.kernels)) for step in steps]),
        ("waits of the host", [str(step.waits) for step in steps]),
        (
            f"tokens/s, {steps[0].variant} = 1",
            [between(totals[0].fast / ms.fast, totals[0].slow / ms.slow) for ms in totals],
        ),
        (
            f"utilisation of {peak:.0f} TFLOP/s",
            [between(flops / ms.slow / 1e9 / peak, flops / ms.fast / 1e9 / peak, ".0%") for ms in totals],
        ),
    ]
    published = PUBLISHED_MS.get(config.recipe, ())
    if len(published) > recurrence and device.name == "H100" and tokens > 10_000:
        run = between(*published[recurrence], ".1f")
        rows.append(("published run, from its log", [run if step.variant == "published" else "–" for step in steps]))
    width = max(len(name) for name, _ in rows)
    widths = [max(15, len(step.variant) + 2) for step in steps]
    lines = [f"{config.recipe}, {tokens:,} tokens,{phase} {device.name}: computed, not measured"]
    lines += [
        f"{name:<{width}}" + "".join(f"{value:>{wide}}" for value, wide in zip(values, widths, strict=True))
        for name, values in [("", [step.variant for step in steps]), *rows]
    ]
    return "\n".join(lines)


def rates(device: Device) -> str:
    """Lists the slow and the fast value of each rate, and its source."""
    reached = REACHED[device.name]
    listed = [(f"{name}, TFLOP/s", rate) for name, rate in reached.tflops.items()]
    listed += [(f"{name}, GB/s", rate) for name, rate in reached.gbps.items()]
    listed.append(("gap between kernels, µs", reached.gap_us))
    return "\n".join(["rates:", *(f"{between(*rate[:2], '.0f'):>9}  {name}: {rate.source}" for name, rate in listed)])


def family_ms(kernels: Sequence[Kernel], device: Device) -> dict[str, Range]:
    """Returns kernel family → milliseconds of its kernels."""
    found: dict[str, list[Range]] = {}
    for kernel in kernels:
        found.setdefault(kernel_family(kernel.name), []).append(kernel.reached_ms(REACHED[device.name]))
    return {family: total(times) for family, times in found.items()}


def largest(step: Step, device: Device, count: int) -> str:
    """Lists the `count` kernels that take longest at the fast rates.

    Launches with the same pass, name and bytes count as one kernel.
    """
    times: Counter[tuple[str, str, float]] = Counter()
    launches: Counter[tuple[str, str, float]] = Counter()
    for part in ("forward", "backward", "rest"):
        for kernel in getattr(step, part):
            key = (part, kernel.name, kernel.bytes)
            times[key] += kernel.reached_ms(REACHED[device.name]).fast
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
    print(rates(device))
    return 0


if __name__ == "__main__":
    main_guard(main)
