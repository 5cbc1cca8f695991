"""What GPUs can do, for times that are computed and not measured."""

from __future__ import annotations

from typing import NamedTuple


class Device(NamedTuple):
    """Dense bfloat16 TFLOP/s and GB/s that a prediction is computed from."""

    name: str
    tflops: float
    gbps: float


# the H100's from its data sheet; the H200's are what one reached
DEVICES = (Device("H100", 989.0, 3350.0), Device("H200", 790.0, 4300.0))
