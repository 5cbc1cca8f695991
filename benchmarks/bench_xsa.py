"""XSA (exclusive self-attention) after one layer's attention on 98,304 tokens, forward and backward.

The operator and plain PyTorch read and write the same large tensors. PyTorch also saves two small tensors for the
backward pass. The variants are those of `benchmarks.measure.chains`.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.measure.chains import Chain
from golf_kernels.xsa import written_out
from train.common.errors import main_guard


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}x{self.heads}/{self.kv_heads}x{self.dim}"


def traffic(shape: Shape) -> dict[str, dict[str, float]]:
    """Returns the bytes that each pass reads and writes. o is attention's output, v the values, y the result.

    The forward pass reads o, v and writes y. The backward pass reads dy, o, v and writes do, dv.
    """
    numbers = 2.0 * shape.batch * shape.length * shape.dim
    output, value = numbers * shape.heads, numbers * shape.kv_heads
    return {"triton": {"forward": 2 * output + value, "backward": 3 * output + 2 * value}}


CHAIN = Chain(
    "xsa",
    plain=written_out,
    traffic=traffic,
    shapes=(Shape(48, 2048, 8, 4, 64), Shape(48, 2048, 8, 8, 64)),
    tiny=Shape(2, 9, 4, 2, 16),
)


def main(argv: list[str] | None = None) -> int:
    return CHAIN.main("bench_xsa", __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    main_guard(main)
