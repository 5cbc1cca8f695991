"""The rules of Parameter Golf, each judged from what a record folder shows: value, limit, verdict.

A rule is a function from `RecordFolder` to a `Finding`. A rule about which a folder shows nothing is "not seen", which is
no failure, but is said.
"""

from __future__ import annotations

from collections.abc import Callable

from train.submission.record_folder import RecordFolder
from train.submission.rules import agreement, clock, contents, scoring, size, validation
from train.submission.rules.finding import Finding, Verdict

# in the order in which a reader of a record asks
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
    """Apply every rule."""
    return [rule(record) for rule in RULES]


def check_text(findings: list[Finding]) -> str:
    """A line per rule, then what failed and what could not be seen."""
    width = max(len(finding.rule) for finding in findings)
    lines = [f"{finding.verdict.value:<8} {finding.rule:<{width}}  {finding.value}" for finding in findings]
    lines = [
        line + (f"  (limit: {finding.limit})" if finding.limit else "")
        for line, finding in zip(lines, findings, strict=True)
    ]
    return "\n".join([*lines, "", *summary_lines(findings)])


def summary_lines(findings: list[Finding]) -> list[str]:
    """How many rules hold, which fail, and about which nothing could be seen."""
    counts = {verdict: [item.rule for item in findings if item.verdict is verdict] for verdict in Verdict}
    lines = [f"{len(counts[Verdict.PASSES])} of {len(findings)} rules hold."]
    if counts[Verdict.FAILS]:
        lines.append(f"Failed: {'; '.join(counts[Verdict.FAILS])}.")
    if counts[Verdict.UNKNOWN]:
        lines.append(f"Could not be seen: {'; '.join(counts[Verdict.UNKNOWN])}.")
    return lines


def exit_code(findings: list[Finding]) -> int:
    """1 if a rule fails, else 0: what cannot be seen is no failure."""
    return int(any(item.verdict is Verdict.FAILS for item in findings))
