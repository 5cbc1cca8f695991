"""How long a process takes until its first training step, part by part."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_IMPORTED = time.monotonic()


def process_seconds() -> float:
    """Seconds since this process was started; without /proc since this module was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic() - _IMPORTED
    # the 22nd field, of which two stand before the bracket
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


class StartUp:
    """Seconds of each part of the way to the first step; all that came before this object is the part `start`.

    Args:
        device: its queued work is waited for where a part ends.

    Attributes:
        parts: seconds by name, in order.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts = {"start": process_seconds()}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def end(self, part: str) -> None:
        """Call where a part ends; it began where the last one ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.parts[part] = process_seconds() - self.seconds

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"first step after {self.seconds:.1f} s ({parts})"
