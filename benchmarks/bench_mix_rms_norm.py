"""Residual mix and norm before one layer's attention, for 98,304 tokens, forward and backward.

`torch` is the chain as people write it, `compile` the same under torch.compile (on a CPU only traced), `triton` the
operator's kernels. The operator has to be faster than `compile` before a training step is measured with it: a compiler's
backward pass goes over its gradient once more for the columns' sums, and keeps the mixed stream.
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
from torch.nn import functional as F

from benchmarks import common
from benchmarks.bench_leaky_relu2_mlp import DEVICES
from golf_kernels import dispatch
from golf_kernels.mix_rms_norm import mix_rms_norm

EPS = 1e-6
GAIN = 0.5
LEAVES = ("x", "x0", "mix")
Inputs = dict[str, Tensor]
Chain = Callable[..., tuple[Tensor, Tensor]]


class Shape(NamedTuple):
    """Sequences of `length` tokens of `width` numbers."""

    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"


SHAPES = (Shape(48, 2048, 512),)
TINY = Shape(2, 67, 48)


def traffic(shape: Shape, item_bytes: int = 2) -> dict[str, dict[str, float]]:
    """Bytes to and from device memory of each pass; sums over columns and rows' norms are under 1 % and not counted.

    The kernels read x and x0 and write h and n; then they read dh, dn, x and x0 and write dx and dx0. A compiler's forward
    pass is the same one; its backward pass reads dh, dn and h, writes dx, dx0 and the gradient of h, and reads this one
    again with x and x0 for the columns' sums (so says Inductor's own schedule of the chain, `mix_order_reduction` or not).
    """
    stream = float(shape.batch * shape.length * shape.width * item_bytes)
    return {
        "triton": {"forward": 4 * stream, "backward": 6 * stream},
        "compile": {"forward": 4 * stream, "backward": 9 * stream},
    }


def predict(shape: Shape) -> str:
    """Times computed from bytes, per pass and device."""
    lines = [f"computed, not measured: {shape}, ms"]
    for device in DEVICES:
        for name, passes in traffic(shape).items():
            parts = ", ".join(f"{part} {size / device.gbps / 1e6:.3f}" for part, size in passes.items())
            lines.append(f"  {device.name} ({device.gbps:.0f} GB/s), {name}: {parts}")
    return "\n".join(lines)


def plain(x: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """The chain as people write it."""
    first, second = mix.to(x.dtype).unbind()
    h = torch.addcmul(first * x, second, x0)
    return h, F.rms_norm(h, h.shape[-1:], eps=EPS) * GAIN


def ours(x: Tensor, x0: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """The chain as one operator, on its kernels."""
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "mix_rms_norm=triton"}):
        return mix_rms_norm(x, x0, mix, eps=EPS, gain=GAIN)


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Random streams and upstream gradients, and a mix around (1, 0)."""
    generator = torch.Generator(device).manual_seed(seed)
    # the interpreter, which stands in for a GPU, knows no bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    made = {name: random(*shape).to(dtype) for name in ("x", "x0", "dh", "dn")}
    made["mix"] = torch.tensor([[1.0], [0.0]], device=device) + 0.3 * random(2, shape.width)
    return {name: tensor.requires_grad_(name in LEAVES) for name, tensor in made.items()}


def both_passes(chain: Chain, inputs: Inputs) -> list[Tensor]:
    """Results and gradients."""
    results = chain(*(inputs[name] for name in LEAVES))
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "mix_rms_norm=triton"}):
        gradients = torch.autograd.grad(results, [inputs[name] for name in LEAVES], [inputs["dh"], inputs["dn"]])
    return [*(result.detach() for result in results), *gradients]


def truth(inputs: Inputs) -> list[Tensor]:
    """The same in float64, with the mix as it is in the dtype of the streams."""
    dtype = inputs["x"].dtype
    exact = {name: t.detach().to(dtype).double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    return both_passes(plain, exact)


def make_case(shape: Shape, device: torch.device) -> common.Case:
    """Forward and backward of one layer's mix and norm."""
    return common.Case(
        "mix_rms_norm",
        str(shape),
        "bfloat16" if device.type == "cuda" else "float16",
        functools.partial(make_inputs, shape, device),
        truth,
        flops=0.0,
        bytes=sum(traffic(shape)["triton"].values()),
        # twice what the plain chain errs in bfloat16
        max_rel_err=1e-2,
    )


def variants(device: torch.device) -> list[common.Variant]:
    """Everything that can run here; what cannot is printed with its reason."""
    made = []
    if "triton" in dispatch.available_backends("mix_rms_norm"):
        made.append(common.Variant("triton", functools.partial(both_passes, ours), graph=True))
    else:
        print(f"triton: {dispatch.describe()['mix_rms_norm']['triton']}")
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
    """Check, measure and report."""
    arguments = common.parser("bench_mix_rms_norm", __doc__.splitlines()[0]).parse_args(argv)
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
