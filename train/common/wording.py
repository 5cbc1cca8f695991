"""Wording that several modules share: counts, notes, and the separator line in a log's header."""

from __future__ import annotations

SEPARATOR = "=" * 100


def counted(number: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun: `1 shard`, `2 shards`. `plural` is needed if it is not the noun plus s."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def stopped_early(steps: int, planned: int) -> str:
    """Say that the time limit ended training before its planned number of steps."""
    return f"stopped by the time limit after {steps:,} of {planned:,} steps: the score is worse than after all planned steps"
