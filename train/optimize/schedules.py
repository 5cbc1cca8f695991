"""How the learning rate and Muon's momentum move during a run, and the clock that ends it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.config import Config


def lr_scale(step: int, elapsed_seconds: float, config: Config) -> float:
    """Factor on every learning rate before step `step`.

    Two published forms. By steps (`warmdown_iters` = n): 1, and over the last n steps (iterations - step) / n. Under a
    wall-clock cap those n steps are measured in time, at the mean step time so far: 1 until
    remaining <= n * elapsed / step, then remaining / (n * elapsed / step). By fraction (`warmdown_frac` = f > 0, which
    replaces the other): with the finished fraction p of the time (of the steps without a cap), 1 while p < 1 - f, then
    (1 - p) / f. Under a cap `iterations` has no part in either.

    Args:
        step: steps finished so far.
        elapsed_seconds: training time so far, without validation, in seconds.
        config: `warmdown_iters`, `warmdown_frac`, `iterations`, and the cap `training_seconds` (0: none).

    Returns:
        A number in [0, 1].

    Source: Parameter Golf's baseline (by steps or time) and submission #1471 (by fraction).
    """
    cap = config.training_seconds
    if config.warmdown_frac > 0:
        done = elapsed_seconds / cap if cap > 0 else step / config.iterations
        return 1.0 if done < 1 - config.warmdown_frac else max(1 - done, 0.0) / config.warmdown_frac
    if config.warmdown_iters == 0:
        return 1.0
    if cap <= 0:
        return min(max(config.iterations - step, 0) / config.warmdown_iters, 1.0)
    remaining = max(cap - elapsed_seconds, 0.0)
    warmdown_seconds = config.warmdown_iters * elapsed_seconds / max(step, 1)
    return 1.0 if remaining > warmdown_seconds else remaining / warmdown_seconds


def muon_momentum(step: int, config: Config) -> float:
    """Momentum of Muon in step `step`: start + (end - start) * min(step / warm-up steps, 1).

    Args:
        step: steps finished so far.
        config: `muon_momentum_warmup_start`, `muon_momentum`, and `muon_momentum_warmup_steps` (0: the end at once).

    Source: Parameter Golf's baseline; submissions #1392, #122 and #1471 rise from 0.92 to 0.99 over 1,500 steps.
    """
    steps = config.muon_momentum_warmup_steps
    risen = min(step / steps, 1.0) if steps else 1.0
    return (1 - risen) * config.muon_momentum_warmup_start + risen * config.muon_momentum


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

    The clock stands still until `resume`; `pause` stops it for whatever does not count as training (validation).

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
            raise RuntimeError("the wall clock stands still: resume it before tick")
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
            raise RuntimeError("the wall clock stands still: resume it before pause")
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
