"""Welch's t-test: is one record better than another, and by the 0.005 nats that a new record needs?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from train.common.errors import UserError
from train.common.wording import counted
from train.submission.record_scores import RecordScores, same_text

REQUIRED_NATS = 0.005
SIGNIFICANCE = 0.01
# relative difference in bytes per token between two tokenizers; the published scoring rules differ by 1e-5
_SAME_TOKENIZER = 1e-4


@dataclass(frozen=True)
class UnitTest:
    """The required improvement in one unit that "0.005 nats" may mean.

    Attributes:
        unit: the unit.
        margin: the improvement in bits per byte.
        test: Welch's t-test against exactly that improvement.
    """

    unit: str
    margin: float
    test: Any

    @property
    def passes(self) -> bool:
        return bool(self.test.pvalue < SIGNIFICANCE)


def welch(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> Any:
    """One-sided Welch's t-test of whether our mean is lower than theirs by more than `margin`.

    t = (m₁ + margin - m₂) / √(s₁²/n₁ + s₂²/n₂), df by Satterthwaite, p = P(T_df ≤ t).

    Args:
        ours, theirs: one score per seed, lower is better.
        margin: the improvement under the null hypothesis, in the scores' unit.

    Returns:
        SciPy's result: statistic, df, pvalue.

    Raises:
        UserError: fewer than two scores on a side, or no variance on either.
    """
    for side, scores in (("A", ours), ("B", theirs)):
        if len(scores) < 2:
            raise UserError(f"{side}: {counted(len(scores), 'seed')}: Welch's test needs at least two, a record three")
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        raise UserError("the scores of A are all equal, and so are those of B: Welch's test needs some variance")
    return stats.ttest_ind([score + margin for score in ours], theirs, equal_var=False, alternative="less")


def nats_per_token_in_bpb(bytes_per_token: float) -> float:
    """0.005 nats per token in bits per byte: 0.005 / (ln 2 · bytes per token)."""
    return REQUIRED_NATS / (math.log(2) * bytes_per_token)


def unit_tests(ours: RecordScores, theirs: RecordScores) -> list[UnitTest]:
    """The test in each unit that "0.005 nats" may mean, on bits per byte.

    With one tokenizer val_loss = val_bpb · ln 2 · bytes per token, so a test on val_loss has the same t. With two
    tokenizers, nats per token are tested for each.
    """
    sizes = [(side.name, side.bytes_per_token) for side in (theirs, ours) if side.bytes_per_token]
    if len(sizes) == 2 and math.isclose(sizes[0][1], sizes[1][1], rel_tol=_SAME_TOKENIZER):
        sizes = sizes[:1]
    margins = {f"nats per token of {name} ({size:.4f} bytes)": nats_per_token_in_bpb(size) for name, size in sizes}
    margins |= {"nats per byte": REQUIRED_NATS / math.log(2), "bits per byte": REQUIRED_NATS}
    return [UnitTest(unit, margin, welch(ours.val_bpb, theirs.val_bpb, margin)) for unit, margin in margins.items()]


def incomparable(ours: RecordScores, theirs: RecordScores) -> str:
    """Why two records' scores cannot be compared; empty if they can."""
    same = same_text(ours.text, theirs.text)
    other_text = any(side.text is not None and not side.text.challenge for side in (ours, theirs))
    if same or (same is None and not other_text):
        return ""
    reason = "scored on different texts" if same is False else "may be scored on different texts"
    sides = (f"{side.name} on {side.text or 'an unknown text'}" for side in (ours, theirs))
    return f"{reason}: {', '.join(sides)}"


def comparison_text(ours: RecordScores, theirs: RecordScores) -> str:
    """Both records' scores, Welch's test, and the test against 0.005 nats in each unit.

    Raises:
        UserError: see `incomparable` and `welch`.
    """
    reason = incomparable(ours, theirs)
    if reason:
        raise UserError(f"{reason}: compare records that are scored on the same text")
    plain = welch(ours.val_bpb, theirs.val_bpb)
    tests = unit_tests(ours, theirs)
    gain = statistics.fmean(theirs.val_bpb) - statistics.fmean(ours.val_bpb)
    lines = [f"A  {_side(ours)}", f"B  {_side(theirs)}", ""]
    if ours.text and not ours.text.challenge:
        lines += [f"Both are scored on {ours.text}, not on the challenge's validation text.", ""]
    if gain > 0:
        lines.append(f"A is better than B by {gain:.8f} bits per byte.")
    else:
        lines.append(f"A is not better than B: its mean is {-gain:.8f} bits per byte higher.")
    width = max(len(test.unit) for test in tests)
    lines += [
        f"Welch's test, A better than B: t = {plain.statistic:.4f}, df = {plain.df:.4f}, one-sided p = {plain.pvalue:.5g}.",
        "",
        f'A new record must improve "by at least {REQUIRED_NATS} nats, p < {SIGNIFICANCE}". The unit is not stated, so each is tested:',
        *(
            f"  {test.unit:<{width}}  = {test.margin:.6f} bpb   t = {test.test.statistic:9.4f}   "
            f"p = {test.test.pvalue:<10.5g}  {'passes' if test.passes else 'FAILS'}"
            for test in tests
        ),
    ]
    if not (ours.bytes_per_token or theirs.bytes_per_token):
        lines.append("  nats per token: unknown, as neither record gives both val_loss and val_bpb")
    return "\n".join([*lines, "", _result(tests)])


def _side(scores: RecordScores) -> str:
    mean, deviation = statistics.fmean(scores.val_bpb), statistics.stdev(scores.val_bpb)
    loss = f", val_loss {statistics.fmean(scores.val_loss):.8f}" if scores.val_loss else ""
    seeds = f"seeds {', '.join(scores.seeds)}" if scores.seeds else counted(len(scores.val_bpb), "seed")
    return f"{scores.name}: val_bpb {mean:.8f} ± {deviation:.8f}{loss} ({seeds})"


def _result(tests: list[UnitTest]) -> str:
    passed, failed = ([test.unit for test in tests if test.passes is verdict] for verdict in (True, False))
    if not failed:
        return "Result: A is better by enough in every unit."
    if not passed:
        return "Result: A is not better by enough in any unit."
    return f"Result: A is better by enough in {', '.join(passed)}, but not in {', '.join(failed)}."
