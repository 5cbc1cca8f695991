"""Wording that is the same everywhere: numbers within sentences, and the line between the parts of a log's head."""

from __future__ import annotations

SEPARATOR = "=" * 100


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number of things: `1 shard`, `2 shards`, `1,024 matrices`.

    Args:
        number: how many.
        noun: one of them.
        plural: several, where that is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"
