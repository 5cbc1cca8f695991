"""t-tests of whether one submission beats another: by any amount, and by the 0.005 nats that a new record needs."""

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
# the leaderboard's last rule accepted a record if its p against the previous record, without a margin, was below this
LEADERBOARD_P = 0.25
# records share a tokenizer if their bytes per token differ by less than this fraction; scoring rules change the bytes
# per token by 1e-5
_SAME_TOKENIZER = 1e-4


@dataclass(frozen=True)
class UnitTest:
    """The t-test of the required improvement, for one reading of the unit of "0.005 nats".

    Attributes:
        unit: name of the unit, such as "nats per byte".
        margin: the required improvement in bits per byte.
        test: SciPy's result. The null hypothesis is an improvement of at most `margin`.
    """

    unit: str
    margin: float
    test: Any

    @property
    def passes(self) -> bool:
        return bool(self.test.pvalue < SIGNIFICANCE)


def t_test(ours: Sequence[float], theirs: Sequence[float], margin: float = 0.0) -> Any:
    """Run a one-sided t-test of whether the mean of `ours` is lower than that of `theirs` by more than `margin`.

    Welch's test: t = (m₁ + margin - m₂) / √(s₁²/n₁ + s₂²/n₂), with Satterthwaite's df. If `theirs` is one number x, the
    test takes x as exact: t = (m₁ + margin - x) / √(s₁²/n₁), df = n₁ - 1. In both cases p = P(T_df ≤ t).

    Args:
        ours, theirs: one score per seed; lower is better.
        margin: the improvement under the null hypothesis, in the scores' unit.

    Returns:
        SciPy's result: statistic, df, pvalue.

    Raises:
        UserError: `ours` has fewer than two scores, `theirs` has none, or the scores vary on neither side.
    """
    if len(ours) < 2:
        raise UserError(f"A: {counted(len(ours), 'seed')}: a t-test needs at least two, a record three")
    if not theirs:
        raise UserError("B: no score: give a record with scores, or a number")
    if len(set(ours)) == 1 and len(set(theirs)) == 1:
        both = ", and so are those of B" if len(theirs) > 1 else ""
        raise UserError(f"the scores of A are all equal{both}: a t-test needs some variance")
    shifted = [score + margin for score in ours]
    if len(theirs) == 1:
        return stats.ttest_1samp(shifted, theirs[0], alternative="less")
    return stats.ttest_ind(shifted, theirs, equal_var=False, alternative="less")


def nats_per_token_in_bpb(bytes_per_token: float) -> float:
    """Convert 0.005 nats per token to bits per byte: 0.005 / (ln 2 · bytes per token)."""
    return REQUIRED_NATS / (math.log(2) * bytes_per_token)


def unit_tests(ours: RecordScores, theirs: RecordScores) -> list[UnitTest]:
    """Test the required improvement once per unit, because the rules do not say what "0.005 nats" are divided by.

    The tests compare bits per byte. If both records share a tokenizer, val_loss = val_bpb · ln 2 · bytes per token, so
    a test of val_loss would have the same t. If the tokenizers differ, nats per token are tested once per tokenizer.
    """
    sizes = [(side.name, side.bytes_per_token) for side in (theirs, ours) if side.bytes_per_token]
    if len(sizes) == 2 and math.isclose(sizes[0][1], sizes[1][1], rel_tol=_SAME_TOKENIZER):
        sizes = sizes[:1]
    margins = {f"nats per token of {name} ({size:.4f} bytes)": nats_per_token_in_bpb(size) for name, size in sizes}
    margins |= {"nats per byte": REQUIRED_NATS / math.log(2), "bits per byte": REQUIRED_NATS}
    return [UnitTest(unit, margin, t_test(ours.val_bpb, theirs.val_bpb, margin)) for unit, margin in margins.items()]


def incomparable(ours: RecordScores, theirs: RecordScores) -> str:
    """Return why the scores of two records cannot be compared, or "" if they can."""
    same = same_text(ours.text, theirs.text)
    other_text = any(side.text is not None and not side.text.challenge for side in (ours, theirs))
    if same or (same is None and not other_text):
        return ""
    reason = "scored on different texts" if same is False else "may be scored on different texts"
    sides = (f"{side.name} on {side.text or 'an unknown text'}" for side in (ours, theirs))
    return f"{reason}: {', '.join(sides)}"


@dataclass(frozen=True)
class Comparison:
    """Tests of whether record `a` beats record `b`.

    `plain` tests an improvement by any amount. Each of `units` tests an improvement by 0.005 nats in one unit.
    """

    a: RecordScores
    b: RecordScores
    plain: Any
    units: list[UnitTest]

    @property
    def test(self) -> str:
        return "Welch's test" if len(self.b.val_bpb) > 1 else "One-sample test"

    @property
    def gain(self) -> float:
        """Mean improvement of `a` over `b` in bits per byte."""
        return statistics.fmean(self.b.val_bpb) - statistics.fmean(self.a.val_bpb)

    @property
    def beats_leaderboard(self) -> bool:
        """Whether the leaderboard's last rule would have accepted `a` against `b`; see `LEADERBOARD_P`."""
        return bool(self.plain.pvalue < LEADERBOARD_P)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of `text` as a dictionary for JSON."""
        return {
            "a": _facts(self.a),
            "b": _facts(self.b),
            "gain_bpb": self.gain,
            "test": self.test,
            **_statistics(self.plain),
            "required_nats": REQUIRED_NATS,
            "significance": SIGNIFICANCE,
            "leaderboard_p": LEADERBOARD_P,
            "leaderboard_passes": self.beats_leaderboard,
            "units": [
                {"unit": unit.unit, "margin_bpb": unit.margin, **_statistics(unit.test), "passes": unit.passes}
                for unit in self.units
            ],
        }

    def text(self) -> str:
        """Describe the scores of both records and the results of all tests."""
        lines = [f"A  {_side(self.a)}", f"B  {_side(self.b)}", ""]
        if self.a.text and not self.a.text.challenge:
            lines += [f"Both are scored on {self.a.text}, not on the challenge's validation text.", ""]
        if self.gain > 0:
            lines.append(f"A is better than B by {self.gain:.8f} bits per byte.")
        else:
            lines.append(f"A is not better than B: its mean is {-self.gain:.8f} bits per byte higher.")
        width = max(len(unit.unit) for unit in self.units)
        lines += [
            f"{self.test}, A better than B: t = {self.plain.statistic:.4f}, df = {self.plain.df:.4f}, "
            f"one-sided p = {self.plain.pvalue:.5g}.",
            *(["B is one number, which the test takes as exact."] if len(self.b.val_bpb) == 1 else []),
            "",
            f'A new record must improve "by at least {REQUIRED_NATS} nats, p < {SIGNIFICANCE}". The unit is not stated, so each is tested:',
            *(
                f"  {unit.unit:<{width}}  = {unit.margin:.6f} bpb   t = {unit.test.statistic:9.4f}   "
                f"p = {unit.test.pvalue:<10.5g}  {'passes' if unit.passes else 'FAILS'}"
                for unit in self.units
            ),
        ]
        per_token = bool(self.a.bytes_per_token or self.b.bytes_per_token)
        if not per_token:
            lines.append("  nats per token: not tested, as neither record gives both val_loss and val_bpb")
        leaderboard = (
            f"The leaderboard's rule at its end, p < {LEADERBOARD_P} against the record before: "
            f"{'passes' if self.beats_leaderboard else 'FAILS'} (p = {self.plain.pvalue:.5g})."
        )
        return "\n".join([*lines, "", leaderboard, _result(self.units, per_token=per_token)])


def compare(ours: RecordScores, theirs: RecordScores) -> Comparison:
    """Test whether record `ours` is better than record `theirs`.

    Raises:
        UserError: the records cannot be compared; see `incomparable` and `t_test`.
    """
    reason = incomparable(ours, theirs)
    if reason:
        raise UserError(f"{reason}: compare records that are scored on the same text")
    return Comparison(ours, theirs, t_test(ours.val_bpb, theirs.val_bpb), unit_tests(ours, theirs))


def _statistics(test: Any) -> dict[str, float]:
    return {"t": float(test.statistic), "df": float(test.df), "p": float(test.pvalue)}


def _facts(scores: RecordScores) -> dict[str, Any]:
    several = len(scores.val_bpb) > 1
    return {
        "name": scores.name,
        "seeds": list(scores.seeds),
        "val_bpb": list(scores.val_bpb),
        "val_bpb_mean": statistics.fmean(scores.val_bpb),
        "val_bpb_std": statistics.stdev(scores.val_bpb) if several else None,
    }


def _side(scores: RecordScores) -> str:
    loss = f", val_loss {statistics.fmean(scores.val_loss):.8f}" if scores.val_loss else ""
    mean = f"{scores.name}: val_bpb {statistics.fmean(scores.val_bpb):.8f}"
    if len(scores.val_bpb) == 1:
        return f"{mean}{loss} (one number)"
    seeds = f"seeds {', '.join(scores.seeds)}" if scores.seeds else counted(len(scores.val_bpb), "seed")
    return f"{mean} ± {statistics.stdev(scores.val_bpb):.8f}{loss} ({seeds})"


def _result(tests: list[UnitTest], *, per_token: bool) -> str:
    passed, failed = ([test.unit for test in tests if test.passes is verdict] for verdict in (True, False))
    if not failed:
        return "Result: A is better by enough in every unit."
    if not passed and not per_token:
        # 0.005 nats per token are the smallest improvement of all units, and this test was not possible
        return "Result: not known: A is not better by enough in the units tested, and nats per token were not."
    if not passed:
        return "Result: A is not better by enough in any unit."
    return f"Result: A is better by enough in {', '.join(passed)}, but not in {', '.join(failed)}."
