"""Shows the progress of long work: a bar on a terminal, elsewhere a line every 10 seconds."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

LINE_INTERVAL_SECONDS = 10.0


class Progress:
    """Context manager that shows the progress of a task of `total` units; nothing if `enabled` is False."""

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
        """Add `amount` finished units. The bar or line ends with `note`."""
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
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
