"""Arithmetic and memory rates of GPUs, from which the benchmarks compute a kernel's time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from train.common.hardware import DATASHEET_TFLOPS


class Device(NamedTuple):
    """The peak rates of a GPU: dense bfloat16 TFLOP/s, and GB/s of its memory."""

    name: str
    tflops: float
    gbps: float


# the H100's rates are from its data sheet, the H200's were measured
DEVICES = (Device("H100", DATASHEET_TFLOPS["H100"], 3350.0), Device("H200", 790.0, 4300.0))


class Reached(NamedTuple):
    """Rates that kernels reach on a GPU. The comments on `_TFLOPS` and `REACHED` name the sources.

    `tflops` has four keys: "cublas", "triton" (this package's matrix products), "attention" and "attention backward".
    Both attention rates are for causal attention with head dimension 64 and 2,048 positions, and count the FLOPs of the
    lower triangle only. `gbps` is the memory rate of a kernel that reads and writes large tensors. `launch_us` is the
    time of the shortest kernel in microseconds.
    """

    tflops: Mapping[str, float]
    gbps: float
    launch_us: float


_TFLOPS = {
    # a large matrix product on an H200, which has the H100's chip; products with an inner dimension of 512 are slower
    "cublas": 790.0,
    # an estimate, not measured: 65 % of the data sheet's rate
    "triton": 643.0,
    # FlashAttention 3 reaches 460 and 422 without a mask (arXiv:2407.08608). Both are multiplied by 521 / 625, the
    # slowdown by a causal mask at head dimension 128
    "attention": 383.0,
    "attention backward": 352.0,
}
REACHED = {
    # `gbps`: norm and loss kernels of the library quack; `launch_us`: that library's shortest kernel
    "H100": Reached(_TFLOPS, gbps=3010.0, launch_us=3.5),
    "H200": Reached(_TFLOPS, gbps=4300.0, launch_us=3.5),
}


class Kernel(NamedTuple):
    """One kernel launch: its FLOPs, its bytes of memory traffic, and the key of its rate in `Reached.tflops`."""

    name: str
    flops: float
    bytes: float
    rate: str = "cublas"

    def floor_ms(self, device: Device) -> float:
        """The least possible time in milliseconds, at the device's peak rates."""
        return max(self.flops / (device.tflops * 1e9), self.bytes / (device.gbps * 1e6))

    def reached_ms(self, reached: Reached) -> float:
        """Milliseconds at the rates that kernels of this kind reach."""
        slowest = max(self.flops / (reached.tflops[self.rate] * 1e9), self.bytes / (reached.gbps * 1e6))
        return max(slowest, reached.launch_us / 1e3)


def newton_schulz_flops(shapes: Iterable[tuple[int, int]], iterations: int) -> float:
    """Least FLOPs of Newton-Schulz on matrices of these shapes.

    Two of the three products of an iteration have symmetric results, so half of each result suffices.
    """
    return float(sum(iterations * (3 * s * s * n + s**3) for s, n in (sorted(shape) for shape in shapes)))
