"""Formats the findings of `check`: one screen per record, a table of all records, or JSON."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from train.common.wording import counted
from train.submission.check import with_verdict
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, Verdict

_WIDTH = 110
_SHOWN_SEEDS = 5


def screen(record: RecordFolder, findings: Sequence[Finding]) -> str:
    """Describe a record on one screen: score, size, training time, evaluation, seeds, broken rules and notes."""
    values = {item.rule: item.value for item in findings}
    breaks, unseen, notes = (
        with_verdict(findings, verdict) for verdict in (Verdict.FAILS, Verdict.UNKNOWN, Verdict.NOTE)
    )
    kept = len(with_verdict(findings, Verdict.PASSES))
    rows = [
        ("score", _score(record)),
        ("read from", _source(record)),
        ("also logged", _other_scores(record)),
        ("size", values.get("total size", "")),
        ("clock", "; ".join(values.get(rule, "") for rule in ("training time", "training and calibration time"))),
        ("evaluation", values.get("evaluation time", "")),
        ("seeds", _seeds(record)),
        ("hardware", values.get("hardware", "")),
        *(("BREAKS", str(item)) for item in breaks),
        *([] if breaks else [("breaks", f"no rule; keeps {kept} of {len(findings)}")]),
        ("not seen", "; ".join(f"{item.rule} ({item.value})" for item in unseen)),
        *(("note", f"{item.rule}: {item.value}") for item in notes),
    ]
    lines = [_title(record)]
    for label, text in rows:
        if text:
            lines += textwrap.wrap(
                printable(text), _WIDTH, initial_indent=f"  {label:<12}", subsequent_indent=" " * 14, max_lines=6
            )
    return "\n".join(lines)


def summary_lines(findings: Sequence[Finding]) -> list[str]:
    """Count the kept rules. List the broken rules, the rules that cannot be judged, and the rules with a note."""
    lines = [f"{len(with_verdict(findings, Verdict.PASSES))} of {counted(len(findings), 'rule')} kept."]
    for verdict, text in ((Verdict.FAILS, "Breaks"), (Verdict.UNKNOWN, "Cannot be seen"), (Verdict.NOTE, "Notes")):
        found = [item.rule for item in with_verdict(findings, verdict)]
        lines += [f"{text}: {'; '.join(found)}."] if found else []
    return lines


def table(checked: Sequence[tuple[RecordFolder, Sequence[Finding]]]) -> str:
    """List the records in one table, best score first. Count the records that break a rule or have notes."""
    rows = [("record", "val_bpb", "seeds", "bytes", "train s", "eval s", "notes", "breaks")]
    for record, findings in sorted(checked, key=lambda pair: pair[0].val_bpb or 99.0):
        numbers = [result.numbers for result in record.results]
        worst = {
            name: max((found[name] for found in numbers if name in found), default=None)
            for name in ("artifact_bytes", "train_time_s", "eval_time_s")
        }
        breaks = [item.rule for item in with_verdict(findings, Verdict.FAILS)]
        rows.append(
            (
                shortened(record.name, 48),
                _number(record.val_bpb, ".8f"),
                str(len(record.scores) or "-"),
                _number(worst["artifact_bytes"] or record.claims.number("artifact_bytes"), ",.0f"),
                _number(worst["train_time_s"], ".1f"),
                _number(worst["eval_time_s"], ".1f"),
                str(len(with_verdict(findings, Verdict.NOTE))),
                ", ".join(breaks) or "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)),
                row[-1],
            ]
        )
        for row in rows
    ]
    broken = sum(bool(with_verdict(findings, Verdict.FAILS)) for _, findings in checked)
    noted = sum(bool(with_verdict(findings, Verdict.NOTE)) for _, findings in checked)
    count = counted(len(checked), "record")
    return "\n".join(
        [*lines, f"{count}: {broken} break a rule, {len(checked) - broken} break none, {noted} have notes."]
    )


def to_dict(record: RecordFolder, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the contents of `screen` as a dictionary for JSON."""
    return {
        "record": str(record.path),
        "track": "non-record" if record.non_record else "record",
        "val_bpb": record.val_bpb,
        "read_from": _source(record),
        "seeds": {result.seed: result.numbers for result in record.results},
        "other_scores": {
            one.name: one.val_bpb for result in record.results[:1] if result.log for one in result.log.evaluations
        },
        "findings": [
            {"rule": item.rule, "verdict": item.verdict.value, "value": item.value, "limit": item.limit}
            for item in findings
        ],
    }


def printable(text: str) -> str:
    """Replace control characters and lone surrogates, which a terminal cannot show, by spaces or escapes."""
    return "".join(char if char.isprintable() else " " if char in "\n\t" else f"\\x{ord(char):02x}" for char in text)


def shortened(text: str, width: int) -> str:
    text = printable(text)
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-width // 2 :]}"


def _title(record: RecordFolder) -> str:
    facts = [record.claims.string("name"), record.claims.string("author"), record.claims.string("date")]
    track = "non-record track" if record.non_record else "record track"
    return shortened(f"{record.path}  {', '.join([*(fact for fact in facts if fact), track])}", 200)


def _score(record: RecordFolder) -> str:
    if record.val_bpb is None:
        return "not seen: no val_bpb in submission.json, and no score in a log"
    scores = list(record.scores.values())
    deviation = f" ± {statistics.stdev(scores):.8f}" if len(scores) > 1 else ""
    return f"{record.val_bpb:.8f}{deviation} bits per byte"


def _source(record: RecordFolder) -> str:
    found = [
        f"{one.evaluation.name} in {one.log.name}, line {one.evaluation.line}"
        for one in record.results
        if one.evaluation and one.log
    ]
    if found:
        more = f", and {counted(len(found) - 1, 'other log')}" if len(found) > 1 else ""
        return found[0] + more
    return "submission.json alone" if record.val_bpb is not None else ""


def _other_scores(record: RecordFolder) -> str:
    """Describe the scores, besides the claimed score, in the first log from which a seed's score was read."""
    for result in record.results:
        if result.log:
            others = [one for one in result.log.evaluations if one is not result.evaluation]
            return ", ".join(f"{one.name} {one.val_bpb:.8f}" for one in others)
    return ""


def _seeds(record: RecordFolder) -> str:
    shown = [f"{shortened(seed, 30)}: {score:.8f}" for seed, score in record.scores.items()]
    more = f", and {len(shown) - _SHOWN_SEEDS} more" if len(shown) > _SHOWN_SEEDS else ""
    return (", ".join(shown[:_SHOWN_SEEDS]) + more) if shown else "no scores per seed"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
