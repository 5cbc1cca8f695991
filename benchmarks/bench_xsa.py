"""XSA behind one layer's attention of 98,304 tokens, forward and backward.

`torch` is the chain that the model gives a compiler, `compile` the same under torch.compile (on a CPU only traced),
`triton` the operator's kernels. The operator has to be faster than `compile` before a training step is measured with it:
both read and write the same large tensors, and the chain keeps two small ones more.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.bench_leaky_relu2_mlp import DEVICES
from golf_kernels import dispatch
from golf_kernels.xsa import xsa
from train.model.attention import remove_value_direction

LEAVES = ("output", "value")
Inputs = dict[str, Tensor]
Chain = Callable[[Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Sequences of `length` tokens, heads of queries and values, and their dimensions."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads}/{self.kv_heads}x{self.dim}"


SHAPES = (Shape(48, 2048, 8, 4, 64), Shape(48, 2048, 8, 8, 64))
TINY = Shape(2, 9, 4, 2, 16)


def traffic(shape: Shape, item_bytes: int = 2) -> dict[str, float]:
    """Bytes to and from device memory of each pass: every tensor once."""
    numbers = float(shape.batch * shape.length * shape.dim * item_bytes)
    output, value = numbers * shape.heads, numbers * shape.kv_heads
    # o, v -> y; dy, o, v -> do, dv
    return {"forward": 2 * output + value, "backward": 3 * output + 2 * value}


def predict(shape: Shape) -> str:
    """Times computed from bytes, per pass and device."""
    lines = [f"computed, not measured: {shape}, ms"]
    for device in DEVICES:
        parts = ", ".join(f"{name} {size / device.gbps / 1e6:.3f}" for name, size in traffic(shape).items())
        lines.append(f"  {device.name} ({device.gbps:.0f} GB/s): {parts}")
    return "\n".join(lines)


def ours(output: Tensor, value: Tensor) -> Tensor:
    """The chain as one operator, on its kernels."""
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "xsa=triton"}):
        return xsa(output, value)


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Random output and values, and an upstream gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    # the interpreter, which stands in for a GPU, knows no bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    batch, length, heads, kv_heads, dim = shape
    sizes = {"output": heads, "value": kv_heads, "dy": heads}
    made = {
        name: torch.randn(batch, length, count, dim, generator=generator, device=device).to(dtype)
        for name, count in sizes.items()
    }
    return {name: tensor.requires_grad_(name in LEAVES) for name, tensor in made.items()}


def both_passes(chain: Chain, inputs: Inputs) -> list[Tensor]:
    """Result and gradients."""
    leaves = [inputs[name] for name in LEAVES]
    y = chain(*leaves)
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "xsa=triton"}):
        return [y.detach(), *torch.autograd.grad(y, leaves, inputs["dy"])]


def truth(inputs: Inputs) -> list[Tensor]:
    """The same in float64."""
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    return both_passes(remove_value_direction, exact)


def make_case(shape: Shape, device: torch.device) -> common.Case:
    """Forward and backward of one layer's XSA."""
    return common.Case(
        "xsa",
        str(shape),
        "bfloat16" if device.type == "cuda" else "float16",
        functools.partial(make_inputs, shape, device),
        truth,
        flops=0.0,
        bytes=sum(traffic(shape).values()),
        # the plain chain errs 6e-3 in bfloat16, in the gradient of the values
        max_rel_err=1e-2,
    )


def variants(device: torch.device) -> list[common.Variant]:
    """Everything that can run here; what cannot is printed with its reason."""
    made = []
    if "triton" in dispatch.available_backends("xsa"):
        made.append(common.Variant("triton", functools.partial(both_passes, ours), graph=True))
    else:
        print(f"triton: {dispatch.describe()['xsa']['triton']}")
    plain = remove_value_direction
    on_gpu = device.type == "cuda"
    compiled = torch.compile(plain, dynamic=False) if on_gpu else torch.compile(plain, backend="aot_eager")
    made.append(common.Variant("torch", functools.partial(both_passes, plain), graph=True))
    made.append(common.Variant("compile", functools.partial(both_passes, compiled), graph=True))
    return made


def verdict(rows: Sequence[common.Row]) -> str:
    """What decides whether a training step is worth measuring."""
    times = {row["impl"]: row["p50"] for row in rows}
    if "triton" not in times:
        return "no Triton kernel ran here"
    return (
        f"triton is {times['compile'] / times['triton']:.2f} times as fast as 'compile' and takes "
        f"{times['triton'] / rows[0]['floor']:.2f} times the floor"
    )


def main(argv: list[str] | None = None) -> int:
    """Check, measure and report both shapes."""
    arguments = common.parser("bench_xsa", __doc__.splitlines()[0]).parse_args(argv)
    clock = common.Clock(arguments.device, arguments.warmup_ms, arguments.rounds)
    limits = common.ceilings(clock)
    for shape in [TINY] if arguments.tiny else SHAPES:
        print(predict(shape))
        rows = common.measure(make_case(shape, arguments.device), variants(arguments.device), clock, limits)
        common.report(rows, common.environment(arguments.device), keep=not arguments.tiny)
        print(verdict(rows), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
