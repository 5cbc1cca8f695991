"""Is one record better than another, and by the 0.005 nats that a new one needs? Welch's test in its three readings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from train.common.errors import UserError
from train.common.wording import counted
from train.submission.record_scores import RecordScores, one_text

BAR = 0.005
SIGNIFICANCE = 0.01
# tokenizers whose tokens differ by less than this are taken for one; the published rules of scoring differ by 1e-5
_SAME_TOKENIZER = 1e-4


@dataclass(frozen=True)
class Welch:
    """One outcome of Welch's test.

    Attributes:
        t: statistic.
        df: Satterthwaite's degrees of freedom.
        p: one-sided: how likely a t this low is if the improvement is exactly the margin.
    """

    t: float
    df: float
    p: float


@dataclass(frozen=True)
class Reading:
    """One reading of "0.005 nats".

    Attributes:
        name: what the nats are per.
        bar_bpb: the bar in bits per byte.
        test: Welch's test against an improvement of exactly the bar.
    """

    name: str
    bar_bpb: float
    test: Welch

    @property
    def passes(self) -> bool:
        return self.test.p < SIGNIFICANCE


def welch(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> Welch:
    """Welch's test of whether our mean is lower than theirs by more than `margin`.

    t = (m₁ + margin - m₂) / √(s₁²/n₁ + s₂²/n₂), df by Satterthwaite, p = P(T_df ≤ t).

    Args:
        ours, theirs: one score per seed, lower is better.
        margin: the improvement of the null hypothesis, in the scores' unit.

    Raises:
        UserError: fewer than two scores on a side, or no deviation on either.
    """
    for side, scores in (("A", ours), ("B", theirs)):
        if len(scores) < 2:
            raise UserError(
                f"{side}: {len(scores)} seed has no deviation: Welch's test needs at least two, a record three"
            )
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        raise UserError("each side has one score on all its seeds: without a deviation there is no test")
    result = stats.ttest_ind([score + margin for score in ours], theirs, equal_var=False, alternative="less")
    return Welch(float(result.statistic), float(result.df), float(result.pvalue))


def bar_bpb(bytes_per_token: float) -> float:
    """0.005 nats per token in bits per byte: 0.005 / (ln 2 · bytes per token)."""
    return BAR / (math.log(2) * bytes_per_token)


def readings(ours: RecordScores, theirs: RecordScores) -> list[Reading]:
    """The test in all readings of the bar, on bits per byte.

    Within one tokenizer val_loss = val_bpb · ln 2 · bytes per token, so that a test on losses has the same t. Where the
    tokenizers differ, the first reading is given for each of them.
    """
    bars = []
    known = [(side.name, side.bytes_per_token) for side in (theirs, ours) if side.bytes_per_token]
    if len(known) == 2 and math.isclose(known[0][1], known[1][1], rel_tol=_SAME_TOKENIZER):
        known = known[:1]
    bars += [(f"nats per token of {name} ({size:.4f} bytes)", bar_bpb(size)) for name, size in known]
    bars += [("nats per byte", BAR / math.log(2)), ("bits per byte", BAR)]
    return [Reading(name, bar, welch(ours.val_bpb, theirs.val_bpb, bar)) for name, bar in bars]


def incomparable(ours: RecordScores, theirs: RecordScores) -> str:
    """Why the scores of two records say nothing about each other; empty: nothing is known against it."""
    same = one_text(ours.text, theirs.text)
    foreign = any(side.text is not None and not side.text.challenge for side in (ours, theirs))
    if same or (same is None and not foreign):
        return ""
    reason = "scored on different texts" if same is False else "not known to be scored on one text"
    sides = (f"{side.name} on {side.text or 'a text that is not written down'}" for side in (ours, theirs))
    return f"{reason}, so that the scores say nothing about each other: {', '.join(sides)}"


def comparison_text(ours: RecordScores, theirs: RecordScores) -> str:
    """Two records side by side, Welch's test and the three readings of the bar, in words.

    Raises:
        UserError: see `incomparable` and `welch`.
    """
    reason = incomparable(ours, theirs)
    if reason:
        raise UserError(f"{reason}: compare records whose runs had one validation text")
    plain = welch(ours.val_bpb, theirs.val_bpb)
    tests = readings(ours, theirs)
    gain = statistics.fmean(theirs.val_bpb) - statistics.fmean(ours.val_bpb)
    lines = [f"A  {_side(ours)}", f"B  {_side(theirs)}", ""]
    if ours.text and not ours.text.challenge:
        lines += [f"Both are scored on {ours.text}.", ""]
    if gain > 0:
        lines.append(f"A is better by {gain:.8f} bits per byte.")
    else:
        lines.append(f"A is not better: it needs {-gain:.8f} bits per byte more than B.")
    lines += [
        f"Welch's test: t = {plain.t:.4f}, {plain.df:.4f} degrees of freedom, one-sided p = {plain.p:.5g} against no improvement.",
        "",
        f'A record must be better "by at least {BAR} nats, p < {SIGNIFICANCE}". Against an improvement of exactly that much:',
    ]
    width = max(len(reading.name) for reading in tests)
    for reading in tests:
        lines.append(
            f"  {reading.name:<{width}}  = {reading.bar_bpb:.6f} bpb   t = {reading.test.t:9.4f}   p = {reading.test.p:<10.5g}  "
            f"{'holds' if reading.passes else 'does NOT hold'}"
        )
    if not (ours.bytes_per_token or theirs.bytes_per_token):
        lines.append("  nats per token: not seen, as neither side gives its val_loss beside its val_bpb")
    return "\n".join([*lines, "", _verdict(tests)])


def _side(scores: RecordScores) -> str:
    mean, deviation = statistics.fmean(scores.val_bpb), statistics.stdev(scores.val_bpb)
    loss = f", val_loss {statistics.fmean(scores.val_loss):.8f}" if scores.val_loss else ""
    seeds = f"seeds {', '.join(scores.seeds)}" if scores.seeds else counted(len(scores.val_bpb), "seed")
    return f"{scores.name}: val_bpb {mean:.8f} ± {deviation:.8f}{loss} ({seeds})"


def _verdict(tests: list[Reading]) -> str:
    names = [reading.name for reading in tests if reading.passes]
    if len(names) == len(tests):
        return "In words: A clears the bar in every reading."
    if not names:
        return "In words: A clears the bar in no reading."
    others = [reading.name for reading in tests if not reading.passes]
    return f"In words: A clears the bar if it is read as {', '.join(names)}, but not as {', '.join(others)}."
