"""Which windows a sliding evaluation reads and which of their positions it scores, as index arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from train.common.errors import UserError

RULES = ("once", "overlap_tail", "full_windows")


class WindowPlan(NamedTuple):
    """Windows over the targets 0 … T-1; target t is the token behind input t.

    Attributes:
        start: `(windows,)` int64, first input of each window.
        length: `(windows,)` int64, inputs in it, at most the window length.
        score_from: `(windows,)` int64, first position in the window that is scored; all behind it are, too.
    """

    start: np.ndarray
    length: np.ndarray
    score_from: np.ndarray

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return int((self.length - self.score_from).sum())


class WindowGroup(NamedTuple):
    """Windows of a plan that go through the model in one shape: none of them scores a position before `rows_from`."""

    windows: WindowPlan
    rows_from: int


def group_windows(plan: WindowPlan, seq_len: int, stride: int) -> list[WindowGroup]:
    """Separate the windows that score only among their last `stride` positions, nearly all, from the others.

    Args:
        plan: windows of `plan_windows`, or some of them.
        seq_len: window length in tokens.
        stride: new tokens per window; 0: rows side by side.

    Returns:
        One or two groups, none of them empty, which together hold every window once.
    """
    late = plan.score_from >= seq_len - (stride or seq_len)
    groups = ((~late, 0), (late, seq_len - (stride or seq_len)))
    return [
        WindowGroup(WindowPlan(*(part[chosen] for part in plan)), first) for chosen, first in groups if chosen.any()
    ]


def plan_windows(total_targets: int, seq_len: int, stride: int, rule: str = "once") -> WindowPlan:
    """Lay windows of `seq_len` tokens over T targets and say what each one scores.

    `once`: starts w = 0, stride, … while w + (seq_len - stride) < T; the first window scores all its positions, the
    others those from seq_len - stride on, so every target is scored exactly once. `overlap_tail`: a window for every
    start below T, which scores the last `stride` positions of its actual length, so the final ones are scored again and
    again. `full_windows`: full windows only, each scoring its last `stride` positions, so the first seq_len - stride
    targets are never scored. Stride 0: rows of `seq_len` side by side, all scored, whatever the rule.

    Args:
        total_targets: T.
        seq_len: window length in tokens.
        stride: new tokens per window, 0 … seq_len.
        rule: a name in `RULES`.

    Raises:
        UserError: no targets, a stride out of range, an unknown rule, or no full window where the rule wants one.
    """
    if rule not in RULES:
        raise UserError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if seq_len < 1 or not 0 <= stride <= seq_len:
        raise UserError(f"stride: expected 0 (flat) … {seq_len}, the window length, got {stride}")
    if total_targets < 1:
        raise UserError("nothing to score: the text has no token behind its first one; give a longer validation text")
    step = stride or seq_len
    if rule == "full_windows" and stride:
        if total_targets < seq_len:
            raise UserError(
                f"rule full_windows: no window of {seq_len} tokens fits into {total_targets}: take rule once or a smaller "
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
