"""Schedules of the learning rate, of Muon's momentum and of the training sequences, and the start of recurrence."""

from __future__ import annotations

from collections.abc import Mapping

from train.config import Config


def lr_scale(step: int, elapsed_seconds: float, config: Config) -> float:
    """Return the factor on every learning rate in the step after `step` finished steps.

    The factor is 1 until the warmdown, the last phase of training. In the warmdown it falls linearly to 0, but not
    below `min_lr`. There are two published schedules:

    - `warmdown_iters` = n: without a time cap, the warmdown is the last n steps, and its factor is
      (iterations - step) / n. With a cap, the warmdown is the last D = n * elapsed / step seconds, the time of n steps
      at their mean duration so far, and its factor is remaining / D.
    - `warmdown_frac` = f > 0 takes precedence. p is the finished fraction of the time cap, or without a cap of the
      steps. The warmdown begins at p = 1 - f, and its factor is (1 - p) / f.

    With a cap, `iterations` does not matter. If `warmdown_by` is "steps", there is no cap.

    Args:
        step: number of finished steps.
        elapsed_seconds: training time so far in seconds, without validation.
        config: the settings. `warmdown_seconds` gives the cap; 0 means no cap.

    Returns:
        A number in [0, 1].

    Source: Parameter Golf's baseline (by steps or time), submissions #1471 (by fraction) and #1787 (`min_lr`).
    """
    return max(_warmdown(step, elapsed_seconds, config), config.min_lr)


def _warmdown(step: int, elapsed_seconds: float, config: Config) -> float:
    cap = warmdown_seconds(config)
    if config.warmdown_frac > 0:
        done = _finished(step, elapsed_seconds, config)
        return 1.0 if done < 1 - config.warmdown_frac else max(1 - done, 0.0) / config.warmdown_frac
    if config.warmdown_iters == 0:
        return 1.0
    if cap <= 0:
        return min(max(config.iterations - step, 0) / config.warmdown_iters, 1.0)
    remaining = max(cap - elapsed_seconds, 0.0)
    decay_seconds = config.warmdown_iters * elapsed_seconds / max(step, 1)
    return 1.0 if remaining > decay_seconds else remaining / decay_seconds


def warmdown_seconds(config: Config) -> float:
    """Return the time cap in seconds that the learning rate follows; 0: it follows the steps."""
    return 0.0 if config.warmdown_by == "steps" else config.training_seconds


def recurrence_on(step: int, elapsed_seconds: float, config: Config) -> bool:
    """Whether the repeated layers run again in the step after `step` finished steps.

    Recurrence starts after `recur_start_step` steps. With `recur_start_frac` = f > 0, it starts when the fraction f of
    the training has finished: of the time cap, or of the steps if the learning rate follows the steps.

    Source: submissions #1392 and #1471 (by steps), #1394 and #1493 (by fraction).
    """
    if not config.recur_layers:
        return False
    if config.recur_start_frac > 0:
        return _finished(step, elapsed_seconds, config) >= config.recur_start_frac
    return step >= config.recur_start_step


class ContextGrowth:
    """The length of the training sequences by `train_seq_schedule`, and the warm-up of the learning rate after growth.

    A length holds while the finished fraction of training is at most its end. Once grown, the length stays, even if the
    clock's estimate falls again. In the k-th of `seq_change_warmup_steps` = n steps after growth, the learning rates
    have the factor k / n.

    Source: submission #2014 (1,024, 2,048 and 3,072 tokens, n = 32).
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.length = config.seq_lengths[0][0]
        self.grown_at = 0  # step of the last growth; 0: none yet

    def grow(self, step: int, elapsed_seconds: float) -> bool:
        """Whether the sequences are longer from this step on."""
        done = _finished(step, elapsed_seconds, self.config)
        lengths = [length for length, end in self.config.seq_lengths if done <= end]
        length = lengths[0] if lengths else self.config.seq_lengths[-1][0]
        if length <= self.length:
            return False
        self.length, self.grown_at = length, step
        return True

    def lr_factor(self, step: int) -> float:
        """Return the factor on every learning rate in the step after `step` finished steps."""
        steps = self.config.seq_change_warmup_steps
        return min((step - self.grown_at + 1) / steps, 1.0) if steps and self.grown_at else 1.0

    def state_dict(self) -> dict[str, int]:
        return {"length": self.length, "grown_at": self.grown_at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the result of `state_dict`."""
        self.length, self.grown_at = state["length"], state["grown_at"]


def training_graphs(config: Config) -> list[tuple[bool, int]]:
    """The pairs (recurrence, length of the sequences) that training passes through. The model has one graph per pair."""
    begin, pairs = 0.0, set()
    start = config.recur_start_frac
    for length, end in config.seq_lengths:
        for recurrence in {recurrence_on(0, 0.0, config), bool(config.recur_layers)}:
            if not start or not config.recur_layers or (end >= start if recurrence else begin < start):
                pairs.add((recurrence, length))
        begin = end
    return sorted(pairs)


def _finished(step: int, elapsed_seconds: float, config: Config) -> float:
    cap = warmdown_seconds(config)
    return elapsed_seconds / cap if cap > 0 else step / config.iterations


def muon_momentum(step: int, config: Config) -> float:
    """Return Muon's momentum after `step` steps: start + (end - start) * min(step / warm-up steps, 1).

    Without warm-up steps, return `end`.

    Source: Parameter Golf's baseline. In submissions #1392, #122 and #1471 it rises from 0.92 to 0.99 over 1,500 steps.
    """
    steps = config.muon_momentum_warmup_steps
    risen = min(step / steps, 1.0) if steps else 1.0
    return (1 - risen) * config.muon_momentum_warmup_start + risen * config.muon_momentum
