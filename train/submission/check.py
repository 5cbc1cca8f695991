"""The rules of Parameter Golf, applied to a record folder.

A rule is a function from `RecordFolder` to `Finding`. If the folder lacks what a rule needs, its verdict is "unknown".
An unknown verdict is reported but does not fail the check.
"""

from __future__ import annotations

from collections.abc import Callable

from train.submission.record_folder import RecordFolder
from train.submission.rules import agreement, clock, contents, scoring, size, validation
from train.submission.rules.finding import Finding, Verdict

RULES: tuple[Callable[[RecordFolder], Finding], ...] = (
    contents.files,
    contents.keys,
    contents.seeds,
    contents.hardware,
    contents.command,
    size.cap,
    size.code,
    size.parts,
    clock.training,
    clock.calibration,
    clock.evaluation,
    scoring.text,
    scoring.once,
    scoring.tokenizer,
    validation.artifact,
    validation.training,
    agreement.logs,
    agreement.json_and_logs,
    agreement.means,
    agreement.readme,
)


def apply_rules(record: RecordFolder) -> list[Finding]:
    return [rule(record) for rule in RULES]


def check_text(findings: list[Finding]) -> str:
    """Format the findings: one line per rule, then `summary_lines`."""
    width = max(len(finding.rule) for finding in findings)
    lines = [
        f"{finding.verdict.value:<7}  {finding.rule:<{width}}  {finding.value}"
        + (f"  (limit: {finding.limit})" if finding.limit else "")
        for finding in findings
    ]
    return "\n".join([*lines, "", *summary_lines(findings)])


def summary_lines(findings: list[Finding]) -> list[str]:
    """Say how many rules pass, which fail, and which cannot be checked."""
    names = {verdict: [item.rule for item in findings if item.verdict is verdict] for verdict in Verdict}
    lines = [f"{len(names[Verdict.PASSES])} of {len(findings)} rules pass."]
    if names[Verdict.FAILS]:
        lines.append(f"Failed: {'; '.join(names[Verdict.FAILS])}.")
    if names[Verdict.UNKNOWN]:
        lines.append(f"Could not be checked: {'; '.join(names[Verdict.UNKNOWN])}.")
    return lines


def exit_code(findings: list[Finding]) -> int:
    """Return 1 if a rule fails, else 0."""
    return int(any(item.verdict is Verdict.FAILS for item in findings))
