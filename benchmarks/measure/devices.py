"""What GPUs can do, for times that are computed and not measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

# dense bfloat16 TFLOP/s by what a GPU's name has in it, the first that fits: half of what NVIDIA's data sheets give with
# sparsity (1,978.9 for SXM, 132 multiprocessors of 4,096 FLOP at 1.83 GHz; 1,513 for PCIe; 1,671 for NVL)
_SHEETS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200 NVL": 835.0, "H200": 989.4}


def datasheet_tflops(gpu: str) -> float | None:
    """Dense bfloat16 TFLOP/s that the data sheet of a GPU of this name gives; None for one not known, or a slice of one."""
    return next((tflops for name, tflops in _SHEETS.items() if name in gpu and "MIG" not in gpu), None)


class Device(NamedTuple):
    """Dense bfloat16 TFLOP/s and GB/s that a prediction is computed from."""

    name: str
    tflops: float
    gbps: float


# the H100's from its data sheet; the H200's are what one reached
DEVICES = (Device("H100", _SHEETS["H100"], 3350.0), Device("H200", 790.0, 4300.0))


class Reached(NamedTuple):
    """What kernels were seen to reach, by others or elsewhere, where `Device` says what none can pass.

    Attributes:
        tflops: TFLOP/s by who computes: "cublas", "triton" (products with epilogues of our own), "attention" and
            "attention backward" (causal, heads of 64, 2,048 positions; arithmetic counted for the lower triangle).
        gbps: GB/s of passes over large tensors.
        launch_us: microseconds that the smallest kernel takes.
    """

    tflops: Mapping[str, float]
    gbps: float
    launch_us: float


_TFLOPS = {
    # a large product on an H200, which is the same chip; 512 columns to sum over give less
    "cublas": 790.0,
    # the middle of the 60 to 70 % of the sheet that is expected of such kernels; nobody has run these
    "triton": 643.0,
    # FlashAttention 3 without a mask, 460 and 422 (arXiv:2407.08608), times the 521 / 625 that a mask leaves heads of 128
    "attention": 383.0,
    "attention backward": 352.0,
}
REACHED = {
    # 3,010: quack's norms and losses. 3.5: quack
    "H100": Reached(_TFLOPS, gbps=3010.0, launch_us=3.5),
    "H200": Reached(_TFLOPS, gbps=4300.0, launch_us=3.5),
}


class Kernel(NamedTuple):
    """One launch: its arithmetic, its traffic with device memory, and whose rate its products have."""

    name: str
    flops: float
    bytes: float
    rate: str = "cublas"

    def floor_ms(self, device: Device) -> float:
        """What nothing on the device can undercut."""
        return max(self.flops / (device.tflops * 1e9), self.bytes / (device.gbps * 1e6))

    def reached_ms(self, reached: Reached) -> float:
        """What a kernel takes that is as good as those that were seen."""
        slowest = max(self.flops / (reached.tflops[self.rate] * 1e9), self.bytes / (reached.gbps * 1e6))
        return max(slowest, reached.launch_us / 1e3)


def newton_schulz_flops(shapes: Iterable[tuple[int, int]], iterations: int) -> float:
    """Arithmetic of Newton-Schulz that no implementation can avoid: half of each of the two symmetric products."""
    return float(sum(iterations * (3 * s * s * n + s**3) for s, n in (sorted(shape) for shape in shapes)))
