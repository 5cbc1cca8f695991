"""Chooses the default device, and describes the hardware."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

from train.common.wording import counted

# constants of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

# substring of a GPU's name → TFLOP/s of dense bfloat16 products; the first match counts. Data sheets state twice these
# rates, for sparse matrices: 1,978.9 for SXM (132 multiprocessors, 4,096 FLOP per cycle, 1.83 GHz), 1,513 for PCIe,
# 1,671 for NVL
DATASHEET_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200 NVL": 835.0, "H200": 989.4}


def auto_device() -> str:
    """Return the device that `device=auto` means on this machine: "cuda" if it has a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_freed_memory() -> None:
    """Make malloc keep freed memory, so that a training step on a CPU need not get it from the system again.

    Otherwise page faults take a twelfth of a step of the recipe quickstart. Only glibc has this option.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def hardware(device: torch.device, world_size: int) -> str:
    """Describe the GPUs or CPU cores of the run, in the words of its record."""
    if device.type == "cuda":
        return f"{world_size} x {torch.cuda.get_device_name(device)}"
    return f"{counted(os.cpu_count() or 1, 'CPU core')} ({_cpu_name()}), {counted(world_size, 'process', 'processes')}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def datasheet_tflops(gpu: str) -> float | None:
    """Return a GPU's TFLOP/s of dense bfloat16 products from its data sheet. None for an unknown GPU or a MIG slice."""
    return next((tflops for name, tflops in DATASHEET_TFLOPS.items() if name in gpu and "MIG" not in gpu), None)
