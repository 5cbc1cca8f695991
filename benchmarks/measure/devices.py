"""Rates of arithmetic and memory of GPUs, from which the benchmarks compute the times of kernels."""

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


class Rate(NamedTuple):
    """The slowest and the fastest plausible rate of a kind of kernel, and the sources of both numbers."""

    slow: float
    fast: float
    source: str


class Reached(NamedTuple):
    """Rates that kernels reach on a GPU.

    `tflops` has four keys: "cublas", "triton" (this package's matrix products), "attention" and "attention backward".
    Both attention rates are for causal attention with head dimension 64 and 2,048 positions, and count the FLOPs of the
    lower triangle only. `gbps` is the memory rate of kernels that read and write large tensors: "triton" for this
    package's kernels, "cublas" for all others, "l2" for data that is still in the L2 cache. `launch_us` is the time of the
    shortest kernel, `gap_us` the time between two kernels, both in microseconds.
    """

    tflops: Mapping[str, Rate]
    gbps: Mapping[str, Rate]
    launch_us: float
    gap_us: Rate


_TFLOPS = {
    "cublas": Rate(
        583.0,
        790.0,
        "slow: 65,536 x 1,024 x 1,024 on Hopper, facebookexperimental/triton #1038; fast: a large product on an H200, "
        "which has the H100's chip",
    ),
    "triton": Rate(
        564.0,
        643.0,
        "slow: a persistent, warp-specialized Triton kernel at 65,536 x 1,024 x 1,024, facebookexperimental/triton #1038; "
        "fast: an estimate, 65 % of the data sheet",
    ),
    "attention": Rate(
        371.0,
        383.0,
        "slow: FlashAttention 3, causal, head dimension 64, 2,048 positions, arXiv:2407.08608; fast: its 460 without a "
        "mask times 521 / 625, the slowdown by a causal mask at head dimension 128",
    ),
    # the least certain rate of a step: no published causal rate was found, so slow and fast are equal
    "attention backward": Rate(
        352.0, 352.0, "FlashAttention 3's 422 without a mask, arXiv:2407.08608, times 521 / 625, as forward"
    ),
}


def _memory(gbps: float, source: str) -> dict[str, Rate]:
    return {
        "triton": Rate(gbps, gbps, source),
        "cublas": Rate(
            gbps * 2700 / 3010, gbps, f"slow: 2,700 of 3,010 on an H100, a guess for Inductor; fast: {source}"
        ),
        "l2": Rate(gbps, 5500.0, "slow: as memory; fast: an estimate"),
    }


_GAP_US = Rate(1.0, 0.0, "slow: a guess; fast: the host is always ahead")
_LAUNCH_US = 3.5  # the shortest kernel of the library quack
REACHED = {
    "H100": Reached(_TFLOPS, _memory(3010.0, "norm and loss kernels of the library quack"), _LAUNCH_US, _GAP_US),
    "H200": Reached(_TFLOPS, _memory(4300.0, "measured on an H200"), _LAUNCH_US, _GAP_US),
}


class Range(NamedTuple):
    """Milliseconds computed at the fast rates, and at the slow rates."""

    fast: float
    slow: float


def total(times: Iterable[Range]) -> Range:
    """Returns the sum of all fast times and the sum of all slow times."""
    listed = list(times)
    return Range(sum(time.fast for time in listed), sum(time.slow for time in listed))


class Kernel(NamedTuple):
    """One kernel launch.

    It has its FLOPs, its bytes of memory traffic, the key of its rate in `Reached.tflops`, and the bytes that it finds in
    the L2 cache.
    """

    name: str
    flops: float
    bytes: float
    rate: str = "cublas"
    cached: float = 0.0

    def floor_ms(self, device: Device) -> float:
        """Returns the least possible time in milliseconds, at the device's peak rates."""
        return max(self.flops / (device.tflops * 1e9), self.bytes / (device.gbps * 1e6))

    def reached_ms(self, reached: Reached) -> Range:
        """Returns the kernel's milliseconds at the rates in `reached`, plus the gap before the next kernel."""
        product, memory = reached.tflops[self.rate], reached.gbps["triton" if self.rate == "triton" else "cublas"]
        cache = reached.gbps["l2"]

        def ms(tflops: float, gbps: float, cached_gbps: float, gap_us: float) -> float:
            slowest = max(self.flops / (tflops * 1e9), self.bytes / (gbps * 1e6) + self.cached / (cached_gbps * 1e6))
            return max(slowest, reached.launch_us / 1e3) + gap_us / 1e3

        gap = reached.gap_us
        return Range(
            ms(product.fast, memory.fast, cache.fast, gap.fast), ms(product.slow, memory.slow, cache.slow, gap.slow)
        )


def newton_schulz_flops(shapes: Iterable[tuple[int, int]], iterations: int) -> float:
    """Returns the least FLOPs of Newton-Schulz on matrices of these shapes.

    Two of the three products of an iteration have symmetric results, so only half of each must be computed.
    """
    return float(sum(iterations * (3 * s * s * n + s**3) for s, n in (sorted(shape) for shape in shapes)))
