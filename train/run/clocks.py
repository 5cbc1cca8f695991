"""The clocks of a run: training time, seconds per stage, and time before the first step."""

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
    """Training time, equal on all ranks, measured without draining the GPU's queue.

    The published scripts reduce a stop flag after every step and wait for it, so the host never runs ahead of the GPU.
    Here the measured time is one or two steps old:

    * On CUDA an event marks the end of each step. `tick` waits for the previous step's event, which limits how far
      the host runs ahead.
    * With several ranks, that time goes into an asynchronous all-reduce (MAX) on the CPU. The next `tick` waits for the
      result, so all ranks use the same number in the same step.

    `elapsed_seconds` extrapolates it to the present step by the mean step time. A run therefore ends with the first step
    that reaches the cap, as published. One process on a CPU has no delay. The learning rate also follows
    `elapsed_seconds`; in the published scripts, each rank computes it from its own clock.

    The clock starts paused. Pause it for everything that is not training, such as validation.

    Args:
        cap_seconds: training ends here; 0 for no cap.
        group: process group that can reduce CPU tensors; None for one process.
        device: where the steps run.
        elapsed_seconds, steps: time and steps before this process, from a checkpoint.
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
        """Training time in seconds: extrapolated at the last `tick`, or exact at the last `pause`."""
        steps, seconds = self._known
        return seconds * self.steps / steps if steps else seconds

    def read(self) -> float:
        """This rank's own training time in seconds; waits for the device."""
        if self._start is None:
            return self._base
        return self._base + self._seconds_until(self._mark())

    def resume(self) -> None:
        """Wait for the other ranks and start the time; work already queued on the device counts."""
        if self._start is not None:
            raise RuntimeError("the wall clock is running: pause it before resume")
        # otherwise the other ranks would count their wait for a rank that was writing a file
        if self._group is not None:
            dist.all_reduce(torch.zeros(1), group=self._group)
        self._start = self._mark()

    def tick(self) -> bool:
        """Count one finished (on CUDA: queued) step; return whether training ends here, the same on every rank."""
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
        """Wait for device and ranks, stop the time, and return the largest rank's training time in seconds."""
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
        if self._device.type != "cuda":
            return float(mark - self._start)
        mark.synchronize()
        return float(self._start.elapsed_time(mark)) / 1e3

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
    """Seconds per stage, saved in the run folder, because an earlier process may have finished a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.path: Path | None = None

    def keep_in(self, path: Path) -> None:
        """Save the seconds in this file from now on; its seconds of other stages stay."""
        remedy = "delete it (only the seconds per stage are lost) and resume again"
        earlier = read_json(path, remedy) if path.exists() else {}
        if not all(type(seconds) in (int, float) for seconds in earlier.values()):
            raise UserError(f"{path}: expected seconds per stage, found {earlier}: {remedy}")
        self.seconds = {**earlier, **self.seconds}
        self.path = path
        self._save()

    @contextmanager
    def __call__(self, name: str, *, found: bool = False) -> Iterator[None]:
        """Time a stage; if its result is `found` already, the saved seconds stay."""
        started = time.perf_counter()
        yield
        if not found:
            self.seconds[name] = time.perf_counter() - started
            self._save()

    def _save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.seconds)


class StartUp:
    """Seconds of each phase before the first step, from the import of this module on; Python's own start is not counted.

    The first phase, `start`, ends when this object is made.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self.parts = {"start": now() - _IMPORTED}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def end(self, part: str) -> None:
        """Call at the end of a phase, which began at the end of the previous one."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.parts[part] = self._now() - _IMPORTED - self.seconds

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"first step after {self.seconds:.1f} s ({parts})"
