"""Shows what a command does: a first line, and the progress of long work as a bar on a terminal, else as lines."""

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
# the rate is measured over this many last seconds
RATE_SECONDS = 30.0


def announce(text: str) -> None:
    """Print on stderr what a command is about to do. Call this before importing torch, which may take many seconds.

    Under torchrun only rank 0 prints.
    """
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Shows the progress of one task of `total` units. A context manager.

    Args:
        total, description, unit: shown as `encoding train: 3/40 documents`: description, finished units, total, unit.
        enabled: False shows nothing; for ranks other than 0.
        done: number of units that were finished before.
        now: function that returns the time in seconds.
        limit: the task ends when `now()` reaches this time; 0: no limit.
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
        """Units per second, over the last `RATE_SECONDS`."""
        (since, before), now = self.marks[0], self.now()
        return (self.done - before) / (now - since) if now > since else 0.0

    @property
    def seconds_left(self) -> float:
        left = (self.total - self.done) / self.rate if self.rate else float("inf")
        return max(min(left, self.limit - self.now()), 0.0) if self.limit else left

    def advance(self, amount: int = 1, note: str | Callable[[], str] = "") -> None:
        """Add `amount` finished units. The bar or line shows `note`, or the text that `note()` returns."""
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
        """Return the text of the bar or line: finished units, rate, note and time left."""
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
