"""No validation tokens: not in the artifact, not in training."""

from __future__ import annotations

import re

from train.submission.record_folder import RecordFolder
from train.submission.rules.finding import Finding, fails, passes, unknown

# with this label our own runs mark scores of a text that is partly in the artifact
_LABEL = r"NOT COMPLIANT"
_PREFIX = r"paid[ _-]?prefix|val(idation)? tokens? (are |is |stored )?in the artifact"
_TRAINED = (
    r"(train|fine-?tun|adapt)\w*\b(?:(?!scor|evaluat|[.,;|]).){0,40}\bon (the )?val(idation)?\b|\bval[ _-]?only\b"
)
_SCORED_FIRST = r"already[ -]scored|score[ds]?[ -](first|before)|after (scoring|being scored)"
_DENIED = r"\b(no|not|never|without|n't)\b"


def artifact(record: RecordFolder) -> Finding:
    rule = "no validation tokens in the artifact"
    label = [(name, line) for name, line in record.find(_LABEL) if re.search(_LABEL, line)]
    for name, line in [*label, *_affirmed(record, _PREFIX)]:
        return fails(rule, f"{name}: {_excerpt(line, f'{_LABEL}|{_PREFIX}')}")
    if not record.logs and not record.readme:
        return unknown(rule, "neither README nor log to read")
    return passes(rule, "nothing in README, json and logs says so")


def training(record: RecordFolder) -> Finding:
    rule = "no validation tokens in training"
    for name, line in _affirmed(record, _TRAINED):
        if re.search(_SCORED_FIRST, line, re.IGNORECASE):
            return unknown(rule, f"trains on tokens it has scored, read how: {name}: {_excerpt(line, _TRAINED)}")
        return fails(rule, f"{name}: {_excerpt(line, _TRAINED)}")
    if not record.logs and not record.readme:
        return unknown(rule, "neither README nor log to read")
    return passes(rule, "nothing in README, json and logs says so")


def _affirmed(record: RecordFolder, pattern: str) -> list[tuple[str, str]]:
    """Lines that say it and do not deny it within the words before."""
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
