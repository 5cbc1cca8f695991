"""Benchmarks of operators that replace a chain of elementwise operations on large tensors.

There are three variants. `torch` is the chain in plain PyTorch. `compile` is the chain under torch.compile, which only
traces on a CPU. `triton` is the operator on its Triton kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import common
from benchmarks.measure.devices import DEVICES, Kernel
from golf_kernels import dispatch, operators

Function = Callable[..., Any]


@dataclass(frozen=True)
class Chain:
    """The benchmark of one operator: the chain that the operator replaces, and the shapes at which both are timed.

    `op` is the operator's name. `plain` computes the chain and takes the operator's keyword arguments. `traffic(shape)`
    gives the bytes that each pass of each variant reads and writes; the operator's variant comes first. A shape is a
    named tuple of keyword arguments, with which the operator makes its example inputs (`operators.Operator.inputs`).
    `tiny` is the shape for `--tiny`.
    """

    op: str
    plain: Function
    traffic: Callable[[Any], Mapping[str, Mapping[str, float]]]
    shapes: tuple[Any, ...]
    tiny: Any

    @property
    def operator(self) -> operators.Operator:
        return operators.declared()[self.op]

    def inputs(self, shape: Any, device: torch.device, seed: int) -> dict[str, Any]:
        """Returns random inputs by name. The entry `upstream` lists an upstream gradient for each result."""
        make = operators.random_tensors(device, _dtype(device), seed)
        inputs = self.operator.inputs(make, **shape._asdict())
        return inputs | {"upstream": operators.upstream_gradients(self.operator.function, inputs, make)}

    def run(self, function: Function, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Returns the results of `function` and the gradients of its inputs. The operator uses its Triton kernels."""
        with dispatch.forced(f"{self.op}=triton"):
            own = dict(inputs)
            upstream = own.pop("upstream")
            return operators.run(function, own, upstream)

    def case(self, shape: Any, device: torch.device) -> common.Case:
        needed = next(iter(self.traffic(shape).values()))
        return common.Case(
            self.op,
            str(shape),
            str(_dtype(device)).removeprefix("torch."),
            functools.partial(self.inputs, shape, device),
            lambda inputs: self.run(self.plain, operators.exact(inputs, rounded_to=_dtype(device))),
            flops=0.0,
            bytes=sum(needed.values()),
            # the plain chains err up to 6e-3 in bfloat16
            max_rel_err=1e-2,
        )

    def variants(self, device: torch.device) -> list[common.Variant]:
        """Returns the variants that can run here. If the Triton kernels cannot run, prints the reason."""
        traced = {"backend": "aot_eager"} if device.type == "cpu" else {"dynamic": False}
        functions = {"triton": self.operator.function}
        if "triton" not in dispatch.available_backends(self.op):
            print(f"triton: {dispatch.describe()[self.op]['triton']}")
            functions = {}
        functions |= {"torch": self.plain, "compile": torch.compile(self.plain, **traced)}
        return [
            common.Variant(name, functools.partial(self.run, function), graph=True)
            for name, function in functions.items()
        ]

    def kept_bytes(self, function: Function, inputs: Mapping[str, Any]) -> int:
        """Returns the bytes of the tensors that a forward pass saves for the backward pass, including inputs."""
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {name: value for name, value in inputs.items() if name != "upstream"}
        with (
            dispatch.forced(f"{self.op}=triton"),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            function(**own)
        return sum(kept.values())

    def predict(self, shape: Any) -> str:
        """Returns a text with the microseconds of each pass, computed from memory traffic, for each GPU and variant."""
        lines = [f"computed, not measured: {shape}, µs"]
        for device in DEVICES:
            for name, passes in self.traffic(shape).items():
                times = {part: Kernel(part, 0.0, size).floor_ms(device) for part, size in passes.items()}
                parts = ", ".join(f"{part} {1e3 * time:.4g}" for part, time in times.items())
                lines.append(f"  {device.name} ({device.gbps:.0f} GB/s), {name}: {parts}")
        return "\n".join(lines)

    def main(self, prog: str, description: str, argv: list[str] | None) -> int:
        arguments = common.parser(prog, description).parse_args(argv)
        device = arguments.device
        clock = common.Clock(device, arguments.warmup_ms, arguments.rounds)
        limits = common.ceilings(clock)
        for shape in [self.tiny] if arguments.tiny else self.shapes:
            print(self.predict(shape))
            rows = common.measure(self.case(shape, device), self.variants(device), clock, limits)
            common.report(rows, common.environment(device), keep=not arguments.tiny)
            functions = {"triton": self.operator.function, "torch": self.plain}
            for name in [row["impl"] for row in rows if row["impl"] in functions]:
                kept = self.kept_bytes(functions[name], self.inputs(shape, device, 0))
                print(f"{name} keeps {kept / 1e6:.1f} MB for the backward pass")
            print(verdict(rows), end="\n\n")
        return 0


def verdict(rows: Sequence[common.Row]) -> str:
    times = {row["impl"]: row["p50"] for row in rows}
    if "triton" not in times:
        return "no Triton kernel ran here"
    return (
        f"triton is {times['compile'] / times['triton']:.2f} times as fast as 'compile' and takes "
        f"{times['triton'] / rows[0]['floor']:.2f} times the floor"
    )


def _dtype(device: torch.device) -> torch.dtype:
    # Triton's interpreter, used without a GPU, has no bfloat16
    return torch.bfloat16 if device.type == "cuda" else torch.float16
