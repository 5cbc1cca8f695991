"""Rates of GPUs, to compute times from memory traffic and arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

# dense bfloat16 TFLOP/s by a substring of the GPU's name; the first match counts. Half of the data sheet's figure with
# sparsity: 1,978.9 for SXM (132 multiprocessors, 4,096 FLOP per cycle, 1.83 GHz), 1,513 for PCIe, 1,671 for NVL
_SHEETS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200 NVL": 835.0, "H200": 989.4}


def datasheet_tflops(gpu: str) -> float | None:
    """Dense bfloat16 TFLOP/s from the data sheet; None for an unknown GPU or a MIG slice."""
    return next((tflops for name, tflops in _SHEETS.items() if name in gpu and "MIG" not in gpu), None)


class Device(NamedTuple):
    """Peak dense bfloat16 TFLOP/s and GB/s of a GPU."""

    name: str
    tflops: float
    gbps: float


# H100: data sheet; H200: measured
DEVICES = (Device("H100", _SHEETS["H100"], 3350.0), Device("H200", 790.0, 4300.0))


class Reached(NamedTuple):
    """Rates that kernels reached in published measurements.

    `tflops` has a rate for "cublas", "triton" (products with our epilogues), "attention" and "attention backward" (causal,
    head dimension 64, 2,048 positions, counting the lower triangle only). `gbps` is for passes over large tensors, `launch_us`
    for the smallest kernel.
    """

    tflops: Mapping[str, float]
    gbps: float
    launch_us: float


_TFLOPS = {
    # a large product on an H200, which is the same chip; products with an inner dimension of 512 are slower
    "cublas": 790.0,
    # expected, not measured: the middle of 60 to 70 % of the data sheet
    "triton": 643.0,
    # FlashAttention 3 without a mask (460 and 422, arXiv:2407.08608), times 521 / 625, the mask's cost with heads of 128
    "attention": 383.0,
    "attention backward": 352.0,
}
REACHED = {
    # bandwidth of quack's norms and losses, and quack's shortest launch
    "H100": Reached(_TFLOPS, gbps=3010.0, launch_us=3.5),
    "H200": Reached(_TFLOPS, gbps=4300.0, launch_us=3.5),
}


class Kernel(NamedTuple):
    """One launch: its arithmetic, its memory traffic, and its key in `Reached.tflops`."""

    name: str
    flops: float
    bytes: float
    rate: str = "cublas"

    def floor_ms(self, device: Device) -> float:
        """Least possible time at the device's peak rates."""
        return max(self.flops / (device.tflops * 1e9), self.bytes / (device.gbps * 1e6))

    def reached_ms(self, reached: Reached) -> float:
        """Time at the rates that such kernels have reached."""
        slowest = max(self.flops / (reached.tflops[self.rate] * 1e9), self.bytes / (reached.gbps * 1e6))
        return max(slowest, reached.launch_us / 1e3)


def newton_schulz_flops(shapes: Iterable[tuple[int, int]], iterations: int) -> float:
    """Least arithmetic of Newton-Schulz: only half of each of the two symmetric products is needed."""
    return float(sum(iterations * (3 * s * s * n + s**3) for s, n in (sorted(shape) for shape in shapes)))
