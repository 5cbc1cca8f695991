"""Measures a run's training time, the seconds of each stage, and the time before the first step."""

from __future__ import annotations

import math
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
    """Measures the training time without draining the GPU's queue. All ranks get the same time.

    The published scripts all-reduce a stop flag after every step and wait for the result, so the host never runs ahead
    of the GPU. This clock does not wait for the current step. It measures the time of an earlier step:

    * On CUDA, an event marks the end of each step. `tick` waits for the event of the previous step, so the host cannot
      run far ahead of the GPU.
    * With several ranks, an asynchronous all-reduce (MAX) on the CPU takes each rank's time of that event. The next
      `tick` waits for the result, so all ranks use the same time in the same step.

    `elapsed_seconds` extrapolates the measured time to the current step, with the mean step time. A run therefore ends
    with the first step that reaches the cap, as in the published scripts. A single process on a CPU needs no
    extrapolation. The learning rate also follows `elapsed_seconds`. In the published scripts it follows each rank's own
    clock.

    The clock starts paused. The caller pauses it for all work that is not training, such as validation.

    Args:
        cap_seconds: training time in seconds after which training ends; 0: no cap.
        group: process group that can reduce CPU tensors; None for one process.
        device: device on which the steps run.
        elapsed_seconds, steps: training time and number of steps so far, from a checkpoint.
        now: function that returns the host's time in seconds.
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
        self._host_seconds = 0.0
        self._host_mark = -math.inf
        self._base = elapsed_seconds
        self._known = (steps, elapsed_seconds)
        self._start: Any = None
        self._events: deque[tuple[int, Any]] = deque()
        self._reductions: deque[tuple[int, torch.Tensor, dist.Work | None]] = deque()

    @property
    def elapsed_seconds(self) -> float:
        """Training time in seconds, extrapolated to the last `tick`. After `pause` it is exact."""
        steps, seconds = self._known
        return seconds * self.steps / steps if steps else seconds

    def read(self) -> float:
        """Wait for the device. Return the training time in seconds as measured on this rank alone."""
        if self._start is None:
            return self._base
        return self._base + self._seconds_until(self._mark())

    def resume(self) -> None:
        """Wait for the other ranks and start the clock. Work already queued on the device counts as training."""
        if self._start is not None:
            raise RuntimeError("the wall clock is running: pause it before resume")
        # without this wait, the other clocks would count the time in which one rank still writes a file
        if self._group is not None:
            dist.all_reduce(torch.zeros(1), group=self._group)
        self._start = self._mark()

    def tick(self) -> bool:
        """Count a finished step (on CUDA: a queued step). Return whether training ends now, the same on every rank."""
        if self._start is None:
            raise RuntimeError("the wall clock is paused: resume it before tick")
        self.steps += 1
        self._events.append((self.steps, self._mark()))
        if len(self._events) > (self._device.type == "cuda"):
            steps, event = self._events.popleft()
            self._start_reduction(steps, self._base + self._seconds_until(event))
        while len(self._reductions) > (self._group is not None):
            self._finish_reduction()
        return self.cap_seconds > 0 and self.elapsed_seconds >= self.cap_seconds

    def pause(self) -> float:
        """Wait for the device and the ranks, stop the clock, and return the longest training time of any rank."""
        if self._start is None:
            raise RuntimeError("the wall clock is paused: resume it before pause")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._events.clear()
        self._start_reduction(self.steps, self._base + self._seconds_until(self._mark()))
        while self._reductions:
            self._finish_reduction()
        self._start = None
        self._base = self._known[1]
        return self._base

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            # a clock that jumps back, as after a migration of a virtual machine, must not keep training from ending
            mark, now = self._host_mark, self._now()
            self._host_seconds += max(now - mark, 0.0) if mark > -math.inf else 0.0
            self._host_mark = now
            return self._host_seconds
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _seconds_until(self, mark: Any) -> float:
        if self._device.type != "cuda":
            return float(mark - self._start)
        mark.synchronize()
        return float(self._start.elapsed_time(mark)) / 1e3

    def _start_reduction(self, steps: int, seconds: float) -> None:
        number = torch.tensor([seconds], dtype=torch.float64)
        work = None
        if self._group is not None:
            work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._reductions.append((steps, number, work))

    def _finish_reduction(self) -> None:
        steps, number, work = self._reductions.popleft()
        if work is not None:
            work.wait()
        self._known = (steps, number.item())


class StageClock:
    """Measures the seconds of each stage, and stores the seconds in a file, so that a resumed run has them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.path: Path | None = None

    def keep_in(self, path: Path) -> None:
        """Save the seconds in the file `path` from now on.

        Stages that are not timed again keep their seconds in the file.
        """
        remedy = "delete it (only the seconds per stage are lost) and resume again"
        earlier = read_json(path, remedy) if path.exists() else {}
        if not all(type(seconds) in (int, float) for seconds in earlier.values()):
            raise UserError(f"{path}: expected seconds per stage, found {earlier}: {remedy}")
        self.seconds = {**earlier, **self.seconds}
        self.path = path
        self._save()

    @contextmanager
    def __call__(self, name: str, *, found: bool = False) -> Iterator[None]:
        """Time a stage inside the context. `found`: an earlier process did the stage, so keep the saved seconds."""
        started = time.perf_counter()
        yield
        if not found:
            self.seconds[name] = time.perf_counter() - started
            self._save()

    def _save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.seconds)


class StartUp:
    """Measures the seconds of each phase before the first training step.

    The first phase, `start`, begins with the import of this module and ends when this object is made. The start of
    Python itself is not counted.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self.phases = {"start": now() - _IMPORTED}

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def end(self, phase: str) -> None:
        """End the phase `phase`, which began when the previous phase ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.phases[phase] = self._now() - _IMPORTED - self.seconds

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        return f"time before the first step: {self.seconds:.1f} s ({phases})"
