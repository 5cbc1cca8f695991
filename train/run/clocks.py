"""The clocks of a run: of training, which it ends; of the stages; and of the time before the first step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train.common.errors import UserError
from train.common.files import read_json, write_json

_IMPORTED = time.perf_counter()


class WallClock:
    """Training time that every rank agrees on, read without waiting for the step in flight.

    The published scripts reduce a stop flag and read it back after every step, so the host never runs ahead of the
    device. Here each rank's time is itself reduced (MAX), in the background, and used one step later:

    * on CUDA a step's end is an event; `tick` waits for the event of the step before, which bounds how far the host
      runs ahead and never drains the queue;
    * over ranks that time goes into an asynchronous all-reduce of one number in host memory, whose result the next
      `tick` waits for, so that all ranks use the same number in the same step.

    What is known of a step one or two back is carried to the present one by the mean step time, so that a run ends
    with the first step that reaches the cap, as the published ones do. One process on a CPU has no delay at all. The
    learning rate takes `elapsed_seconds`, which is equal on all ranks, where the published scripts let each rank use
    its own clock and so its own rate.

    The clock is paused until `resume`; `pause` stops it for whatever does not count as training (validation).

    Args:
        cap_seconds: training ends here; 0 for no cap.
        group: process group that can reduce tensors in host memory; None for one process.
        device: where the steps run.
        elapsed_seconds: time already used, from a checkpoint.
        steps: steps already done, from a checkpoint.
        now: host clock in seconds.
    """

    def __init__(
        self,
        cap_seconds: float,
        *,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        elapsed_seconds: float = 0.0,
        steps: int = 0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.cap_seconds = cap_seconds
        self.steps = steps
        self._group = group
        self._device = torch.device(device)
        self._now = now
        self._base = elapsed_seconds
        self._known = (steps, elapsed_seconds)
        self._start: Any = None
        self._events: deque[tuple[int, Any]] = deque()
        self._reductions: deque[tuple[int, torch.Tensor, dist.Work | None]] = deque()

    @property
    def elapsed_seconds(self) -> float:
        """Training time at the last `tick` (carried forward from what is known) or `pause` (exact), in seconds."""
        steps, seconds = self._known
        return seconds * self.steps / steps if steps else seconds

    def read(self) -> float:
        """This rank's training time until now, in seconds; waits for the device."""
        if self._start is None:
            return self._base
        return self._base + self._seconds_until(self._mark())

    def resume(self) -> None:
        """Wait for the other ranks and let the time run; the device has nothing queued that should not be counted."""
        if self._start is not None:
            raise RuntimeError("the wall clock runs already: pause it before resume")
        # a rank that wrote a file meanwhile must not make the others count their wait for it
        if self._group is not None:
            dist.all_reduce(torch.zeros(1), group=self._group)
        self._start = self._mark()

    def tick(self) -> bool:
        """Count one finished (on CUDA: queued) step.

        Returns:
            Whether training ends here; the same on every rank.
        """
        if self._start is None:
            raise RuntimeError("the wall clock is paused: resume it before tick")
        self.steps += 1
        self._events.append((self.steps, self._mark()))
        if len(self._events) > (self._device.type == "cuda"):
            steps, event = self._events.popleft()
            self._agree(steps, self._base + self._seconds_until(event))
        while len(self._reductions) > (self._group is not None):
            self._learn()
        return self.cap_seconds > 0 and self.elapsed_seconds >= self.cap_seconds

    def pause(self) -> float:
        """Wait for the device and the other ranks, and stop the time.

        Returns:
            The training time so far in seconds, the largest of all ranks.
        """
        if self._start is None:
            raise RuntimeError("the wall clock is paused: resume it before pause")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._events.clear()
        self._agree(self.steps, self._base + self._seconds_until(self._mark()))
        while self._reductions:
            self._learn()
        self._start = None
        self._base = self._known[1]
        return self._base

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds_until(self, mark: Any) -> float:
        seconds: float
        if self._device.type != "cuda":
            seconds = mark - self._start
        else:
            mark.synchronize()
            seconds = self._start.elapsed_time(mark) / 1e3
        return seconds

    def _agree(self, steps: int, seconds: float) -> None:
        number = torch.tensor([seconds], dtype=torch.float64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._reductions.append((steps, number, work))

    def _learn(self) -> None:
        steps, number, work = self._reductions.popleft()
        if work is not None:
            work.wait()
        self._known = (steps, number.item())


class StageClock:
    """Seconds per stage, of the pass whose result counts; kept in the run folder, as a stage may have been finished before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.path: Path | None = None

    def keep_in(self, path: Path) -> None:
        """From now on keep the seconds in a file; what it holds already of other stages stays."""
        remedy = "delete it, which loses only the seconds of the stages, and resume again"
        earlier = read_json(path, remedy) if path.exists() else {}
        if not all(type(seconds) in (int, float) for seconds in earlier.values()):
            raise UserError(f"{path}: expected seconds per stage, found {earlier}: {remedy}")
        self.seconds = {**earlier, **self.seconds}
        self.path = path
        self._save()

    @contextmanager
    def __call__(self, name: str, *, found: bool = False) -> Iterator[None]:
        """Time a stage; if its result is `found`, it keeps the seconds of the pass that made it."""
        started = time.perf_counter()
        yield
        if not found:
            self.seconds[name] = time.perf_counter() - started
            self._save()

    def _save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.seconds)


class StartUp:
    """Seconds of each part of the work before the first step; `start` is all that came before this object.

    Counted from the import of this module, so without the start of Python and of torch.

    Args:
        device: its queued work is waited for where a part ends.
        now: clock in seconds.

    Attributes:
        parts: seconds by name, in order.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self.parts = {"start": now() - _IMPORTED}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def end(self, part: str) -> None:
        """Call where a part ends; it began where the last one ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.parts[part] = self._now() - _IMPORTED - self.seconds

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"first step after {self.seconds:.1f} s ({parts})"
