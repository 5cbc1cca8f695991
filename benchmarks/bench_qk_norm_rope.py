"""QK-norm, rotary embedding and query gain of one layer on 98,304 tokens, forward and backward.

For the backward pass plain PyTorch saves q and k, and the operator saves one number per head and row. Both also save
the tensors that attention saves. The variants are those of `benchmarks.measure.chains`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure.chains import Chain
from train.common.errors import main_guard


class Shape(NamedTuple):
    """The first `rotary` of a head's `dim` dimensions are rotated."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    rotary: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads}+{self.kv_heads}x{self.dim}, rotary {self.rotary}"


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """Returns the bytes that each pass reads and writes: each large tensor once, and the norms' factors (rstd).

    The cosine and sine tables stay in the cache.
    """
    vectors = shape.batch * shape.length * (shape.heads + shape.kv_heads)
    tensor, rstd = 2.0 * vectors * shape.dim, 4.0 * vectors
    return {"triton": {"forward": 2 * tensor + rstd, "backward": 3 * tensor + rstd}}


def plain(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, gain: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """QK-norm, RoPE and query gain in plain PyTorch."""
    half = cosine.shape[-1]

    def turned(x: Tensor) -> Tensor:
        first, second, rest = F.rms_norm(x, x.shape[-1:], eps=eps).split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cosine + second * sine, second * cosine - first * sine, rest], dim=-1)

    return turned(q) * gain.to(q.dtype)[:, None], turned(k)


CHAIN = Chain(
    "qk_norm_rope",
    plain=plain,
    traffic=traffic,
    shapes=(Shape(48, 2048, 8, 4, 64, 16), Shape(96, 1024, 8, 4, 64, 64)),
    tiny=Shape(2, 9, 4, 2, 16, 8),
)


def main(argv: list[str] | None = None) -> int:
    return CHAIN.main("bench_qk_norm_rope", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    main_guard(main)
