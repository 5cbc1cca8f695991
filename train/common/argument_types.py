"""Types of argparse arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(lowest: int, kind: type[int] | type[float] = int) -> Callable[[str], float]:
    """Return an argparse type for finite numbers of at least `lowest`; `kind` int: only whole ones."""
    number = "a whole number" if kind is int else "a number"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected {number} from {lowest}, got {text!r}")
        return value

    return parse
