"""Progress a person can follow: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Progress of one piece of work, used as a context manager.

    Args:
        total: units of the whole work.
        description: what is being done, as shown in front.
        unit: name of the unit, e.g. `tokens`.
        enabled: False keeps silent (ranks other than the first).
    """

    def __init__(self, total: int, description: str, unit: str = "", *, enabled: bool = True) -> None:
        self.total, self.description, self.unit, self.enabled = total, description, unit, enabled
        self.done = 0
        self.started = self.last_line = time.monotonic()
        self.bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(
                total=total, desc=description, unit=f" {unit}", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` is shown behind the figures."""
        self.done += amount
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif self.enabled and time.monotonic() - self.last_line >= LINE_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            elapsed = self.last_line - self.started
            rate = self.done / elapsed
            left = (self.total - self.done) / rate if rate else float("inf")
            print(
                f"{self.description}: {self.done:,}/{self.total:,} {self.unit} ({100 * self.done / max(self.total, 1):.0f} %), "
                f"{rate:,.0f} {self.unit}/s, {left:.0f} s left{', ' + note if note else ''}",
                flush=True,
            )

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
