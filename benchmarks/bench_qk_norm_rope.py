"""QK-norm, rotary embedding and query gain of one layer's 98,304 tokens, forward and backward.

The chain saves q and k beside what attention saves, and the operator one number per head and row. See `benchmarks.measure.chains`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure.chains import Chain, Inputs
from golf_kernels.qk_norm_rope import qk_norm_rope
from train.common.errors import main_guard

EPS = 1e-6


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


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """The large tensors once, and the rstd; tables stay in the cache."""
    vectors = shape.batch * shape.length * (shape.heads + shape.kv_heads)
    tensor, rstd = 2.0 * vectors * shape.dim, 4.0 * vectors
    return {"triton": {"forward": 2 * tensor + rstd, "backward": 3 * tensor + rstd}}


def plain(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The chain as people write it."""
    half = cosine.shape[-1]

    def turned(x: Tensor) -> Tensor:
        first, second, rest = F.rms_norm(x, x.shape[-1:], eps=EPS).split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)

    return turned(q) * gain.to(q.dtype)[:, None], turned(k)


def ours(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """The chain as one operator."""
    return qk_norm_rope(q, k, cosine, sine, gain, eps=EPS)


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random queries and keys, tables of random angles, gains as trained models have them, upstream gradients."""
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    batch, length, heads, kv_heads, dim, rotary = shape
    queries, keys = (batch, length, heads, dim), (batch, length, kv_heads, dim)
    angles = 100 * random(length, 1, rotary // 2)
    made = {name: random(*size).to(dtype) for name, size in {"q": queries, "k": keys}.items()}
    made |= {"cosine": angles.cos().to(dtype), "sine": angles.sin().to(dtype), "gain": 5 + random(heads)}
    return made | {name: random(*size).to(dtype) for name, size in {"dq_hat": queries, "dk_hat": keys}.items()}


CHAIN = Chain(
    "qk_norm_rope",
    plain=plain,
    operator=ours,
    arguments=("q", "k", "cosine", "sine", "gain"),
    leaves=("q", "k", "gain"),
    upstream=("dq_hat", "dk_hat"),
    make=make_inputs,
    traffic=traffic,
    shapes=(Shape(48, 2048, 8, 4, 64, 16), Shape(96, 1024, 8, 4, 64, 64)),
    tiny=Shape(2, 9, 4, 2, 16, 8),
)


def main(argv: list[str] | None = None) -> int:
    return CHAIN.main("bench_qk_norm_rope", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    main_guard(main)
