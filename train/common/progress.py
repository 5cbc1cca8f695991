"""Signs of life: the first line of a command, and the progress of long work as a bar on a terminal, else as lines."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable

from tqdm import tqdm

from train.common.wording import duration

FIRST_LINE_SECONDS = 5.0
LINE_INTERVAL_SECONDS = 20.0
# the rate is that of the last seconds
RATE_SECONDS = 30.0


def announce(text: str) -> None:
    """Say on stderr what a command is about to do. Call it before torch is imported, which may take many seconds.

    Under torchrun only rank 0 says it.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Progress of one task of `total` units, as a context manager.

    Args:
        total, description, unit: as shown: `encoding train: 3/40 documents`.
        enabled: False (on other ranks) shows nothing.
        done: units that were done before.
        now: the clock, in seconds.
        limit: the task ends at this time of the clock; 0: no limit.
    """

    def __init__(
        self,
        total: int,
        description: str,
        unit: str = "",
        *,
        enabled: bool = True,
        done: int = 0,
        now: Callable[[], float] = time.monotonic,
        limit: float = 0.0,
    ) -> None:
        self.total, self.description, self.unit, self.enabled = total, description, unit, enabled
        self.done, self.now, self.limit = done, now, limit
        self.marks = deque([(now(), done)])
        self.next_line = now() + FIRST_LINE_SECONDS
        self.bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            parts = "{percentage:3.0f}%|{bar:20}| {desc}"
            self.bar = tqdm(total=total, initial=done, bar_format=parts, dynamic_ncols=True, leave=False)

    @property
    def rate(self) -> float:
        """Units per second, in the last seconds."""
        (since, before), now = self.marks[0], self.now()
        return (self.done - before) / (now - since) if now > since else 0.0

    @property
    def seconds_left(self) -> float:
        left = (self.total - self.done) / self.rate if self.rate else float("inf")
        return max(min(left, self.limit - self.now()), 0.0) if self.limit else left

    def advance(self, amount: int = 1, note: str | Callable[[], str] = "") -> None:
        """Add `amount` finished units. `note`, or what it returns, is shown in the bar or line."""
        self.done += amount
        if not self.enabled:
            return
        now = self.now()
        while len(self.marks) > 1 and self.marks[1][0] <= now - RATE_SECONDS:
            self.marks.popleft()
        if self.bar is not None:
            self.bar.set_description_str(self.text(note), refresh=False)
            self.bar.update(amount)
        elif now >= self.next_line:
            self.next_line = now + LINE_INTERVAL_SECONDS
            print(self.text(note), flush=True)
        self.marks.append((now, self.done))

    def text(self, note: str | Callable[[], str] = "") -> str:
        """The line: what is done, rate, note and time left."""
        note = note if isinstance(note, str) else note()
        rate = f"{self.rate:,.0f}" if self.rate >= 100 else f"{self.rate:.3g}"
        return (
            f"{self.description}: {self.done:,}/{self.total:,} {self.unit} "
            f"({100 * self.done / max(self.total, 1):.0f} %), {rate} {self.unit}/s"
            f"{f', {note}' if note else ''}, {duration(self.seconds_left)} left"
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
