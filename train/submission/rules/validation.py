"""Rules: no validation tokens in the artifact or in training, judged by what README, submission.json and logs say."""

from __future__ import annotations

import re

from train.data.paid_prefix import NOT_COMPLIANT
from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, fails, passes, unknown

# the label that this package gives its runs with a paid prefix
_LABEL = NOT_COMPLIANT.partition(":")[0]
_PREFIX = r"paid[ _-]?prefix|val(idation)? tokens? (are |is |stored )?in the artifact"
_TRAINED = (
    r"(train|fine-?tun|adapt)\w*\b(?:(?!scor|evaluat|[.,;|]).){0,40}\bon (the )?val(idation)?\b|\bval[ _-]?only\b"
)
_SCORED_FIRST = r"already[ -]scored|score[ds]?[ -](first|before)|after (scoring|being scored)"
_DENIED = r"\b(no|not|never|without|n't)\b"


def artifact(record: RecordFolder) -> Finding:
    rule = "no validation tokens in the artifact"
    label = [(name, line) for name, line in record.find(_LABEL) if _LABEL in line]
    for name, line in [*label, *_affirmed(record, _PREFIX)]:
        return fails(rule, f"{name}: {_excerpt(line, f'{_LABEL}|{_PREFIX}')}")
    return _nothing_found(record, rule)


def training(record: RecordFolder) -> Finding:
    rule = "no training on validation tokens"
    for name, line in _affirmed(record, _TRAINED):
        excerpt = f"{name}: {_excerpt(line, _TRAINED)}"
        if re.search(_SCORED_FIRST, line, re.IGNORECASE):
            return unknown(rule, f"allowed only on tokens that are already scored: {excerpt}")
        return fails(rule, excerpt)
    return _nothing_found(record, rule)


def _nothing_found(record: RecordFolder, rule: str) -> Finding:
    if not record.logs and not record.readme:
        return unknown(rule, "no README.md and no log")
    return passes(rule, "README, submission.json and logs mention none")


def _affirmed(record: RecordFolder, pattern: str) -> list[tuple[str, str]]:
    """Return (file name, line) for each line that matches, unless a word such as "no" shortly precedes the match."""
    found = []
    for name, line in record.find(pattern):
        match = re.search(pattern, line, re.IGNORECASE)
        before = line[max(match.start() - 40, 0) : match.start()] if match else ""
        if not re.search(_DENIED, before, re.IGNORECASE):
            found.append((name, line))
    return found


def _excerpt(line: str, pattern: str) -> str:
    match = re.search(pattern, line, re.IGNORECASE)
    start = max((match.start() if match else 0) - 30, 0)
    return repr(line[start : start + 110].strip())
