"""What GPUs can do, for times that are computed and not measured."""

from __future__ import annotations

from typing import NamedTuple

# dense bfloat16 TFLOP/s by what a GPU's name has in it, the first that fits: half of what NVIDIA's data sheets give with
# sparsity (1,978.9 for SXM, 132 multiprocessors of 4,096 FLOP at 1.83 GHz; 1,513 for PCIe; 1,671 for NVL)
_SHEETS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200 NVL": 835.0, "H200": 989.4}


def datasheet_tflops(gpu: str) -> float | None:
    """Dense bfloat16 TFLOP/s that the data sheet of a GPU of this name gives; None for one that is not known."""
    return next((tflops for name, tflops in _SHEETS.items() if name in gpu), None)


class Device(NamedTuple):
    """Dense bfloat16 TFLOP/s and GB/s that a prediction is computed from."""

    name: str
    tflops: float
    gbps: float


# the H100's from its data sheet; the H200's are what one reached
DEVICES = (Device("H100", _SHEETS["H100"], 3350.0), Device("H200", 790.0, 4300.0))
