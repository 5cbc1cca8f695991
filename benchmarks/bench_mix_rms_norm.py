"""Residual mix and norm before one layer's attention on 98,304 tokens, forward and backward.

Unlike the operator, torch.compile's code saves the mixed residual stream for the backward pass. That pass reads the
stream's gradient twice, the second time for the column sums. The variants are those of `benchmarks.measure.chains`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure.chains import Chain
from train.common.errors import main_guard


class Shape(NamedTuple):
    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """Returns the bytes that each pass reads and writes, without the column sums and row norms, which are under 1 %.

    In the forward pass both variants read x, x0 and write h, n. In the backward pass the Triton kernels read dh, dn, x,
    x0 and write dx, dx0.
    Inductor's first kernel reads dh, dn, h and writes dx, dx0 and the gradient of h. Its second kernel reads that
    gradient, x and x0 to compute the column sums.
    """
    stream = 2.0 * shape.batch * shape.length * shape.width
    return {
        "triton": {"forward": 4 * stream, "backward": 6 * stream},
        "compile": {"forward": 4 * stream, "backward": 9 * stream},
    }


def plain(x: Tensor, x0: Tensor, mix: Tensor, *, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """Residual mix and norm in plain PyTorch."""
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
