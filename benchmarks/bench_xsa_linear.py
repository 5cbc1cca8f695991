"""XSA and the output projection behind one layer's attention of 98,304 tokens, forward and backward.

`xsa alone` is XSA's own operator on its kernels with cuBLAS behind it. See `benchmarks.measure.chains`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure.chains import Chain, Inputs
from golf_kernels.xsa import xsa
from golf_kernels.xsa_linear import xsa_linear
from train.common.errors import main_guard
from train.model.attention import remove_value_direction


class Shape(NamedTuple):
    """Sequences of `length` tokens, heads of queries and values, and their dimensions; the model is as wide as all heads."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads}/{self.kv_heads}x{self.dim}"


def plain(output: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """The chain as people write it."""
    return F.linear(remove_value_direction(output, value).flatten(2), weight)


def apart(output: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """One operator for XSA, and PyTorch's product."""
    return F.linear(xsa(output, value).flatten(2), weight)


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """Every tensor once for each kernel; z is what XSA leaves, as large as o, y and dy.

    Together: o and v to y; dy, o and v to do, dv and z, then dy and z to dw. Apart: o and v to z, z to y; dy to dz; dz, o and v
    to do and dv; dy and z to dw.
    """
    numbers = 2.0 * shape.batch * shape.length * shape.dim
    output, value = numbers * shape.heads, numbers * shape.kv_heads
    weight = 2.0 * (shape.heads * shape.dim) ** 2
    return {
        "triton": {"forward": 2 * output + value + weight, "backward": 6 * output + 2 * value + 2 * weight},
        "xsa alone": {"forward": 4 * output + value + weight, "backward": 7 * output + 2 * value + 2 * weight},
    }


def flops(shape: Shape) -> dict[str, float]:
    """One product forward, two backward."""
    product = 2.0 * shape.batch * shape.length * (shape.heads * shape.dim) ** 2
    return {"forward": product, "backward": 2 * product}


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random output and values, a weight of a model's size, and an upstream gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    width = shape.heads * shape.dim
    sizes: dict[str, tuple[int, ...]] = {
        "output": (shape.batch, shape.length, shape.heads, shape.dim),
        "value": (shape.batch, shape.length, shape.kv_heads, shape.dim),
        "weight": (width, width),
        "dy": (shape.batch, shape.length, width),
    }
    made = {name: torch.randn(size, generator=generator, device=device) for name, size in sizes.items()}
    made["weight"] *= width**-0.5
    return {name: tensor.to(dtype) for name, tensor in made.items()}


CHAIN = Chain(
    "xsa_linear",
    plain=plain,
    operator=xsa_linear,
    arguments=("output", "value", "weight"),
    leaves=("output", "value", "weight"),
    upstream=("dy",),
    make=make_inputs,
    traffic=traffic,
    shapes=(Shape(48, 2048, 8, 4, 64), Shape(48, 2048, 8, 8, 64)),
    tiny=Shape(2, 9, 4, 2, 16),
    flops=flops,
    beside={"xsa": apart},
)


def main(argv: list[str] | None = None) -> int:
    return CHAIN.main("bench_xsa_linear", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    main_guard(main)
