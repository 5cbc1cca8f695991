"""Schedules of the learning rate and of Muon's momentum."""

from __future__ import annotations

from train.config import Config


def lr_scale(step: int, elapsed_seconds: float, config: Config) -> float:
    """Factor on every learning rate before step `step`.

    Two published schedules, each 1 before the warmdown and linear to 0 in it:

    - by steps, `warmdown_iters` = n: (iterations - step) / n in the last n steps. Under a wall-clock cap the n steps become
      time at the mean step time so far: remaining / (n * elapsed / step) once that is below 1;
    - by fraction, `warmdown_frac` = f > 0, which takes precedence: (1 - p) / f once p >= 1 - f, where p is the finished
      fraction of the time, or of the steps without a cap.

    Under a cap `iterations` does not matter. `warmdown_by` steps ignores the cap: the factor then depends on the step alone.

    Args:
        step: steps finished so far.
        elapsed_seconds: training time so far, without validation, in seconds.
        config: the settings; the cap is `warmdown_seconds` (0: none).

    Returns:
        A number in [0, 1].

    Source: Parameter Golf's baseline (by steps or time) and submission #1471 (by fraction).
    """
    cap = warmdown_seconds(config)
    if config.warmdown_frac > 0:
        done = elapsed_seconds / cap if cap > 0 else step / config.iterations
        return 1.0 if done < 1 - config.warmdown_frac else max(1 - done, 0.0) / config.warmdown_frac
    if config.warmdown_iters == 0:
        return 1.0
    if cap <= 0:
        return min(max(config.iterations - step, 0) / config.warmdown_iters, 1.0)
    remaining = max(cap - elapsed_seconds, 0.0)
    decay_seconds = config.warmdown_iters * elapsed_seconds / max(step, 1)
    return 1.0 if remaining > decay_seconds else remaining / decay_seconds


def warmdown_seconds(config: Config) -> float:
    """The training time that the learning rate follows; 0: it follows the steps."""
    return 0.0 if config.warmdown_by == "steps" else config.training_seconds


def muon_momentum(step: int, config: Config) -> float:
    """Muon's momentum after `step` steps: start + (end - start) * min(step / warm-up steps, 1); end without warm-up steps.

    Source: Parameter Golf's baseline; submissions #1392, #122 and #1471 rise from 0.92 to 0.99 over 1,500 steps.
    """
    steps = config.muon_momentum_warmup_steps
    risen = min(step / steps, 1.0) if steps else 1.0
    return (1 - risen) * config.muon_momentum_warmup_start + risen * config.muon_momentum
