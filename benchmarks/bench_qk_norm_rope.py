"""QK-norm, rotary embedding and query gain of one layer's 98,304 tokens, forward and backward.

`torch` is the chain as people write it, `compile` the same under torch.compile (on a CPU only traced), `triton` the
operator's kernels. The operator has to be faster than `compile` before a training step is measured with it: the chain
saves q and k beside what attention saves, and the operator one number per head and row.
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
from golf_kernels.qk_norm_rope import qk_norm_rope

EPS = 1e-6
LEAVES = ("q", "k", "gain")
Inputs = dict[str, Tensor]
Chain = Callable[..., tuple[Tensor, Tensor]]


class Shape(NamedTuple):
    """Sequences of `length` tokens, heads of queries and keys, and their dimensions, of which `rotary` turn."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    rotary: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads}+{self.kv_heads}x{self.dim}, rotary {self.rotary}"


SHAPES = (Shape(48, 2048, 8, 4, 64, 16), Shape(96, 1024, 8, 4, 64, 64))
TINY = Shape(2, 9, 4, 2, 16, 8)


def traffic(shape: Shape, item_bytes: int = 2) -> dict[str, float]:
    """Bytes to and from device memory of each pass: the large tensors once, and the rstd; tables stay in the cache."""
    vectors = shape.batch * shape.length * (shape.heads + shape.kv_heads)
    tensor, rstd = float(vectors * shape.dim * item_bytes), 4.0 * vectors
    return {"forward": 2 * tensor + rstd, "backward": 3 * tensor + rstd}


def predict(shape: Shape) -> str:
    """Times computed from bytes, per pass and device."""
    lines = [f"computed, not measured: {shape}, ms"]
    for device in DEVICES:
        parts = ", ".join(f"{name} {size / device.gbps / 1e6:.3f}" for name, size in traffic(shape).items())
        lines.append(f"  {device.name} ({device.gbps:.0f} GB/s): {parts}")
    return "\n".join(lines)


def plain(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The chain as people write it."""
    half = cosine.shape[-1]

    def turned(x: Tensor) -> Tensor:
        first, second, rest = F.rms_norm(x, x.shape[-1:], eps=EPS).split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)

    return turned(q) * gain.to(q.dtype)[:, None], turned(k)


def ours(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The chain as one operator, on its kernels."""
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "qk_norm_rope=triton"}):
        return qk_norm_rope(q, k, cosine, sine, gain, eps=EPS)


def make_inputs(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Random queries and keys, tables of random angles, gains as trained models have them, upstream gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    # the interpreter, which stands in for a GPU, knows no bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    batch, length, heads, kv_heads, dim, rotary = shape
    queries, keys = (batch, length, heads, dim), (batch, length, kv_heads, dim)
    angles = 100 * random(length, 1, rotary // 2)
    made = {name: random(*size).to(dtype) for name, size in {"q": queries, "k": keys}.items()}
    made |= {"cosine": angles.cos().to(dtype), "sine": angles.sin().to(dtype), "gain": 5 + random(heads)}
    made |= {name: random(*size).to(dtype) for name, size in {"dq_hat": queries, "dk_hat": keys}.items()}
    return {name: tensor.requires_grad_(name in LEAVES) for name, tensor in made.items()}


def both_passes(chain: Chain, inputs: Inputs) -> list[Tensor]:
    """Results and gradients."""
    results = chain(*(inputs[name] for name in ("q", "k", "cosine", "sine", "gain")))
    upstream = [inputs["dq_hat"], inputs["dk_hat"]]
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "qk_norm_rope=triton"}):
        gradients = torch.autograd.grad(results, [inputs[name] for name in LEAVES], upstream)
    return [*(result.detach() for result in results), *gradients]


def truth(inputs: Inputs) -> list[Tensor]:
    """The same in float64, with the gain as it is in the dtype of the queries."""
    dtype = inputs["q"].dtype
    exact = {
        name: (t.detach().to(dtype) if name == "gain" else t.detach()).double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    return both_passes(plain, exact)


def make_case(shape: Shape, device: torch.device) -> common.Case:
    """Forward and backward of one layer's queries and keys."""
    return common.Case(
        "qk_norm_rope",
        str(shape),
        "bfloat16" if device.type == "cuda" else "float16",
        functools.partial(make_inputs, shape, device),
        truth,
        flops=0.0,
        bytes=sum(traffic(shape).values()),
        # twice what the plain chain errs in bfloat16
        max_rel_err=1e-2,
    )


def variants(device: torch.device) -> list[common.Variant]:
    """Everything that can run here; what cannot is printed with its reason."""
    made = []
    if "triton" in dispatch.available_backends("qk_norm_rope"):
        made.append(common.Variant("triton", functools.partial(both_passes, ours), graph=True))
    else:
        print(f"triton: {dispatch.describe()['qk_norm_rope']['triton']}")
    on_gpu = device.type == "cuda"
    compiled = torch.compile(plain, dynamic=False) if on_gpu else torch.compile(plain, backend="aot_eager")
    made.append(common.Variant("torch", functools.partial(both_passes, plain), graph=True))
    made.append(common.Variant("compile", functools.partial(both_passes, compiled), graph=True))
    return made


def kept_bytes(chain: Chain, inputs: Inputs) -> int:
    """Memory of what a forward pass keeps for the backward pass, its inputs counted where they are kept."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chain(*(inputs[name] for name in ("q", "k", "cosine", "sine", "gain")))
    return sum(kept.values())


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
    arguments = common.parser("bench_qk_norm_rope", __doc__.splitlines()[0]).parse_args(argv)
    clock = common.Clock(arguments.device, arguments.warmup_ms, arguments.rounds)
    limits = common.ceilings(clock)
    for shape in [TINY] if arguments.tiny else SHAPES:
        print(predict(shape))
        listed = variants(arguments.device)
        rows = common.measure(make_case(shape, arguments.device), listed, clock, limits)
        common.report(rows, common.environment(arguments.device), keep=not arguments.tiny)
        inputs = make_inputs(shape, arguments.device, 0)
        chains = {"operator": ours, "plain chain": plain} if rows[0]["impl"] == "triton" else {"plain chain": plain}
        for name, chain in chains.items():
            print(f"{name}: keeps {kept_bytes(chain, inputs) / 1e6:.1f} MB for the backward pass")
        print(verdict(rows), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
