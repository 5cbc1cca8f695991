"""Types of the benchmarks' command-line arguments."""

from __future__ import annotations

import argparse
import math

import torch

from train.common.wording import counted


def parse_device(text: str) -> torch.device:
    """Parses cpu, cuda or cuda:N. A CUDA device must exist on this machine."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{text}: PyTorch finds {counted(torch.cuda.device_count(), 'GPU')} here: --device cpu --tiny runs anywhere"
        )
    return device


def parse_milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected milliseconds, at least 0, got {text!r}")
    return value


def parse_positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, got {text!r}")
    return int(text)
