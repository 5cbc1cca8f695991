"""Schedules of the learning rate and of Muon's momentum, and the start of recurrence."""

from __future__ import annotations

from train.config import Config


def lr_scale(step: int, elapsed_seconds: float, config: Config) -> float:
    """Return the factor on every learning rate in the step after `step` finished steps.

    The factor is 1 until the warmdown, the last phase of training. In the warmdown it falls linearly to 0. There are
    two published schedules:

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

    Source: Parameter Golf's baseline (by steps or time) and submission #1471 (by fraction).
    """
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
