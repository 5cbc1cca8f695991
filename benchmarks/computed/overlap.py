"""When the buckets of GRADIENT_REDUCTION=overlapped start in a compiled backward pass, and how much of their way it hides.

Inductor plans the backward pass of one GPU's share for an H100 (`benchmarks.computed.step_schedule`), with the starts in it that eight ranks
would have; kernels take what they are computed to take there, and transfers what `benchmarks.computed.communication` computes for
them. Computed, not measured: that a transfer and a kernel slow each other down is not in it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.computed.communication import bucket_bytes, link_ms
from benchmarks.computed.inductor_plan import Scheduled
from benchmarks.computed.recorder import Recorder
from benchmarks.computed.step_schedule import CUDA, planning
from benchmarks.measure.devices import REACHED
from benchmarks.measure.step_variants import backends_of, check_ways, share_config
from benchmarks.measure.tokens import share_sequences
from golf_kernels import dispatch
from train.common.errors import UserError, main_guard
from train.config import MICRO_BATCHES, Config
from train.loop import compiled_loss
from train.model.attention_choice import use_attention
from train.model.gpt import GPT
from train.optimize.groups import split_parameters
from train.optimize.overlap import cut
from train.optimize.reduction import Reduction
from train.recipes import recipe_names


class Start(NamedTuple):
    """The start of a bucket in a backward pass.

    Attributes:
        matrices: numbers of those whose gradients it sends.
        after: ms of the pass that lie before it.
        left: ms of the pass behind it.
    """

    matrices: tuple[int, ...]
    after: float
    left: float


class _OfEightRanks(Reduction):
    """What gives a compiled model the starts of eight ranks, in one process."""

    def compiler(self, options: Mapping[str, Any]) -> Callable[..., Any]:
        # imported here: it needs Inductor
        from train.optimize.backward_graph import overlapping_compiler

        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in self._matrices]
        return overlapping_compiler(self._matrices, cut(shapes, MICRO_BATCHES), options)


def find_starts(config: Config, way: str, recurrence: bool) -> list[Start]:
    """The starts in the backward pass of a step, in the buckets' order; in a process that has a CUDA device.

    Args:
        config: the recipe; `compile` is on.
        way: torch, golf or a part of it, as in `benchmarks.measure.step_variants`.
        recurrence: whether the repeated layers run twice.
    """
    graphs: list[list[Scheduled]] = []

    def plan(schedule: list[Scheduled]) -> Callable[[], None]:
        graphs.append(schedule)
        return lambda: None

    with planning(Recorder(), plan) as attention, dispatch.forced(backends_of(way)):
        with CUDA:
            model = GPT(config.replace(attention=attention))
            ids = torch.zeros(share_sequences(config), config.train_seq_len, dtype=torch.int64)
        use_attention(model, attention)
        reduction = _OfEightRanks([], list(split_parameters(model, config)["matrix"].values()))
        compiled_loss(model, config, CUDA, reduction=reduction)(ids, ids, recurrence=recurrence).backward()
    _, backward = graphs
    times = [sum(kernel.reached_ms(REACHED["H100"]) for kernel in scheduled.kernels) for scheduled in backward]
    starts = [
        Start(scheduled.sends, sum(times[: place + 1]), sum(times[place + 1 :]))
        for place, scheduled in enumerate(backward)
        if scheduled.sends
    ]
    # buckets are cut from the model's end
    return sorted(starts, key=lambda start: -max(start.matrices))


def hidden_ms(starts: Sequence[Start], transfers: Sequence[float]) -> list[float]:
    """How much of each transfer lies inside the backward pass; they follow each other on one link, in the buckets' order.

    Args:
        starts: of the buckets.
        transfers: ms of each.
    """
    end = free = 0.0
    hidden = []
    for start, transfer in zip(starts, transfers, strict=True):
        end = start.after + start.left
        begin = max(start.after, free)
        free = begin + transfer
        hidden.append(max(min(free, end) - begin, 0.0))
    return hidden


def table(name: str, starts: Sequence[Start], sent: Sequence[float]) -> str:
    """A line per bucket."""
    transfers = [link_ms(size) for size in sent]
    hidden = hidden_ms(starts, transfers)
    lines = [
        f"{name}, backward pass of {starts[0].after + starts[0].left:.2f} ms on an H100: computed, not measured",
        "bucket  gradients  sent MB  starts at ms  ms left  transfer ms  hidden ms",
    ]
    for number, (start, size, transfer, inside) in enumerate(zip(starts, sent, transfers, hidden, strict=True)):
        lines.append(
            f"{number:>6}  {len(start.matrices):>9}  {size / 1e6:>7.1f}  {start.after:>12.2f}  {start.left:>7.2f}  {transfer:>11.3f}  {inside:>9.3f}"
        )
    lines.append(f"hidden: {sum(hidden):.3f} of {sum(transfers):.3f} ms, {sum(hidden) / sum(transfers):.0%}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks overlap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="sp8192_sdclip", choices=recipe_names())
    parser.add_argument("--way", default="torch", help="a way of bench_step that is not published")
    parser.add_argument("--tiny", action="store_true", help="a narrow model, to try this out")
    arguments = parser.parse_args(argv)
    with mock.patch.object(dispatch, "triton_problem", return_value=None):
        if arguments.way == "published" or "+" in arguments.way:
            raise UserError(f"--way: {arguments.way!r}: expected torch, golf, golf-OPERATOR or operator=backend")
        check_ways([arguments.way])
    config = share_config(arguments.recipe, CUDA, tiny=arguments.tiny).replace(device="cuda", compute_dtype="bfloat16")
    # PyTorch's, about tensors that have no address
    warnings.simplefilter("ignore")
    for recurrence in sorted({False, bool(config.recur_layers)}):
        phase = (", after recurrence" if recurrence else ", before recurrence") if config.recur_layers else ""
        starts = find_starts(config, arguments.way, recurrence)
        print(table(f"{config.recipe}{phase}, {arguments.way}", starts, bucket_bytes(config)), end="\n\n", flush=True)
    return 0


if __name__ == "__main__":
    main_guard(main)
