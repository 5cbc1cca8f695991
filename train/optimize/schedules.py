"""Schedules of the learning rate, of Muon's momentum, and of recurrence."""

from __future__ import annotations

from train.config import Config


def lr_scale(step: int, elapsed_seconds: float, config: Config) -> float:
    """Factor on every learning rate in the step after `step` finished steps.

    The factor is 1 before the warmdown, the end of training, and falls linearly to 0 in the warmdown. There are two
    published schedules:

    - `warmdown_iters` = n: the warmdown is the last n steps. In it the factor is (iterations - step) / n. Under a time
      cap the warmdown is the time of n steps at their mean duration so far. In it the factor is
      remaining / (n * elapsed / step).
    - `warmdown_frac` = f > 0 takes precedence. Let p be the finished fraction of the time cap, or of the steps without
      a cap. The warmdown begins at p = 1 - f. In it the factor is (1 - p) / f.

    Under a cap `iterations` does not matter. With `warmdown_by` "steps" there is no cap, so only `step` matters.

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
    """The time cap in seconds that the learning rate follows; 0: the learning rate follows the steps."""
    return 0.0 if config.warmdown_by == "steps" else config.training_seconds


def recurrence_on(step: int, elapsed_seconds: float, config: Config) -> bool:
    """Whether the repeated layers run again in the step after `step` finished steps.

    Recurrence starts after `recur_start_step` steps. With `recur_start_frac` = f > 0 it starts once the finished fraction
    of training is f: of the time cap, or of the steps where the learning rate follows the steps.

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
    """Muon's momentum after `step` steps: start + (end - start) * min(step / warm-up steps, 1).

    Without warm-up steps it is the end value.

    Source: Parameter Golf's baseline. In submissions #1392, #122 and #1471 it rises from 0.92 to 0.99 over 1,500 steps.
    """
    steps = config.muon_momentum_warmup_steps
    risen = min(step / steps, 1.0) if steps else 1.0
    return (1 - risen) * config.muon_momentum_warmup_start + risen * config.muon_momentum
