"""What a run computes on, as its record names it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.common.wording import counted

if TYPE_CHECKING:
    from train.common.distributed import Ranks


def auto_device() -> str:
    """What `device=auto` stands for here: "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def hardware(ranks: Ranks) -> str:
    """What the run computed on, as the record names it."""
    if ranks.device.type == "cuda":
        return f"{ranks.world_size} x {torch.cuda.get_device_name(ranks.device)}"
    return f"{counted(os.cpu_count() or 1, 'CPU core')} ({_cpu_name()}), {counted(ranks.world_size, 'process', 'processes')}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
