"""Operators that read and write large tensors once, beside the chain of passes that a compiler makes of the same formula.

`torch` is the chain as people write it, `compile` the same under torch.compile (on a CPU only traced), `triton` the
operator's kernels. An operator has to be faster than `compile` before a training step is measured with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import common
from benchmarks.measure.devices import DEVICES, Kernel
from golf_kernels import dispatch

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Chain:
    """An operator and the chain that it replaces.

    Attributes:
        op: name of the operator; the name covers its backward operator too.
        plain: the chain as people write it.
        operator: the operator, with the same arguments.
        arguments: names of the inputs that both take, in their order.
        leaves: those of them that have gradients.
        upstream: names of the inputs that are gradients of the results.
        make: inputs by name from a shape, the dtype of large tensors, a device and a seed.
        traffic: bytes to and from device memory of each pass of a shape by implementation, the operator's first.
        shapes: what is measured.
        tiny: what `--tiny` takes.
    """

    op: str
    plain: Function
    operator: Function
    arguments: tuple[str, ...]
    leaves: tuple[str, ...]
    upstream: tuple[str, ...]
    make: Callable[[Any, torch.dtype, torch.device, int], Inputs]
    traffic: Callable[[Any], Mapping[str, Mapping[str, float]]]
    shapes: tuple[Any, ...]
    tiny: Any

    def forced(self) -> AbstractContextManager[Any]:
        """The operator on its kernels."""
        return dispatch.forced(f"{self.op}=triton")

    def inputs(self, shape: Any, device: torch.device, seed: int) -> Inputs:
        """Random inputs by name; the leaves require gradients."""
        made = self.make(shape, _dtype(device), device, seed)
        return {name: tensor.requires_grad_(name in self.leaves) for name, tensor in made.items()}

    def both_passes(self, function: Function, inputs: Inputs) -> list[Tensor]:
        """Results and gradients."""
        with self.forced():
            found = function(*(inputs[name] for name in self.arguments))
            results = [found] if isinstance(found, Tensor) else list(found)
            leaves, upstream = ([inputs[name] for name in names] for names in (self.leaves, self.upstream))
            return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, upstream)]

    def truth(self, inputs: Inputs) -> list[Tensor]:
        """The same in float64, with every input rounded as it counts, to the dtype of the first."""
        dtype = inputs[self.arguments[0]].dtype
        exact = {name: t.detach().to(dtype).double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
        return self.both_passes(self.plain, exact)

    def case(self, shape: Any, device: torch.device) -> common.Case:
        """Forward and backward of one layer."""
        operator = next(iter(self.traffic(shape).values()))
        return common.Case(
            self.op,
            str(shape),
            str(_dtype(device)).removeprefix("torch."),
            functools.partial(self.inputs, shape, device),
            self.truth,
            flops=0.0,
            bytes=sum(operator.values()),
            # plain chains err up to 6e-3 in bfloat16
            max_rel_err=1e-2,
        )

    def variants(self, device: torch.device) -> list[common.Variant]:
        """Everything that can run here; what cannot is printed with its reason."""
        traced = {"backend": "aot_eager"} if device.type == "cpu" else {"dynamic": False}
        functions = {"triton": self.operator}
        if "triton" not in dispatch.available_backends(self.op):
            print(f"triton: {dispatch.describe()[self.op]['triton']}")
            functions = {}
        functions |= {"torch": self.plain, "compile": torch.compile(self.plain, **traced)}
        return [
            common.Variant(name, functools.partial(self.both_passes, function), graph=True)
            for name, function in functions.items()
        ]

    def kept_bytes(self, function: Function, inputs: Inputs) -> int:
        """Memory of what a forward pass keeps for the backward pass, its inputs counted where they are kept."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with self.forced(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(*(inputs[name] for name in self.arguments))
        return sum(kept.values())

    def predict(self, shape: Any) -> str:
        """Times computed from bytes, per device, implementation and pass."""
        lines = [f"computed, not measured: {shape}, µs"]
        for device in DEVICES:
            for name, passes in self.traffic(shape).items():
                times = {part: Kernel(part, 0.0, size).floor_ms(device) for part, size in passes.items()}
                parts = ", ".join(f"{part} {1e3 * time:.4g}" for part, time in times.items())
                lines.append(f"  {device.name} ({device.gbps:.0f} GB/s), {name}: {parts}")
        return "\n".join(lines)

    def main(self, prog: str, description: str, argv: list[str] | None) -> int:
        """Check, measure and report every shape."""
        arguments = common.parser(prog, description).parse_args(argv)
        device = arguments.device
        clock = common.Clock(device, arguments.warmup_ms, arguments.rounds)
        limits = common.ceilings(clock)
        for shape in [self.tiny] if arguments.tiny else self.shapes:
            print(self.predict(shape))
            rows = common.measure(self.case(shape, device), self.variants(device), clock, limits)
            common.report(rows, common.environment(device), keep=not arguments.tiny)
            functions = {"triton": self.operator, "torch": self.plain}
            for name in [row["impl"] for row in rows if row["impl"] in functions]:
                kept = self.kept_bytes(functions[name], self.inputs(shape, device, 0))
                print(f"{name} keeps {kept / 1e6:.1f} MB for the backward pass")
            print(verdict(rows), end="\n\n")
        return 0


def verdict(rows: Sequence[common.Row]) -> str:
    """What decides whether a training step is worth measuring."""
    times = {row["impl"]: row["p50"] for row in rows}
    if "triton" not in times:
        return "no Triton kernel ran here"
    return (
        f"triton is {times['compile'] / times['triton']:.2f} times as fast as 'compile' and takes "
        f"{times['triton'] / rows[0]['floor']:.2f} times the floor"
    )


def _dtype(device: torch.device) -> torch.dtype:
    # the interpreter, which stands in for a GPU, knows no bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float16
