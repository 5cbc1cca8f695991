"""Residual mix and norm before one layer's attention, for 98,304 tokens, forward and backward.

A compiler's backward pass goes over its gradient once more for the columns' sums, and keeps the mixed stream. See
`benchmarks.measure.chains`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure.chains import Chain
from train.common.errors import main_guard


class Shape(NamedTuple):
    """Sequences of `length` tokens of `width` numbers."""

    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """Bytes of both implementations; sums over columns and rows' norms are under 1 % and not counted.

    The kernels read x and x0 and write h and n; then they read dh, dn, x and x0 and write dx and dx0. A compiler's forward
    pass is the same one; its backward pass reads dh, dn and h, writes dx, dx0 and the gradient of h, and reads this one
    again with x and x0 for the columns' sums (so says Inductor's own schedule of the chain, `mix_order_reduction` or not).
    """
    stream = 2.0 * shape.batch * shape.length * shape.width
    return {
        "triton": {"forward": 4 * stream, "backward": 6 * stream},
        "compile": {"forward": 4 * stream, "backward": 9 * stream},
    }


def plain(x: Tensor, x0: Tensor, mix: Tensor, *, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """The chain as people write it."""
    first, second = mix.to(x.dtype).unbind()
    h = torch.addcmul(first * x, second, x0)
    return h, F.rms_norm(h, h.shape[-1:], eps=eps) * gain


CHAIN = Chain(
    "mix_rms_norm",
    plain=plain,
    traffic=traffic,
    shapes=(Shape(48, 2048, 512),),
    tiny=Shape(2, 67, 48),
)


def main(argv: list[str] | None = None) -> int:
    return CHAIN.main("bench_mix_rms_norm", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    main_guard(main)
