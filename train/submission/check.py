"""The rules of Parameter Golf, applied to record folders.

A rule is a function from `RecordFolder` to `Finding`. There are four verdicts: the record keeps the rule, the record
breaks the rule, the record shows too little to judge, or the author should read a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train.submission.record_folder import RecordFolder
from train.submission.rules import agreement, clock, contents, hardware, scoring, size, validation
from train.submission.rules.finding import Finding, Verdict

RULES: tuple[Callable[[RecordFolder], Finding], ...] = (
    contents.files,
    contents.other_logs,
    contents.keys,
    contents.seeds,
    hardware.hardware,
    contents.command,
    size.cap,
    size.code,
    size.parts,
    clock.training,
    clock.calibration,
    clock.evaluation,
    clock.own_limits,
    scoring.text,
    scoring.once,
    scoring.tokenizer,
    validation.artifact,
    validation.training,
    agreement.score,
    agreement.json_and_logs,
    agreement.means,
    agreement.readme,
)


def apply_rules(record: RecordFolder) -> list[Finding]:
    return [rule(record) for rule in RULES]


def with_verdict(findings: Sequence[Finding], verdict: Verdict) -> list[Finding]:
    return [item for item in findings if item.verdict is verdict]


def exit_code(findings: Sequence[Finding], *, strict: bool = False) -> int:
    """Return 1 if a rule is broken, or if `strict` and there is a note; else 0."""
    failing = {Verdict.FAILS, Verdict.NOTE} if strict else {Verdict.FAILS}
    return int(any(item.verdict in failing for item in findings))
