"""Plans the windows of an evaluation and the positions that each window scores, as index arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from train.common.errors import UserError

RULES = ("once", "overlap_tail", "full_windows")


class WindowPlan(NamedTuple):
    """The windows of an evaluation over the targets 0 … T-1. Target t is the token after input t.

    All arrays are `(windows,)` int64.
    """

    start: np.ndarray  # first input
    length: np.ndarray  # number of inputs, at most the window length
    score_from: np.ndarray  # first scored position in the window; all later positions are scored too

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return int((self.length - self.score_from).sum())


class WindowGroup(NamedTuple):
    """Windows of equal shape, which the model computes together. No window scores a position before `rows_from`."""

    windows: WindowPlan
    rows_from: int


def group_windows(plan: WindowPlan, seq_len: int, stride: int) -> list[WindowGroup]:
    """Divide windows into those that score only their last `stride` positions (nearly all windows) and the others.

    Empty groups are left out. `seq_len` and `stride` are those of `plan_windows`.
    """
    late = plan.score_from >= seq_len - (stride or seq_len)
    groups = ((~late, 0), (late, seq_len - (stride or seq_len)))
    return [
        WindowGroup(WindowPlan(*(part[chosen] for part in plan)), first) for chosen, first in groups if chosen.any()
    ]


def plan_windows(total_targets: int, seq_len: int, stride: int, rule: str = "once") -> WindowPlan:
    """Plan windows of `seq_len` tokens over T = `total_targets` targets, and the positions that each window scores.

    `once`: a window starts at each w = 0, stride, 2 stride, … with w + (seq_len - stride) < T. The first window scores
    all its positions. Each other window scores its positions from seq_len - stride on. Every target is scored once.
    `overlap_tail`: a window starts at each multiple of the stride below T. The first window scores all its positions.
    Each other window scores its last `stride` positions, even if it is shorter than seq_len. The final targets are
    scored several times.
    `full_windows`: like `overlap_tail`, but windows shorter than seq_len are left out, and the first window also scores
    only its last `stride` positions. The first seq_len - stride targets are never scored.
    If the stride is 0, windows do not overlap and score all positions, whatever the rule.

    Raises:
        UserError: there are no targets, the stride is out of range, the rule is unknown, or no full window fits.
    """
    if rule not in RULES:
        raise UserError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if seq_len < 1 or not 0 <= stride <= seq_len:
        raise UserError(f"stride: expected 0 (flat) … {seq_len}, the window length, got {stride}")
    if total_targets < 1:
        raise UserError("nothing to score: the text has only one token; give a longer validation text")
    step = stride or seq_len
    if rule == "full_windows" and stride:
        if total_targets < seq_len:
            raise UserError(
                f"rule full_windows: no window of {seq_len} tokens fits into {total_targets}: choose rule once or a smaller "
                "window (--seq-len)"
            )
        start = np.arange(0, total_targets - seq_len + 1, step, dtype=np.int64)
    elif rule == "once" and stride:
        start = np.arange(0, max(total_targets - (seq_len - stride), 1), step, dtype=np.int64)
    else:
        start = np.arange(0, total_targets, step, dtype=np.int64)
    length = np.minimum(seq_len, total_targets - start)
    score_from = np.zeros_like(start)
    if stride and rule == "once":
        score_from[1:] = seq_len - stride
    elif stride and rule == "overlap_tail":
        score_from[1:] = np.maximum(length[1:] - stride, 0)
    elif stride:
        score_from[:] = seq_len - stride
    return WindowPlan(start, length, score_from)
