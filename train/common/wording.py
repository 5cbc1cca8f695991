"""Wording that several modules share: counts, notes, and the separator line in a log's header."""

from __future__ import annotations

import math

SEPARATOR = "=" * 100


def counted(number: int, noun: str, plural: str = "") -> str:
    """Format a count with its noun: `1 shard`, `2 shards`. `plural` is the noun's plural; empty: the noun plus s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def duration(seconds: float) -> str:
    """Format a duration: `45 s`, `12 min`, `3 h 20 min`; `unknown time` if it is infinite."""
    if not math.isfinite(seconds):
        return "unknown time"
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def stopped_early(steps: int, planned: int) -> str:
    """Return a sentence: the time limit ended training before the planned number of steps."""
    return f"stopped by the time limit after {steps:,} of {planned:,} steps: the score is worse than after all planned steps"
