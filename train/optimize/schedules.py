"""How the learning rate and Muon's momentum move during a run."""

from __future__ import annotations

from train.config import Config


def lr_scale(step: int, elapsed_seconds: float, config: Config) -> float:
    """Factor on every learning rate before step `step`.

    Two published schedules. By steps (`warmdown_iters` = n): 1, and over the last n steps (iterations - step) / n. Under a
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
