"""Residual mix and norm before one layer's attention on 98,304 tokens, forward and backward.

torch.compile also keeps the mixed residual stream, and its backward pass reads the gradient again for the column sums. See
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
    batch: int
    length: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.width}"


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """Memory traffic; column sums and row norms are under 1 % and not counted.

    Forward, both read x, x0 and write h, n. Backward, the kernels read dh, dn, x, x0 and write dx, dx0. Inductor's schedule
    reads dh, dn, h, writes dx, dx0 and the gradient of h, and reads that again with x, x0 for the column sums.
    """
    stream = 2.0 * shape.batch * shape.length * shape.width
    return {
        "triton": {"forward": 4 * stream, "backward": 6 * stream},
        "compile": {"forward": 4 * stream, "backward": 9 * stream},
    }


def plain(x: Tensor, x0: Tensor, mix: Tensor, *, eps: float, gain: float) -> tuple[Tensor, Tensor]:
    """The chain in plain PyTorch."""
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
